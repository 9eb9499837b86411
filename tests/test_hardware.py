import math
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax import hardware
from mosaicjax.errors import InputError
from mosaicjax.hardware import CHIPS, Price, chip_named, cost_usd, find_chip, mfu, usd_per_million_tokens


def test_device_kinds_find_their_chip():
    # What jax reports: `TPU v5 lite` is the v5e and `TPU v5` the v5p, which is easily swapped.
    expected = {
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5": 459e12,
        "TPU v6 lite": 918e12,
        "TPU7x": 2307e12,
        "NVIDIA A100-SXM4-40GB": 312e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989.4e12,
    }
    assert {kind: find_chip(kind).peak("bfloat16") for kind in expected} == expected
    assert find_chip("TPU v5e") is hardware.TPU_V5E
    assert find_chip("TPU v99") is None


def test_device_kinds_and_names_are_unique():
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)


def test_cpu_states_no_peak():
    cpu = find_chip("cpu")
    assert cpu.peak("bfloat16") is None and cpu.peak("float32") is None
    assert cpu.price is None and cpu.link_one_way is None


def test_every_number_has_a_source_and_a_date():
    for chip in CHIPS:
        figures = [*chip.peak_flops.values(), chip.hbm_bytes, chip.hbm_bandwidth, chip.link_bandwidth]
        for figure in [*figures, chip.price]:
            if figure is not None:
                assert len(figure.source) > 10, chip.name
                assert re.fullmatch(r"20\d\d-\d\d-\d\d", figure.date), chip.name


@pytest.mark.parametrize(
    ("name", "one_way"),
    # The scaling book's table of one-way bytes/s a link; the vendor's own page for the two it does not carry.
    [("v4", 45e9), ("v5e", 50e9), ("v5p", 100e9), ("v6e", 100e9), ("a100-80", 25e9), ("h100", 25e9)],
)
def test_one_way_link_bandwidth(name, one_way):
    assert chip_named(name).link_one_way == pytest.approx(one_way)


def test_compute_outruns_memory_as_published():
    # FLOPs a byte of HBM before compute binds: v5e 240 and v5p 164 by the scaling book's rounded numbers.
    for name, critical in [("v5e", 240), ("v5p", 164)]:
        chip = chip_named(name)
        assert chip.peak("bfloat16") / chip.hbm_bandwidth.value == pytest.approx(critical, rel=0.02)


def test_tpu7x_is_two_devices_a_chip():
    assert chip_named("tpu7x").chips(8) == 4
    assert chip_named("v5p").chips(8) == 8


def test_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(InputError, match="v5e.*got v5x"):
        chip_named("v5x")


def test_cost_by_hand():
    price = Price(1.20, "a test", "2026-01-01")
    assert cost_usd(1800, 256, price) == pytest.approx(153.60)
    # 256 chips at $1.20 are $307.20 an hour; 1e6 tokens/s are 3.6e9 an hour: 8.533 cents a million.
    assert usd_per_million_tokens(1e6, 256, price) == pytest.approx(307.20 / 3600)


def test_mpt_7b_bill():
    # MosaicML's own announcement: 1T tokens, 440 A100-40, 9.5 days, about $200k, so $0.20 a million and a
    # price near $2 a GPU hour.
    price = Price(2.0, "a test", "2026-01-01")
    total = cost_usd(9.5 * 86400, 440, price)
    assert total == pytest.approx(200_640)
    assert usd_per_million_tokens(1e12 / (9.5 * 86400), 440, price) == pytest.approx(total / 1e6)


@given(st.floats(1, 1e9), st.integers(1, 10_000), st.floats(0, 100))
def test_cost_per_token_times_tokens_is_the_cost(tokens_per_second, chips, usd):
    price = Price(usd, "a test", "2026-01-01")
    hour = cost_usd(3600, chips, price)
    assert hour == pytest.approx(
        usd_per_million_tokens(tokens_per_second, chips, price) * tokens_per_second * 3600 / 1e6
    )


@pytest.mark.parametrize("usd", [-1.0, math.nan, math.inf])
def test_unusable_price_is_refused(usd):
    with pytest.raises(InputError, match="price of a chip hour"):
        Price(usd, "a test", "2026-01-01")


def test_mfu_of_published_mpt_7b_run():
    # llm-foundry: 7B, sequence 2048, 8 H100: 10,643 tokens/s a GPU is 46.4% MFU, full attention counted.
    # 6N + 12·layers·width·length FLOPs a token, N counted from MPT-7B's 32 layers of width 4096.
    params = 32 * 12 * 4096**2 + 50_432 * 4096
    flops_per_token = 6 * params + 12 * 32 * 4096 * 2048
    assert mfu(8 * 10_643 * flops_per_token, 8, 989.4e12) == pytest.approx(0.464, abs=0.01)


def test_import_leaves_jax_alone():
    code = "import sys, mosaicjax.hardware; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
