"""Chips: peak FLOP/s, memory, links and price, each number with its source and date."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mosaicjax.errors import InputError

GIB = 2**30

TPU_TABLE = "docs.cloud.google.com/compute, TPU machine types, table of TPU architecture specifications"
V5E_PAGE = "docs.cloud.google.com/tpu/docs/v5e"
V6E_PAGE = "docs.cloud.google.com/tpu/docs/v6e"
V4_PAGE = "docs.cloud.google.com/tpu/docs/v4"
JAX_TPU_INFO = "jax, jax/_src/pallas/mosaic/tpu_info.py"
SCALING_BOOK = "jax-ml.github.io/scaling-book/tpus, table of ICI bandwidths"
A100_SHEET = "NVIDIA A100 Tensor Core GPU data sheet, SXM"
H100_SHEET = "NVIDIA H100 Tensor Core GPU data sheet, SXM; dense, which is half of the sheet's sparse figure"
GCP_LIST = "Google Cloud list price, on demand, as collected by skypilot-catalog v8/gcp/vms.csv @006059e"
AWS_LIST = "AWS price list 20260728175247, EC2 on demand, Linux, us-east-1"


@dataclass(frozen=True)
class Figure:
    """A number about hardware, who states it, and the date it stood there (year-month-day)."""

    value: float
    source: str
    date: str


@dataclass(frozen=True)
class Price:
    """What one chip costs for one hour, who states it, and the date it stood there (year-month-day).

    Raises:
        InputError: a price that is negative or not a number.
    """

    usd_per_chip_hour: float
    source: str
    date: str

    def __post_init__(self) -> None:
        if not (math.isfinite(self.usd_per_chip_hour) and self.usd_per_chip_hour >= 0):
            raise InputError(
                "the price of a chip hour is unusable",
                expected="dollars, zero or more",
                got=self.usd_per_chip_hour,
            )


@dataclass(frozen=True)
class Chip:
    """One accelerator as it is rented, with every number that a plan or an MFU rests on.

    `device_kinds` are the strings that jax reports as `device.device_kind`. A TPU7x chip shows as two jax
    devices: divide by `devices_per_chip` before anything per chip.

    Units:
        peak_flops: dense FLOP/s (operations/s for integers) of one chip, by jax dtype name.
        hbm_bytes: bytes of one chip.
        hbm_bandwidth: bytes/s between one chip's HBM and its cores.
        link_bandwidth: bytes/s of ICI (TPU) or NVLink (GPU), summed over all links of one chip and both
            directions; `link_one_way` gives one link in one direction.
        dcn_bandwidth: bytes/s that one chip's share of its host's network carries between slices.
        price: list price on demand, or None where none could be confirmed.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: Mapping[str, Figure]
    hbm_bytes: Figure | None
    hbm_bandwidth: Figure | None
    link_bandwidth: Figure | None
    links: int
    price: Price | None
    devices_per_chip: int = 1
    dcn_bandwidth: Figure | None = None

    @property
    def link_one_way(self) -> float | None:
        """Bytes/s that one link carries in one direction.

        The vendor's per-chip figure over its links; the scaling book puts v5p and v6e about 10% lower, so a
        prediction should state a range.
        """
        if self.link_bandwidth is None:
            return None
        return self.link_bandwidth.value / self.links / 2

    def peak(self, dtype: str) -> float | None:
        """Peak FLOP/s of one chip at matrix products of this dtype, or None where nobody states it."""
        figure = self.peak_flops.get(dtype)
        return None if figure is None else figure.value

    def chips(self, devices: int) -> float:
        """How many chips this many jax devices are."""
        return devices / self.devices_per_chip


def _tpu_table(value: float) -> Figure:
    return Figure(value, TPU_TABLE, "2026-08-26")


def _read(value: float, source: str) -> Figure:
    return Figure(value, source, "2026-11-23")


def _gcp(usd: float, region: str) -> Price:
    return Price(usd, f"{GCP_LIST}, {region}", "2026-11-23")


def _aws(instance_usd: float, instance: str) -> Price:
    return Price(instance_usd / 8, f"{AWS_LIST}, {instance} at ${instance_usd} over 8 GPUs", "2026-07-28")


TPU_V4 = Chip(
    name="v4",
    device_kinds=("TPU v4",),
    peak_flops={"bfloat16": _read(275e12, V4_PAGE), "int8": _read(275e12, V4_PAGE)},
    hbm_bytes=_read(32 * GIB, V4_PAGE),
    hbm_bandwidth=_read(1200e9, V4_PAGE),
    link_bandwidth=_read(6 * 2 * 45e9, SCALING_BOOK),
    links=6,
    price=_gcp(3.22, "us-central2"),
)

TPU_V5E = Chip(
    name="v5e",
    device_kinds=("TPU v5 lite", "TPU v5e"),
    peak_flops={"bfloat16": _read(197e12, V5E_PAGE), "int8": _read(393e12, V5E_PAGE)},
    hbm_bytes=_read(16 * GIB, f"{V5E_PAGE} (16 GB); {JAX_TPU_INFO} (17.2e9 bytes)"),
    hbm_bandwidth=_read(819e9, V5E_PAGE),
    link_bandwidth=_read(400e9, V5E_PAGE),
    links=4,
    dcn_bandwidth=_read(6.4e12 / 8 / 256, f"{V5E_PAGE}, network bandwidth of a pod over its 256 chips"),
    price=_gcp(1.20, "us-central1"),
)

TPU_V5P = Chip(
    name="v5p",
    device_kinds=("TPU v5", "TPU v5p"),
    peak_flops={
        "bfloat16": _tpu_table(459e12),
        "float8": _tpu_table(459e12),
        "int8": _read(918e12, JAX_TPU_INFO),
    },
    hbm_bytes=_tpu_table(95 * GIB),
    hbm_bandwidth=_tpu_table(2765e9),
    link_bandwidth=_tpu_table(1200e9),
    links=6,
    dcn_bandwidth=_read(50e9 / 8, "docs.cloud.google.com/tpu/docs/v5p-training"),
    price=_gcp(4.20, "us-east5"),
)

TPU_V6E = Chip(
    name="v6e",
    device_kinds=("TPU v6 lite", "TPU v6e"),
    peak_flops={
        "bfloat16": _tpu_table(918e12),
        "float8": _tpu_table(918e12),
        "int8": _read(1836e12, V6E_PAGE),
    },
    hbm_bytes=_tpu_table(32 * GIB),
    hbm_bandwidth=_tpu_table(1638e9),
    link_bandwidth=_tpu_table(800e9),
    links=4,
    dcn_bandwidth=_read(25.6e12 / 8 / 256, f"{V6E_PAGE}, network bandwidth of a pod over its 256 chips"),
    price=_gcp(2.70, "us-central1"),
)

TPU_7X = Chip(
    name="tpu7x",
    device_kinds=("TPU7x",),
    peak_flops={"bfloat16": _tpu_table(2307e12), "float8": _tpu_table(4614e12)},
    hbm_bytes=_tpu_table(192 * GIB),
    hbm_bandwidth=_tpu_table(7380e9),
    link_bandwidth=_tpu_table(1200e9),
    links=6,
    price=None,
    devices_per_chip=2,
)

A100_PEAKS = {
    "bfloat16": _read(312e12, A100_SHEET),
    "float16": _read(312e12, A100_SHEET),
    "int8": _read(624e12, A100_SHEET),
}

A100_40 = Chip(
    name="a100-40",
    device_kinds=("NVIDIA A100-SXM4-40GB",),
    peak_flops=A100_PEAKS,
    hbm_bytes=_read(40e9, A100_SHEET),
    hbm_bandwidth=_read(1555e9, A100_SHEET),
    link_bandwidth=_read(600e9, A100_SHEET),
    links=12,
    price=_aws(21.957642, "p4d.24xlarge"),
)

A100_80 = Chip(
    name="a100-80",
    device_kinds=("NVIDIA A100-SXM4-80GB",),
    peak_flops=A100_PEAKS,
    hbm_bytes=_read(80e9, A100_SHEET),
    hbm_bandwidth=_read(2039e9, A100_SHEET),
    link_bandwidth=_read(600e9, A100_SHEET),
    links=12,
    price=_aws(27.44705, "p4de.24xlarge"),
)

H100 = Chip(
    name="h100",
    device_kinds=("NVIDIA H100 80GB HBM3",),
    peak_flops={
        "bfloat16": _read(989.4e12, H100_SHEET),
        "float16": _read(989.4e12, H100_SHEET),
        "float8": _read(1978.9e12, H100_SHEET),
        "int8": _read(1978.9e12, H100_SHEET),
    },
    hbm_bytes=_read(80e9, H100_SHEET),
    hbm_bandwidth=_read(3350e9, H100_SHEET),
    link_bandwidth=_read(900e9, H100_SHEET),
    links=18,
    price=_aws(55.04, "p5.48xlarge"),
)

CPU = Chip(
    name="cpu",
    device_kinds=("cpu",),
    peak_flops={},
    hbm_bytes=None,
    hbm_bandwidth=None,
    link_bandwidth=None,
    links=0,
    price=None,
)

CHIPS: tuple[Chip, ...] = (TPU_V4, TPU_V5E, TPU_V5P, TPU_V6E, TPU_7X, A100_40, A100_80, H100, CPU)


@dataclass(frozen=True)
class Core:
    """One core of a chip: matrix units of `side` squared, each fed with `rows` of bfloat16 a cycle.

    Units: clock in Hz, VMEM in bytes.
    """

    topology: str
    clock: float
    units: int
    side: int
    rows: int
    cores: int
    vmem: int

    @property
    def macs(self) -> int:
        """Multiply-adds a cycle; times 2, clock and cores it is the chip's published peak."""
        return self.units * self.side**2 * self.rows


CORES = {
    "v4": Core("v4:2x2x1", 1.05e9, 4, 128, 1, 2, 16 * 2**20),
    "v5e": Core("v5e:2x2", 1.5e9, 4, 128, 1, 1, 128 * 2**20),
    "v5p": Core("v5p:2x2x1", 1.75e9, 4, 128, 1, 2, 64 * 2**20),
    # Two rows a cycle: a plain matmul does 213,000 multiply-adds a bundle, and the published peak asks it.
    "v6e": Core("v6e:2x2", 1.75e9, 2, 256, 2, 1, 128 * 2**20),
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip that jax reports as this `device.device_kind`, or None for one we have no numbers of."""
    for chip in CHIPS:
        if device_kind in chip.device_kinds:
            return chip
    return None


def chip_named(name: str) -> Chip:
    """The chip with this short name (`v5e`, `h100`, ...), as a person types it.

    Raises:
        InputError: no chip has that name.
    """
    for chip in CHIPS:
        if chip.name == name:
            return chip
    raise InputError("unknown chip", expected=", ".join(chip.name for chip in CHIPS), got=name)


def cost_usd(seconds: float, chips: float, price: Price) -> float:
    """What it costs to hold this many chips for this long.

    Units: dollars.
    """
    return seconds / 3600 * chips * price.usd_per_chip_hour


def usd_per_million_tokens(tokens_per_second: float, chips: float, price: Price) -> float:
    """What a million tokens cost at this rate of all chips together.

    Units: dollars per 1e6 tokens.
    """
    return cost_usd(1e6 / tokens_per_second, chips, price)


def mfu(model_flops_per_second: float, chips: float, peak_flops: float) -> float:
    """Model FLOPs utilization: the share of the chips' peak that the model's own FLOPs used.

    Which attention FLOPs are counted (causal or full) is the caller's to say beside the number.
    """
    return model_flops_per_second / (chips * peak_flops)
