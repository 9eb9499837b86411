"""How operations add up to a step, by hand; and what links carry, on small toruses."""

from dataclasses import replace

import numpy as np
import pytest

from mosaicjax.plan.count import Collective, Op
from mosaicjax.plan.step_time import Speeds, device_places, model_part, step_time, wire_seconds
from mosaicjax.plan.topology import Topology

SPEEDS = Speeds(cycles=1e9, flops=1e12, hbm=1e11, link=1e10, dcn=1e9, ring=4)
GRID = np.asarray([(0, x, y) for x in range(4) for y in range(2)])
NOTHING = {
    "place": "",
    "body": "main",
    "times": 1,
    "flops": 0.0,
    "hbm": 0.0,
    "cycles": None,
    "modelled": True,
}


def op(name="op", collectives=(), kernel=False, copy=False, **figures):
    return Op(
        name=name,
        opcode="fusion",
        kernel=kernel,
        copy=copy,
        estimated=True,
        collectives=tuple(collectives),
        **{**NOTHING, **figures},
    )


def collective(sent, group=tuple(range(8)), overlapped=False):
    return Collective("all-gather", group, sent, sent, overlapped, "")


def timed(*ops, pessimistic=False, rate=lambda op: None):
    return step_time(ops, SPEEDS, GRID, rate, pessimistic=pessimistic)


def test_what_takes_longest_counts():
    # 3 ms by cycles, 2 by FLOPs, 1 by bytes; then bytes, then FLOPs.
    found = timed(
        op(flops=2e9, hbm=1e8, cycles=3_000_000),
        op(flops=2e9, hbm=5e8, cycles=3_000_000),
        op(flops=7e9, hbm=5e8, cycles=3_000_000),
    )
    assert found.matrix == pytest.approx(3e-3 + 5e-3 + 7e-3)
    assert (found.vector, found.kernels, found.collectives) == (0, 0, 0)
    assert timed(op(cycles=1_000_000, hbm=2e8)).vector == pytest.approx(2e-3)
    assert timed(op(cycles=3_000_000, hbm=2e8)).vector == pytest.approx(3e-3)


def test_guesses_count_for_what_touches_no_hbm_alone():
    assert timed(op(cycles=3_000_000, hbm=2e8, modelled=False)).vector == pytest.approx(2e-3)
    assert timed(op(cycles=3_000_000, modelled=False)).vector == pytest.approx(3e-3)
    assert timed(op(cycles=3_000_000, flops=1e9, hbm=1e8, modelled=False)).matrix == pytest.approx(3e-3)


def test_turns_of_a_loop_count_each():
    found = timed(op(flops=1e9, times=1), op(flops=1e9, times=6, body="loop"))
    assert found.matrix == found.seconds == pytest.approx(7e-3)


def test_kernels_go_at_the_rate_that_is_known_of_them():
    known = {"attention": 5e11}
    found = timed(
        op("attention", kernel=True, flops=1e9, hbm=1e6),
        op("other", kernel=True, flops=1e9),
        op("moving", kernel=True, flops=1e9, hbm=4e8),
        rate=lambda op: known.get(op.name),
    )
    assert found.kernels == pytest.approx(2e-3 + 1e-3 + 4e-3)


def test_copies_cost_what_they_are_longer_than_the_work_beside_them():
    busy = op(flops=5e9, hbm=1e8)
    assert timed(busy, op(copy=True, hbm=3e8)).seconds == pytest.approx(5e-3)
    assert timed(busy, op(copy=True, hbm=6e8)).seconds == pytest.approx(7e-3)
    # Of the other body's work a copy in this one has no profit.
    assert timed(busy, op(copy=True, hbm=6e8, body="loop")).seconds == pytest.approx(11e-3)


def test_gathers_beside_work_cost_what_they_are_longer():
    busy = op(flops=5e9)
    # Along 4 of a ring in both directions and 2 of a line: 3 links, 3e10 bytes a second.
    short, long = (op(collectives=[collective(size, overlapped=True)]) for size in (1e8, 3e8))
    assert timed(busy, short).collectives == 0
    found = timed(busy, long)
    assert (found.collectives, found.wire) == (pytest.approx(5e-3), pytest.approx(10e-3))
    assert timed(busy, long, pessimistic=True).collectives == pytest.approx(15e-3)
    waited = timed(busy, op(collectives=[collective(1e8)]))
    assert waited.collectives == pytest.approx(1e8 / 3e10)
    assert waited.seconds == pytest.approx(5e-3 + 1e8 / 3e10)
    assert [each.kind for each in waited.timed] == ["matrix", "collectives"]


@pytest.mark.parametrize(
    ("group", "links"),
    [
        ((0, 2, 4, 6), 2),  # a ring of 4
        ((0, 1), 1),  # 2 side by side
        ((0, 2), 1),  # half of a ring is a line
        (tuple(range(8)), 3),
    ],
)
def test_links_of_a_group(group, links):
    one = collective(6e9, group)
    assert wire_seconds(one, SPEEDS, GRID, False) == pytest.approx(6e9 / links / 1e10)
    assert wire_seconds(one, SPEEDS, GRID, True) == pytest.approx(2 * 6e9 / links / 1e10)


def test_slices_are_joined_by_the_network():
    places = np.concatenate([GRID, GRID + np.asarray([1, 0, 0])])
    assert wire_seconds(collective(1e9, (0, 8)), SPEEDS, places, False) == pytest.approx(1.0)
    assert wire_seconds(collective(1e9, ()), SPEEDS, places, False) == 0


def test_speeds_are_the_tables():
    v5e = Speeds.of(Topology.read("v5e:16x16"), "bfloat16")
    assert (v5e.cycles, v5e.flops, v5e.hbm, v5e.link, v5e.ring) == (1.5e9, 197e12, 819e9, 50e9, 16)
    v5p = Speeds.of(Topology.read("v5p:4x4x4"), "float32")
    # float32 has no peak of its own.
    assert (v5p.flops, v5p.link, v5p.dcn, v5p.ring) == (459e12, 100e9, 6.25e9, 4)


def test_places_are_slices_and_coordinates():
    class Device:
        def __init__(self, coords, slice_index=None):
            self.coords = coords
            if slice_index is not None:
                self.slice_index = slice_index

    devices = [Device((0, 1, 0)), Device((3, 2, 1), 1)]
    assert device_places(devices).tolist() == [[0, 0, 1, 0], [1, 3, 2, 1]]


@pytest.mark.parametrize(
    ("place", "part"),
    [
        (
            "jit(__call__)/gradients/while/body/closed_call/transpose(jvp())/while/body/closed_call/checkpoint/"
            "rematted_computation/block0/mlp/dot_general",
            "block0 mlp dot_general (forward again)",
        ),
        (
            "jit(__call__)/gradients/while/body/closed_call/transpose(jvp())/while/body/closed_call/checkpoint/"
            "block1/attention/shard_map/flash_attention_backward/pallas_call",
            "block1 attention flash_attention_backward (backward)",
        ),
        ("jit(__call__)/gradients/jvp()/while/body/closed_call/block0/mlp/mul", "block0 mlp mul (forward)"),
        ("jit(__call__)/optimizer/add", "optimizer add"),
        ("", "op"),
    ],
)
def test_parts_of_the_model(place, part):
    assert model_part(op(place=place)) == part


def test_products_of_8_bits_go_at_their_own_peak():
    speeds = replace(SPEEDS, narrow={"int8": 2e12})
    ops = (
        # 6 of 8 GFLOP at 2 a ms, the rest at 1 a ms; float8 has no peak of its own here.
        op(flops=8e9, narrow={"int8": 6e9}),
        op(flops=4e9, narrow={"float8": 4e9}),
        op(flops=4e9, narrow={"int8": 4e9}, cycles=3_000_000),
    )
    found = step_time(ops, speeds, GRID, lambda op: None, pessimistic=False)
    assert [each.seconds for each in found.timed] == pytest.approx([5e-3, 4e-3, 3e-3])
    v5e, v6e = (Speeds.of(Topology.read(name), "bfloat16") for name in ("v5e:16x16", "v6e:16x16"))
    assert v5e.narrow == {"int8": 393e12}
    assert v6e.narrow == {"int8": 1836e12, "float8": 918e12}
