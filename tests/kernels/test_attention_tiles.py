"""The TPU kernel's table of blocks: each entry usable, each shape answered, a stand-in said to be one."""

import logging

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.hardware import CHIPS
from mosaicjax.kernels import attention_tiles
from mosaicjax.kernels.attention_tiles import (
    HEAD_DIMS,
    LENGTHS,
    MIB,
    VMEM_LIMITS,
    Entry,
    length_class,
    table,
    tilings,
    vmem_estimate,
)
from mosaicjax.kernels.flash_tpu import LANES, Tiling

PASSES = ("forward", "backward")
PHYSICAL = {"v4": 16, "v5e": 128, "v5p": 64, "v6e": 128}
DTYPES = ("bfloat16", "float32")


@pytest.fixture
def heard(caplog):
    """What the module says, from a clean start: it says a thing once in a process."""
    attention_tiles._tilings.cache_clear()
    with caplog.at_level(logging.WARNING, logger=attention_tiles.__name__):
        yield caplog


def kinds(name):
    return [kind for chip in CHIPS if chip.name == name for kind in (*chip.device_kinds, name)]


def test_the_table_is_whole_and_each_entry_stands_once():
    at = [(e.chip, e.dtype, e.head_dim, e.length, e.windowed) for e in table()]
    expected = {
        (chip, dtype, dim, length, windowed)
        for chip in VMEM_LIMITS
        for dtype in DTYPES
        for dim in HEAD_DIMS
        for length in LENGTHS
        for windowed in (False, True)
    }
    assert len(at) == len(set(at)) and set(at) == expected


def test_every_entry_can_be_run_and_has_a_figure():
    for entry in table():
        size = jnp.dtype(entry.dtype).itemsize
        for which, tiling, us, share in zip(
            PASSES, entry.tilings, entry.microseconds, entry.shares, strict=True
        ):
            assert tiling.queries % LANES == tiling.keys % LANES == tiling.strip % LANES == 0, entry
            assert tiling.queries % min(tiling.strip, tiling.queries) == 0, entry
            assert tiling.resident % tiling.keys == 0, entry
            assert tiling.vmem == VMEM_LIMITS[entry.chip] <= PHYSICAL[entry.chip] * MIB, entry
            fitted = tiling.fitted(entry.length, entry.length)
            several = entry.length > fitted.resident
            taken = vmem_estimate(which, fitted, size, entry.head_dim, entry.head_dim, several)
            assert taken <= tiling.vmem, entry
            assert us > 0 and 0 < share < 1, entry
        assert Entry.read(entry.dump()).dump() == entry.dump()


@pytest.mark.parametrize("name", sorted(VMEM_LIMITS))
@pytest.mark.parametrize("windowed", [False, True])
def test_every_name_of_a_chip_finds_its_own_entries_and_says_nothing(name, windowed, heard):
    own = {
        (e.dtype, e.head_dim, e.length): e.tilings
        for e in table()
        if e.chip == name and e.windowed is windowed
    }
    for kind in kinds(name):
        for (dtype, dim, length), expected in own.items():
            for keys in (length, length - 1):
                got = tilings(kind, jnp.dtype(dtype), dim, dim, keys, 100 if windowed else 0)
                assert got == expected
    assert not heard.records


def test_a_window_as_long_as_the_keys_is_none():
    for window in (2_048, 5_000):
        assert tilings("v5e", jnp.bfloat16, 128, 128, 2_048, window) == tilings(
            "v5e", jnp.bfloat16, 128, 128, 2_048, 0
        )


@given(
    st.sampled_from(sorted(VMEM_LIMITS)),
    st.sampled_from(DTYPES),
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(1, 200_000),
    st.integers(0, 5_000),
)
def test_any_shape_is_answered_within_vmem(chip, dtype, head_dim, value_dim, keys, window):
    got = tilings(chip, jnp.dtype(dtype), head_dim, value_dim, keys, window)
    for which, tiling in zip(PASSES, got, strict=True):
        fitted = tiling.fitted(keys, keys)
        size, several = jnp.dtype(dtype).itemsize, keys > fitted.resident
        assert vmem_estimate(which, fitted, size, head_dim, value_dim, several) <= VMEM_LIMITS[chip]
        assert tiling.resident % tiling.keys == 0 and tiling.keys % LANES == 0
        assert tiling.queries % LANES == 0 and tiling.queries % tiling.strip == 0


@pytest.mark.parametrize(
    "kind, dim, value_dim, keys",
    [
        ("TPU v6 lite", 112, 112, 4_096),
        ("TPU v4", 192, 128, 4_096),
        ("v5p", 128, 128, 40_000),
        ("TPU7x", 128, 128, 4_096),
        ("TPU v99", 128, 128, 4_096),
    ],
)
def test_a_shape_outside_the_table_is_said_once(kind, dim, value_dim, keys, heard):
    for _ in range(3):
        tilings(kind, jnp.bfloat16, dim, value_dim, keys, 0)
    (record,) = heard.records
    assert kind in record.getMessage() and f"{keys:,} keys" in record.getMessage()


def test_an_unknown_chip_takes_what_a_v5e_takes(heard):
    expected = tilings("v5e", jnp.bfloat16, 64, 64, 4_096, 0)
    assert tilings("TPU v99", jnp.bfloat16, 64, 64, 4_096, 0) == expected
    assert tilings("tpu7x", jnp.bfloat16, 64, 64, 4_096, 0) == expected


def test_interpreting_on_a_cpu_says_nothing(heard):
    for dim in (17, 64, 128):
        assert tilings("cpu", jnp.float32, dim, dim, 300, 7)
    assert not heard.records


def test_nearest_head_dim_is_the_entry_that_serves():
    for dim, nearest in ((32, 64), (72, 80), (112, 128), (160, 192), (224, 256)):
        assert tilings("v5e", jnp.bfloat16, dim, dim, 1_024, 0) == tilings(
            "v5e", jnp.bfloat16, nearest, nearest, 1_024, 0
        )


def test_what_no_vmem_holds_is_an_error():
    with pytest.raises(InputError, match="no room for this head dim"):
        tilings("v4", jnp.float32, 40_000, 40_000, 4_096, 0)


@pytest.mark.parametrize(
    "keys, expected", [(1, 512), (512, 512), (513, 1_024), (32_768, 32_768), (99_999, 32_768)]
)
def test_length_classes(keys, expected):
    assert length_class(keys) == expected


@given(
    st.sampled_from(PASSES),
    st.sampled_from([128, 256, 512, 1_024]),
    st.sampled_from([128, 256, 512]),
    st.integers(1, 16),
    st.sampled_from([2, 4]),
    st.integers(1, 256),
)
def test_the_estimate_holds_all_windows_twice_and_the_scratch(which, queries, keys, blocks, size, dim):
    tiling = Tiling(queries, keys, keys * blocks, 16 * MIB, 128)
    wide = -(-dim // LANES) * LANES
    rows, held = tiling.queries * wide, tiling.resident * wide
    # Forward: q, out, k, v twice over, and the sum; backward: q, dout, dq, k, v, dk, dv, and three sums.
    least = (
        2 * size * (2 * rows + 2 * held) + 4 * queries * dim
        if which == "forward"
        else 2 * size * (3 * rows + 4 * held) + 4 * (2 * held + queries * dim)
    )
    assert vmem_estimate(which, tiling, size, dim, dim) >= least
    assert vmem_estimate(which, tiling, size, dim, dim, True) >= vmem_estimate(which, tiling, size, dim, dim)
