"""Products of rows sorted by group with each group's own matrix, whatever the sizes of the groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mosaicjax.errors import InputError

PRODUCT = "product"
"""What a remat policy may call a product with weights."""


class Grouped(Enum):
    """Who multiplies.

    RAGGED_DOT is `jax.lax.ragged_dot`, which runs anywhere; on CPUs and TPUs, and on GPUs unless XLA is told
    otherwise, it multiplies every row with every group's matrix. MEGABLOX is the TPU kernel that ships with
    jax, which multiplies each row once. MEGABLOX_INTERPRETED is that kernel step by step on any device, for
    tests: far too slow for anything else.
    """

    RAGGED_DOT = "ragged_dot"
    MEGABLOX = "megablox"
    MEGABLOX_INTERPRETED = "megablox_interpreted"

    def check(self, platform: str) -> None:
        """Refuse devices that this does not run on.

        Raises:
            InputError: MEGABLOX anywhere but on TPUs.
        """
        if self is Grouped.MEGABLOX and platform != "tpu":
            raise InputError(
                "grouped=MEGABLOX is a TPU kernel",
                expected="TPU devices",
                got=platform,
                fix="grouped=RAGGED_DOT runs anywhere",
            )


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped(x_RK: Array, weight_EKN: Array, sizes_E: Array, how: Grouped) -> Array:
    """Each row times its group's matrix: the first `sizes_E[0]` rows times the first matrix, and so on.

    Shapes: x [R, K], weight [E, K, N], sizes int32 [E] that sum to R; the result is [R, N].
    """
    return checkpoint_name(_forward_product(x_RK, weight_EKN, sizes_E, how), PRODUCT)


def _forward(
    x_RK: Array, weight_EKN: Array, sizes_E: Array, how: Grouped
) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped(x_RK, weight_EKN, sizes_E, how), (x_RK, weight_EKN, sizes_E)


def _backward(how: Grouped, saved: tuple[Array, Array, Array], grad_RN: Array) -> tuple[Array, Array, None]:
    x_RK, weight_EKN, sizes_E = saved
    if how is Grouped.RAGGED_DOT:
        x_grad = jax.lax.ragged_dot(grad_RN, weight_EKN.swapaxes(1, 2), sizes_E)
        contracted = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
        weight_grad = jax.lax.ragged_dot_general(x_RK, grad_RN, sizes_E, contracted)
        return x_grad, weight_grad, None
    x_grad = _megablox(grad_RN, weight_EKN, sizes_E, how, transposed=True)
    return x_grad, _megablox_outer(x_RK, grad_RN, sizes_E, how), None


grouped.defvjp(_forward, _backward)


def _forward_product(x_RK: Array, weight_EKN: Array, sizes_E: Array, how: Grouped) -> Array:
    if how is Grouped.RAGGED_DOT:
        return jax.lax.ragged_dot(x_RK, weight_EKN, sizes_E)
    return _megablox(x_RK, weight_EKN, sizes_E, how, transposed=False)


def _megablox(x_RK: Array, weight: Array, sizes_E: Array, how: Grouped, transposed: bool) -> Array:
    """The kernel's product of rows with matrices, which are [E, N, K] where `transposed`."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    wide = weight.shape[1 if transposed else 2]
    tiles = best_tiles(x_RK.shape[0], x_RK.shape[1], wide, len(sizes_E), x_RK.dtype.itemsize)
    padded, sizes_E = _whole_tiles(x_RK, sizes_E, tiles.rows)
    # The kernel adds numbers of several types, which strict promotion (our tests') refuses.
    with jax.numpy_dtype_promotion("standard"):
        out = gmm(
            padded,
            weight,
            sizes_E,
            x_RK.dtype,
            (tiles.rows, tiles.inner, tiles.outer),
            transpose_rhs=transposed,
            interpret=how is Grouped.MEGABLOX_INTERPRETED,
        )
    return out[: x_RK.shape[0]]


def _megablox_outer(x_RK: Array, grad_RN: Array, sizes_E: Array, how: Grouped) -> Array:
    """The kernel's sum, over each group's rows, of x times grad, [E, K, N]."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    (rows, inner), outer = x_RK.shape, grad_RN.shape[1]
    tiles = best_tiles(rows, inner, outer, len(sizes_E), x_RK.dtype.itemsize, summed_rows=True)
    x_RK, sizes_padded_E = _whole_tiles(x_RK, sizes_E, tiles.rows)
    grad_RN, _ = _whole_tiles(grad_RN, sizes_E, tiles.rows)
    with jax.numpy_dtype_promotion("standard"):
        return tgmm(
            x_RK.swapaxes(0, 1),
            grad_RN,
            sizes_padded_E,
            x_RK.dtype,
            (tiles.rows, tiles.inner, tiles.outer),
            interpret=how is Grouped.MEGABLOX_INTERPRETED,
        )


def _whole_tiles(x_RK: Array, sizes_E: Array, tile: int) -> tuple[Array, Array]:
    """Rows of zeros behind, in the last group, up to whole tiles: the kernel takes no part of one."""
    more = -x_RK.shape[0] % tile
    if not more:
        return x_RK, sizes_E
    return jnp.pad(x_RK, ((0, more), (0, 0))), sizes_E.at[-1].add(more)


@dataclass(frozen=True)
class Tiles:
    """What the kernel multiplies at once: some rows, of the summed dim `inner`, of the other dim `outer`."""

    rows: int
    inner: int
    outer: int


LANES = 128
MAX_ROW_TILES = 4_000
VMEM_BYTES = 11 * 2**20
"""What a kernel's blocks may take; the compiler needs some more, and its limit is 16 MiB on a v5e."""

ROW_TILES = (128, 256, 512)
LARGEST_UNEVEN = 1_024
"""A dim that is no multiple of `LANES` must be one block."""

# Of a TPU v5e, in round numbers: only the proportions matter here.
_FLOPS, _BYTES, _STEP_SECONDS = 2e14, 8e11, 3.5e-7


def best_tiles(
    rows: int, inner: int, outer: int, groups: int, itemsize: int, summed_rows: bool = False
) -> Tiles:
    """The tiles that should take the least time, among those that fit and divide both dims.

    The time is that of the products or of the bytes moved, whichever is longer, and of starting each tile.
    Tiles that do not divide the summed dim gave wrong results in releases of the kernel, and none of its own
    defaults divide all shapes. Beyond some 4,000 tiles of rows the kernel loses count: it numbers them in
    float32. `summed_rows` is for the product that sums over the rows, and has `inner` and `outer` in its
    result.

    Source: maxtext issue 1183, for the wrong results.

    Raises:
        InputError: dims that no tiles divide, or too many rows.
    """
    small = -(-rows // 16) * 16
    heights = [tile for tile in ROW_TILES if tile < small] or [small]
    if small <= ROW_TILES[-1]:
        heights.append(small)
    heights = [tile for tile in set(heights) if -(-rows // tile) <= MAX_ROW_TILES]
    if not heights:
        raise InputError(
            "megablox: rows of one device",
            expected=f"at most {MAX_ROW_TILES * ROW_TILES[-1]:,} (tokens x experts a token)",
            got=f"{rows:,}",
            fix="a smaller microbatch",
        )
    fitting = [
        tiles
        for tiles in (Tiles(*each) for each in product(sorted(heights), _divisors(inner), _divisors(outer)))
        if _vmem(tiles, itemsize, summed_rows) <= VMEM_BYTES
    ]
    if not fitting:
        raise InputError(
            "megablox: no block of these dims fits",
            expected=f"embed and mlp (a tensor shard's) of at most {LARGEST_UNEVEN}, or multiples of {LANES}",
            got=(inner, outer),
            fix="other sizes, or grouped=RAGGED_DOT",
        )
    shape = (rows, inner, outer, groups)
    return min(fitting, key=lambda tiles: _seconds(tiles, shape, itemsize, summed_rows))


def _divisors(size: int) -> list[int]:
    """Blocks that a dim divides into: multiples of `LANES`, or the whole of it."""
    even = [tile for tile in range(LANES, size, LANES) if size % tile == 0]
    return [*even, size] if size % LANES == 0 or size <= LARGEST_UNEVEN else even


def _vmem(tiles: Tiles, itemsize: int, summed_rows: bool) -> int:
    """Units: bytes. Blocks are held twice, to fetch the next ahead; the sum once, in float32."""
    left, right = tiles.rows * tiles.inner, tiles.inner * tiles.outer
    out = tiles.rows * tiles.outer
    if summed_rows:
        # Both operands are masked in float32, and one of them turned.
        return 2 * itemsize * (left + right + out) + 4 * right + 4 * (2 * left + out)
    return 2 * itemsize * (left + right + out) + 4 * out + 4 * out


def _seconds(tiles: Tiles, shape: tuple[int, int, int, int], itemsize: int, summed_rows: bool) -> float:
    rows, inner, outer, groups = shape
    # A group that begins within a tile has the kernel look at that tile once more.
    visits = math.ceil(rows / tiles.rows) + groups - 1
    across, down = outer // tiles.outer, inner // tiles.inner
    left, out = visits * tiles.rows * inner * across, visits * tiles.rows * outer
    if summed_rows:
        moved = left + out * down + groups * inner * outer
    else:
        # A block that stays the same from one step to the next is not fetched again.
        moved = left + out + inner * outer * (groups if down == 1 else visits)
    worked = 2 * visits * tiles.rows * inner * outer / _FLOPS
    return max(worked, moved * itemsize / _BYTES) + visits * across * down * _STEP_SECONDS
