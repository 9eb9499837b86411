"""A bill's page, JSON and picture, of operations made up here."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mosaicjax.data.mixture import TokenStore
from mosaicjax.errors import InputError
from mosaicjax.hardware import Price
from mosaicjax.mesh import Mesh
from mosaicjax.models import mpt
from mosaicjax.plan.bill import Bill, Work
from mosaicjax.plan.compiled import Compiled, Memory
from mosaicjax.plan.count import Collective
from mosaicjax.plan.lints import lints
from mosaicjax.plan.picture import COLORS, draw, figure
from mosaicjax.plan.step_time import KINDS, Speeds, step_time
from mosaicjax.plan.text import lines, to_json
from mosaicjax.plan.topology import Topology
from mosaicjax.recipe import Recipe
from mosaicjax.show import described
from tests.plan.test_step_time import op

GIB = 2**30
PLACE = "jit(__call__)/gradients/{}while/body/closed_call/block0/mlp/{}"
BACKWARD = "transpose(jvp())/"
V5E = Topology.read("v5e:2x2")
RECIPE = Recipe(
    mpt.Config(layers=2, embed=64, heads=4, mlp=256, vocab=512), TokenStore("none"), seq=128, batch=8
)


def collective(kind, sent):
    return Collective(kind, (0, 1, 2, 3), sent, sent, False, "")


OPS = (
    op("a", flops=197e12 * 0.1, times=2, place=PLACE.format("", "dot_general")),
    op("b", flops=197e12 * 0.3, place=PLACE.format(BACKWARD, "dot_general")),
    op("c", kernel=True, flops=197e12 * 0.05, place=PLACE.format("", "attend/pallas_call")),
    op("d", hbm=819e9 * 0.02, place="jit(__call__)/optimizer/mul"),
    # Two links a side of 50 GB/s would be four; sides of two are lines: two links.
    op("e", collectives=[collective("all-reduce", 2e9)], place=PLACE.format(BACKWARD, "dot_general")),
)


@pytest.fixture
def bill():
    places = np.asarray([(0, x, y, 0) for x in range(2) for y in range(2)])
    speeds = Speeds.of(V5E, "bfloat16")
    fast, slow = (step_time(OPS, speeds, places, lambda op: None, pessimistic=each) for each in (False, True))
    memory = Memory(3 * GIB, 2 * GIB, 2 * GIB, 5 * GIB, GIB)
    versions = {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.52"}
    compiled = Compiled(
        "0123456789abcdef" * 4, "", memory, memory.peak, 0, ((GIB, "f32[2]"),), 12.0, versions
    )
    work = Work(model=80e12, model_full=90e12, recomputed=10e12, masked=5e12, compiled=95e12, kernels=9e12)
    price = Price(1.20, "a list", "2026-01-01")
    return Bill(RECIPE, V5E, compiled, price, work, fast, slow, hbm=1e9, wire=2e9, lints=("a lint",), ops=OPS)


def test_the_page_by_hand(bill):
    page = list(lines(bill, "small"))
    assert page[0] == "small on v5e:2x2 (4 chips): the train step, compiled by libtpu 0.0.52 in 12 s"
    assert page[1] == "program   0123456789abcdef, 8 rows x 128 tokens a step"
    assert page[2] == ("memory    fits: 9.00 of 16 GiB a chip (arguments 3.00, temporaries 5.00, code 1.00)")
    # 0.5 s of products, 0.05 of a kernel, 0.02 of HBM; 2 GB over two links: 0.02 or 0.04 s.
    assert page[3] == "step      600.0 ms, 590.0 ms to 610.0 ms by optimistic and pessimistic links"
    assert [line.split() for line in page[4:8]] == [
        "matrix units 500.0 ms 83.3%".split(),
        "vector and HBM 20.0 ms 3.3%".split(),
        "kernels 50.0 ms 8.3%".split(),
        "exposed collectives 30.0 ms 5.0%, 20.0 ms to 40.0 ms".split(),
    ]
    # 80e12 FLOPs in 0.6 s of 197e12 a second.
    assert page[9].startswith(
        "MFU       67.7% causal, 76.1% full; HFU 80.4%; 1 GB of HBM and 2.0 GB on the wire"
    )
    assert page[10] == "speed     1.71k tokens/s, 427 a chip"
    # 4 chips at $1.20 an hour for 0.6 s over 1,024 tokens.
    assert page[11].startswith(
        f"bill      ${4 * 1.2 * 0.6 / 3_600 / 1_024 * 1e6:.4f} a million tokens; 4.92M tokens"
    )
    assert page[12].endswith("$1.20 a chip hour (a list, 2026-01-01)")
    assert page[14].split()[:3] == ["300.0", "ms", "50.0%"] and page[14].endswith(
        "matrix units: block0 mlp dot_general (backward), 1 runs"
    )
    assert page[15].endswith("matrix units: block0 mlp dot_general (forward), 2 runs")
    assert page[-1] == "lint      a lint"


def test_the_json_by_hand(bill):
    found = json.loads(json.dumps(to_json(bill, "small"), allow_nan=False))
    assert found["memory"]["needed"] == 9 * GIB and found["memory"]["temporaries"] == 5 * GIB
    assert found["step_seconds"]["expected"] == pytest.approx(0.6)
    assert found["step_seconds"]["pessimistic"]["collectives"] == pytest.approx(0.04)
    assert found["flops"]["expected"] == 95e12
    assert found["utilization"]["mfu_causal"] == pytest.approx(80 / 0.6 / 197)
    assert found["run"]["days"] == pytest.approx(4_800 * 0.6 / 86_400)
    assert [row["kind"] for row in found["costliest"]] == [
        "matrix",
        "matrix",
        "kernels",
        "vector",
        "collectives",
    ]


def test_the_picture_has_a_bar_for_each_part(bill, tmp_path):
    above, below = figure(bill, "small").axes
    widths = [bar.get_width() for bar in above.patches]
    assert widths == pytest.approx([0.5, 0.02, 0.05, 0.04, 0.5, 0.02, 0.05, 0.02])
    # Parts of one name and two kinds are two bars, the longest on top.
    assert [bar.get_width() for bar in below.patches] == pytest.approx([0.02, 0.02, 0.05, 0.2, 0.3])
    assert len({bar.get_y() for bar in below.patches}) == 5
    assert set(COLORS) == set(KINDS)
    draw(bill, str(tmp_path / "plan.png"), "small")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="there is nothing to draw"):
        draw(replace(bill, fast=None, slow=None), str(tmp_path / "none.png"), "small")


def said(ops, **mesh):
    step = described(replace(RECIPE, mesh=Mesh(**mesh), model=replace(RECIPE.model, embed=64)), 4)
    places = np.asarray([(0, x, y, 0) for x in range(2) for y in range(2)])
    slow = step_time(ops, Speeds.of(V5E, "bfloat16"), places, lambda op: None, pessimistic=True)
    return list(lints(ops, slow, step.layout, step.program.trainable))


def test_lints_say_what_is_amiss_and_the_way_out():
    work = op("work", flops=197e12, place=PLACE.format("", "dot_general"))
    assert said([work]) == []
    reduced = op(
        "r", collectives=[collective("all-reduce", 2e9)], place=PLACE.format(BACKWARD, "dot_general")
    )
    (line,) = said([work, reduced])
    assert "gradients are summed by 1 full all-reduces a step (2.0 GB sent by each chip)" in line
    assert "fix: --mesh.gather explicit" in line
    assert "fix: with mesh.fsdp along" in said([work, reduced], fsdp=(4,), gather="explicit")[0]
    # Copies of the model have to be summed whole.
    assert said([work, reduced], data=4, fsdp=(1,)) == []
    gathered = op(
        "g", collectives=[collective("all-reduce", 2e9)], place=PLACE.format("", "sharding_constraint")
    )
    assert "weights are gathered by 1 all-reduces" in said([work, gathered])[0]
    waited = op("w", collectives=[collective("all-gather", 9e9)], place=PLACE.format("", "dot_general"))
    assert (
        "nothing is done beside synchronous collectives (all-gather), up to 15% of the step"
        in said([work, waited])[0]
    )
    silent = replace(op("mine.1", kernel=True), estimated=False)
    assert said([work, silent]) == [
        "kernels without a cost estimate, counted as nothing: mine; fix: pl.CostEstimate"
    ]


def test_narrow_shards_are_said():
    step = described(replace(RECIPE, batch=256), 256 // 8)
    places = np.asarray([(0, x, y, 0) for x in range(8) for y in range(4)])
    work = [op("work", flops=1e12)]
    slow = step_time(work, Speeds.of(V5E, "bfloat16"), places, lambda op: None, pessimistic=True)
    (line,) = lints(work, slow, step.layout, step.program.trainable)
    assert line.startswith(
        "weights are cut along embed into pieces 2 wide (64 over 32), less than a tile's 16"
    )
