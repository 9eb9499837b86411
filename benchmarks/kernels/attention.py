"""Attention kernels side by side, from the TPU compiler's own schedules: no TPU is needed, libtpu is.

    python benchmarks/kernels/attention.py                # the table, the checks, attention.json
    python benchmarks/kernels/attention.py --only table --chips v5e

For ours, jax's splash and jax's flash on the same shapes: time, the larger of bundles (loops times turns, of
the blocks that are visited) over the clock and HBM bytes over bandwidth; the useful share of the matrix
units, counting unmasked multiply-adds of the 2 matmuls of a forward and the 5 of a backward pass, first of
the published peak and then of one row a cycle into each unit (v6e's peak is two; figures published for splash
on it, .42 and .65, count one); spills, VMEM and temporary HBM (the peers' is that of the forward and backward
pass together). The peers run with the best of several block sizes, whose figures are in the JSON; a splash
backward's sum over its copies of dq is outside its kernel and stands beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402 after the path, for a call as a script
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402
from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash  # noqa: E402
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as jax_splash  # noqa: E402
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask  # noqa: E402

from benchmarks.kernels.bundles import (  # noqa: E402
    Compiled,
    Compiler,
    Counts,
    Kernel,
    cycles,
    provenance,
    seconds,
    useful_share,
)
from mosaicjax.hardware import CORES, chip_named  # noqa: E402
from mosaicjax.kernels import flash_tpu  # noqa: E402
from mosaicjax.kernels.attention_blocks import Bounds, Operands, Problem, bounds  # noqa: E402
from mosaicjax.kernels.attention_tiles import tilings  # noqa: E402
from mosaicjax.kernels.flash_attention import flash_attention  # noqa: E402
from mosaicjax.kernels.flash_tpu import Call, Tiling  # noqa: E402

RESULT = Path(__file__).with_suffix(".json")
HERE = "benchmarks.kernels.attention"
PASSES = ("forward", "backward")
MATMULS = {"forward": 2, "backward": 5}
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One attention to compile; names as in `flash_attention`. All JSON."""

    queries: int
    keys: int
    head_dim: int
    value_dim: int = 0
    heads: int = 8
    kv_heads: int = 8
    batch: int = 1
    dtype: str = "bfloat16"
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    slopes_grad: bool = False
    segments: bool = False
    sinks: bool = False

    @property
    def values(self) -> int:
        """The width of a value."""
        return self.value_dim or self.head_dim

    @property
    def problem(self) -> Problem:
        """As the kernels know it."""
        scale = self.head_dim**-0.5
        return Problem(
            self.causal, self.window, scale, self.softcap, self.queries, self.keys, self.slopes_grad
        )

    def operands(self, queries: int = 0, keys: int = 0) -> Operands:
        """Shapes alone, of these lengths or the case's own."""
        queries, keys = queries or self.queries, keys or self.keys
        B, H, K = self.batch, self.heads, self.kv_heads

        def array(*shape: int, dtype: Any = self.dtype) -> Any:
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

        return Operands(
            q=array(B, H, queries, self.head_dim),
            k=array(B, K, keys, self.head_dim),
            v=array(B, K, keys, self.values),
            offset=array(1, dtype="int32"),
            slopes=array(H, dtype="float32") if self.alibi else None,
            sinks=array(H, dtype="float32") if self.sinks else None,
            q_segments=array(B, queries, dtype="int32") if self.segments else None,
            k_segments=array(B, keys, dtype="int32") if self.segments else None,
            known=0,
        )

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, over batch and heads; segments are not looked at."""
        query = np.arange(self.queries)
        last = np.minimum(query, self.keys - 1) if self.causal else np.full(self.queries, self.keys - 1)
        if self.window and not self.causal:
            last = np.minimum(last, query + self.window - 1)
        first = np.maximum(query - self.window + 1, 0) if self.window else np.zeros_like(query)
        return int(np.maximum(last - first + 1, 0).sum()) * self.batch * self.heads

    def multiply_adds(self, which: str) -> int:
        """Unmasked multiply-adds of a pass's matmuls."""
        C, V = self.head_dim, self.values
        return self.pairs * (C + V if which == "forward" else 3 * C + 2 * V)


def ours(which: str, case: dict[str, Any], tiling: list[int]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Our kernel of one pass, for `Compiler`."""
    this = Case(**case)
    call, x = Call(this.problem, Tiling(*tiling)), this.operands()
    if which == "forward":
        return lambda x: flash_tpu.forward(call, x), (x,)
    grad = jax.ShapeDtypeStruct((*x.q.shape[:3], this.values), x.q.dtype)
    line = jax.ShapeDtypeStruct(x.q.shape[:3], jnp.float32)
    return lambda *arrays: flash_tpu.backward(call, *arrays), (x, grad, line, line)


def ours_whole(case: dict[str, Any], kind: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The public function and its gradients, with the blocks of the table."""
    this = Case(**case)
    B, H, K = this.batch, this.heads, this.kv_heads

    def array(length: int, heads: int, width: int) -> Any:
        return jax.ShapeDtypeStruct((B, length, heads, width), jnp.dtype(this.dtype))

    def gradients(q: Any, k: Any, v: Any, grad: Any) -> Any:
        def attend(q: Any, k: Any, v: Any) -> Any:
            return flash_attention(
                q,
                k,
                v,
                causal=this.causal,
                window=this.window,
                softcap=this.softcap,
                implementation="pallas_tpu",
                chip=kind,
            )

        return jax.vjp(attend, q, k, v)[1](grad)

    C, V = this.head_dim, this.values
    return gradients, (
        array(this.queries, H, C),
        array(this.keys, K, C),
        array(this.keys, K, V),
        array(this.queries, H, V),
    )


def splash(
    case: dict[str, Any], blocks: list[int], backward_blocks: list[int] | None = None
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Jax's splash attention and its fused gradients: blocks of queries, keys, and keys at once."""
    this = Case(**case)
    bq, bkv, compute = blocks
    bq_back, bkv_back, compute_back = backward_blocks or blocks
    sizes = jax_splash.BlockSizes(
        block_q=bq,
        block_kv=bkv,
        block_kv_compute=compute,
        block_q_dkv=bq_back,
        block_kv_dkv=bkv_back,
        block_kv_dkv_compute=compute_back,
        use_fused_bwd_kernel=True,
    )
    mask = splash_mask.CausalMask((this.queries, this.keys))
    kernel = jax_splash.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([mask] * this.heads), block_sizes=sizes
    )
    q = jax.ShapeDtypeStruct((this.heads, this.queries, this.head_dim), jnp.dtype(this.dtype))
    k = jax.ShapeDtypeStruct((this.kv_heads, this.keys, this.head_dim), jnp.dtype(this.dtype))

    def gradients(q: Any, k: Any, v: Any, grad: Any) -> Any:
        return jax.vjp(kernel, q, k, v)[1](grad)

    return gradients, (q, k, k, q)


def flash(case: dict[str, Any], blocks: list[int]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Jax's older flash attention and its gradients: blocks of queries, keys, and keys at once."""
    this = Case(**case)
    bq, bkv, compute = blocks
    sizes = jax_flash.BlockSizes(
        block_q=bq,
        block_k_major=bkv,
        block_k=compute,
        block_b=1,
        block_q_major_dkv=bq,
        block_k_major_dkv=bkv,
        block_k_dkv=compute,
        block_q_dkv=bq,
        block_k_major_dq=bkv,
        block_k_dq=compute,
        block_q_dq=bq,
    )
    dtype = jnp.dtype(this.dtype)
    q = jax.ShapeDtypeStruct((this.batch, this.heads, this.queries, this.head_dim), dtype)
    k = jax.ShapeDtypeStruct((this.batch, this.heads, this.keys, this.head_dim), dtype)

    def gradients(q: Any, k: Any, v: Any, grad: Any) -> Any:
        def attend(q: Any, k: Any, v: Any) -> Any:
            return jax_flash.flash_attention(q, k, v, causal=this.causal, block_sizes=sizes)

        return jax.vjp(attend, q, k, v)[1](grad)

    return gradients, (q, k, k, q)


def matmul(size: int, block: int, loop: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A product of square matrices whose summed dim is one of the grid's, or a loop within a step."""
    grid = (size // block,) * 2
    out = jax.ShapeDtypeStruct((size, size), jnp.float32)
    whole = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    scratch = [pltpu.VMEM((block, block), jnp.float32)]
    params = pltpu.CompilerParams(vmem_limit_bytes=64 * MIB)

    def gridded(x_ref: Any, w_ref: Any, o_ref: Any, acc_ref: Any) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            acc_ref[...] = jnp.zeros_like(acc_ref)

        acc_ref[...] += jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == size // block - 1)
        def _() -> None:
            o_ref[...] = acc_ref[...]

    def looped(turns_ref: Any, x_ref: Any, w_ref: Any, o_ref: Any, acc_ref: Any) -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

        def turn(t: Any, state: int) -> int:
            inner = pl.ds(pl.multiple_of(t * block, block), block)
            acc_ref[...] += jnp.dot(x_ref[:, inner], w_ref[inner, :], preferred_element_type=jnp.float32)
            return state

        jax.lax.fori_loop(0, turns_ref[0], turn, 0)
        o_ref[...] = acc_ref[...]

    if loop:
        spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((block, size), lambda i, j, *_: (i, 0)),
                pl.BlockSpec((size, block), lambda i, j, *_: (0, j)),
            ],
            out_specs=pl.BlockSpec((block, block), lambda i, j, *_: (i, j)),
            scratch_shapes=scratch,
        )
        call = pl.pallas_call(looped, grid_spec=spec, out_shape=out, compiler_params=params, name="matmul")
        return call, (jax.ShapeDtypeStruct((1,), jnp.int32), whole, whole)
    call = pl.pallas_call(
        gridded,
        grid=(*grid, size // block),
        in_specs=[
            pl.BlockSpec((block, block), lambda i, j, t: (i, t)),
            pl.BlockSpec((block, block), lambda i, j, t: (t, j)),
        ],
        out_specs=pl.BlockSpec((block, block), lambda i, j, t: (i, j)),
        scratch_shapes=scratch,
        out_shape=out,
        compiler_params=params,
        name="matmul",
    )
    return call, (whole, whole)


@dataclass(frozen=True)
class Work:
    """What one call of a kernel does: how often its parts run, and the bytes of HBM it moves."""

    counts: Counts
    hbm_bytes: int


def our_work(which: str, case: Case, tiling: Tiling) -> list[Work]:
    """Of our forward kernel, or of the backward's, one for each chunk of keys that any query sees."""
    call = Call(case.problem, tiling.fitted(case.queries, case.keys))
    tiling = call.tiling
    queries = -(-case.queries // tiling.queries) * tiling.queries
    keys = -(-case.keys // tiling.resident) * tiling.resident
    x = replace(case, segments=False).operands(queries, keys)
    blocks = bounds(case.problem, (tiling.queries, tiling.keys), x)
    masks = case.problem.masks(case.segments, tiling.keys)
    count, chunks, BH = tiling.resident // tiling.keys, keys // tiling.resident, case.batch * case.heads

    def turns(static: np.ndarray) -> tuple[float, ...]:
        begin, whole_begin, whole_end, end = static
        whole, seen = int(np.sum(whole_end - whole_begin)) * BH, int(np.sum(end - begin)) * BH
        return (whole, seen - whole) if masks else (whole,)

    if which == "forward":
        rows = BH * queries // tiling.queries
        counts = Counts(steps=rows * chunks, rows=rows, turns=turns(blocks.static))
        return [Work(counts, flash_tpu.forward_cost(call, blocks, x).bytes_accessed)]
    found = []
    for chunk in range(chunks):
        first, last = chunk * count, (chunk + 1) * count
        begin, end = blocks.queries_of(first, last)
        if begin == end:
            continue
        if chunks == 1:
            begin, end = 0, queries // tiling.queries
        static = np.clip(blocks.static[:, begin:end], first, last)
        counts = Counts((end - begin) * BH, rows=case.batch * case.kv_heads, turns=turns(static))
        found.append(Work(counts, flash_tpu.backward_cost(call, blocks, x, chunk).bytes_accessed))
    return found


def peer_work(which: str, case: Case, blocks: tuple[int, ...], who: str) -> Work:
    """Of a peer's kernel: `which` is forward, dkv or dq, and blocks are of queries and of keys."""
    bq, bk = blocks[:2]
    nq, nk, BH = case.queries // bq, case.keys // bk, case.batch * case.heads
    active = sum(min(nk, ((i + 1) * bq - 1) // bk + 1) for i in range(nq)) * BH
    size, width = jnp.dtype(case.dtype).itemsize, case.head_dim
    query, key = size * bq * width, size * bk * width
    if which == "forward" or which == "dq":
        moved = (2 if which == "forward" else 3) * nq * BH * query + active * 2 * key
        rows = nq * BH
    else:
        moved = active * 2 * query + nk * BH * 4 * key
        # The fused kernel writes a copy of dq for each block of keys, unseen ones too.
        moved += nk * nq * BH * query if who == "splash" else 0
        rows = nk * BH
    return Work(Counts(steps=nq * nk * BH, visits=active, rows=rows), moved)


@dataclass(frozen=True)
class Row:
    """A line of the table. Units: microseconds, MiB."""

    chip: str
    who: str
    which: str
    blocks: tuple[int, ...]
    us: float = 0.0
    share: float = 0.0
    share_of_one_row: float = 0.0
    bundles: float = 0.0
    hbm_us: float = 0.0
    spills: int = 0
    vmem: float = 0.0
    temp: float = 0.0
    after_us: float = 0.0
    error: str = ""

    def text(self) -> str:
        """For the table."""
        blocks = ",".join(map(str, self.blocks))
        head = f"{self.chip:4} {self.who:8} {self.which:9} {blocks:24}"
        if self.error:
            return f"{head} {self.error[:100]}"
        after = f" + {self.after_us:.0f} us after" if self.after_us else ""
        shares = f"{self.share:6.3f} {self.share_of_one_row:6.3f}"
        figures = f"{self.us:8.0f} {shares} {self.spills:7} {self.vmem:6.1f} {self.temp:9.2f}"
        return f"{head} {figures}{after}"


HEADER = (
    f"{'chip':4} {'who':8} {'pass':9} {'blocks':24} {'us':>8} {'share':>6} {'1 row':>6} {'spills':>7}"
    f" {'VMEM':>6} {'temp MiB':>9}"
)


def measured(
    chip: str,
    who: str,
    which: str,
    case: Case,
    blocks: tuple[int, ...],
    found: Compiled,
    parts: list[tuple[Kernel, Work]],
) -> Row:
    """The line of one pass from its kernels and what each does."""
    issued = sum(cycles(chip, kernel, work.counts) for kernel, work in parts)
    moved = sum(work.hbm_bytes for _, work in parts)
    bandwidth = chip_named(chip).hbm_bandwidth
    assert bandwidth is not None
    share = useful_share(chip, case.multiply_adds(which), issued)
    return Row(
        chip,
        who,
        which,
        blocks,
        us=1e6 * sum(seconds(chip, cycles(chip, k, work.counts), work.hbm_bytes) for k, work in parts),
        share=share,
        share_of_one_row=share * CORES[chip].rows,
        bundles=issued,
        hbm_us=1e6 * moved / bandwidth.value,
        spills=sum(kernel.spills for kernel, _ in parts),
        vmem=max(kernel.vmem for kernel, _ in parts) / MIB,
        temp=found.temp / MIB,
    )


def in_order(kernels: list[Kernel]) -> list[Kernel]:
    """By the number that the compiler gave each."""
    return sorted(kernels, key=lambda kernel: int("0" + kernel.name.rpartition(".")[2].strip("x")))


def our_row(compiler: Compiler, chip: str, which: str, case: Case, tiling: Tiling) -> Row:
    """Compile one pass of ours and read what it takes."""
    blocks = (tiling.queries, tiling.keys, tiling.resident, tiling.vmem, tiling.strip)
    found = compiler(chip, f"{HERE}:ours", which=which, case=asdict(case), tiling=list(blocks))
    shown = (tiling.queries, tiling.keys, tiling.resident, tiling.strip)
    if found.error:
        return Row(chip, "ours", which, shown, error=found.error)
    work = our_work(which, case, tiling)
    kernels = in_order(found.named(f"flash_attention_{which}"))
    return measured(chip, "ours", which, case, shown, found, list(zip(kernels, work, strict=True)))


def peer_rows(compiler: Compiler, chip: str, who: str, case: Case, blocks: tuple[int, ...]) -> list[Row]:
    """Compile a peer's forward and backward and read both."""
    found = compiler(chip, f"{HERE}:{who}", case=asdict(case), blocks=list(blocks))
    if found.error:
        return [Row(chip, who, which, blocks, error=found.error) for which in PASSES]
    backs = ["dkv"] if who == "splash" else ["dkv", "dq"]
    # XLA's own fusions multiply nothing here.
    rest = [kernel for kernel in found.kernels if kernel.tree.multiplies]
    parts: dict[str, list[tuple[Kernel, Work]]] = {}
    for which in [*backs, "forward"]:
        kernel = next(k for k in rest if which in k.name or which == "forward")
        rest.remove(kernel)
        pair = (kernel, peer_work(which, case, blocks, who))
        parts.setdefault("forward" if which == "forward" else "backward", []).append(pair)
    rows = [measured(chip, who, which, case, blocks, found, parts[which]) for which in PASSES]
    if who == "splash":
        copies = case.keys // blocks[1] * case.heads * case.queries * case.head_dim * 2
        bandwidth = chip_named(chip).hbm_bandwidth
        assert bandwidth is not None
        rows[1] = replace(rows[1], after_us=1e6 * copies / bandwidth.value)
    return rows


SHAPE = Case(4_096, 4_096, 128)
SPLASH_BLOCKS = (
    (512, 512, 512),
    (512, 1_024, 512),
    (1_024, 512, 512),
    (1_024, 1_024, 256),
    (1_024, 1_024, 512),
    (1_024, 2_048, 512),
    (2_048, 1_024, 512),
    (1_024, 1_024, 1_024),
)
FLASH_BLOCKS = ((512, 512, 512), (512, 1_024, 512), (1_024, 1_024, 512), (1_024, 1_024, 1_024))


def table(compiler: Compiler, chips: list[str]) -> dict[str, Any]:
    """Ours with the table's blocks and the peers with their best, on the same shape."""
    print(HEADER)
    best: list[Row] = []
    search: list[Row] = []
    for chip in chips:
        chosen = tilings(chip, jnp.bfloat16, SHAPE.head_dim, SHAPE.values, SHAPE.keys, 0)
        for which, tiling in zip(PASSES, chosen, strict=True):
            best.append(our_row(compiler, chip, which, SHAPE, tiling))
            print(best[-1].text(), flush=True)
        for who, several in (("splash", SPLASH_BLOCKS), ("flash", FLASH_BLOCKS)):
            tried = [row for blocks in several for row in peer_rows(compiler, chip, who, SHAPE, blocks)]
            search += tried
            for which in PASSES:
                best.append(
                    min(
                        (row for row in tried if row.which == which and not row.error),
                        key=lambda row: row.us + row.after_us,
                    )
                )
                print(best[-1].text(), flush=True)
    return {
        "shape": asdict(SHAPE),
        "best": [asdict(row) for row in best],
        "search": [asdict(row) for row in search],
    }


def counting(compiler: Compiler, chips: list[str]) -> dict[str, Any]:
    """The same product as a grid and as a loop: bundles counted either way, which must agree within 10%."""
    found = {}
    size, block = 2_048, 512
    blocks = size // block
    for chip in chips:
        gridded = compiler(chip, f"{HERE}:matmul", size=size, block=block, loop=False)
        looped = compiler(chip, f"{HERE}:matmul", size=size, block=block, loop=True)
        if gridded.error or looped.error:
            raise SystemExit(gridded.error or looped.error)
        as_grid = cycles(
            chip, gridded.named("matmul")[0], Counts(steps=blocks**3, visits=blocks**3, rows=blocks**2)
        )
        as_loop = cycles(
            chip, looped.named("matmul")[0], Counts(steps=blocks**2, rows=blocks**2, turns=(blocks**3,))
        )
        share = useful_share(chip, size**3, as_grid)
        found[chip] = {"grid": as_grid, "loop": as_loop, "ratio": as_loop / as_grid, "share": share}
        print(
            f"{chip} matmul {size}: {as_grid:.0f} bundles as a grid ({share:.3f} of the matrix units),"
            f" {as_loop:.0f} as a loop, ratio {as_loop / as_grid:.3f}",
            flush=True,
        )
        if not 0.9 < as_loop / as_grid < 1.1:
            raise SystemExit(f"{chip}: the counting disagrees with itself by more than 10%")
    return found


def alibi(compiler: Compiler, chips: list[str]) -> dict[str, Any]:
    """ALiBi against none, same blocks."""
    found: dict[str, Any] = {}
    for chip in chips:
        chosen = tilings(chip, jnp.bfloat16, SHAPE.head_dim, SHAPE.values, SHAPE.keys, 0)
        for which, tiling in zip(PASSES, chosen, strict=True):
            kinds = {
                "none": SHAPE,
                "alibi": replace(SHAPE, alibi=True),
                "alibi and its slopes' gradient": replace(SHAPE, alibi=True, slopes_grad=True),
            }
            if which == "forward":
                kinds.popitem()
            rows = {name: our_row(compiler, chip, which, case, tiling) for name, case in kinds.items()}
            ratios = {name: row.error or row.us / rows["none"].us for name, row in rows.items()}
            found[f"{chip} {which}"] = {"us": {name: row.us for name, row in rows.items()}, "ratio": ratios}
            text = ", ".join(
                f"{name} {ratio if isinstance(ratio, str) else format(ratio, '.3f')}"
                for name, ratio in ratios.items()
            )
            print(f"{chip} {which}: {text}", flush=True)
    return found


def packed(chips: list[str], length: int = 8_192, documents: int = 8) -> dict[str, Any]:
    """Blocks that a row of equal documents visits, against a causal row, from its segment ids."""
    found: dict[str, Any] = {}
    case = replace(SHAPE, queries=length, keys=length)
    segments = jnp.asarray(np.repeat(np.arange(1, documents + 1), length // documents)[None], jnp.int32)
    for chip in chips:
        chosen = tilings(chip, jnp.bfloat16, case.head_dim, case.values, case.keys, 0)
        for which, tiling in zip(PASSES, chosen, strict=True):
            tiling = tiling.fitted(length, length)
            x = case.operands()

            def visited(blocks: Bounds) -> int:
                return int(jnp.sum(blocks.array[:, 3] - blocks.array[:, 0]))

            at = (tiling.queries, tiling.keys)
            causal = visited(bounds(case.problem, at, x))
            some = visited(bounds(case.problem, at, replace(x, q_segments=segments, k_segments=segments)))
            found[f"{chip} {which}"] = {
                "blocks": at,
                "causal": causal,
                "packed": some,
                "ratio": some / causal,
            }
            print(f"{chip} {which} {at}: {some} blocks of {causal}, {some / causal:.3f}", flush=True)
    return found


def memory(compiler: Compiler, chips: list[str], length: int = 32_768) -> dict[str, Any]:
    """Temporary HBM of attention with its gradients, ours against splash with its fused backward."""
    found: dict[str, Any] = {}
    case = replace(SHAPE, queries=length, keys=length)
    for chip in chips:
        whole = compiler(chip, f"{HERE}:ours_whole", case=asdict(case), kind=chip)
        theirs = {
            str(blocks): compiler(chip, f"{HERE}:splash", case=asdict(case), blocks=list(blocks))
            for blocks in ((1_024, 1_024, 512), (1_024, 2_048, 512))
        }
        for each in (whole, *theirs.values()):
            if each.error:
                print(f"{chip}: {each.error}")
        least = min(each.temp for each in theirs.values() if not each.error)
        found[chip] = {
            "ours_mib": whole.temp / MIB,
            "splash_mib": {name: each.error or each.temp / MIB for name, each in theirs.items()},
            "ratio": whole.temp / least,
        }
        print(
            f"{chip} {length}: ours {whole.temp / MIB:.0f} MiB, splash {least / MIB:.0f} MiB,"
            f" ratio {whole.temp / least:.3f}",
            flush=True,
        )
    return found


PARTS = ("counting", "table", "alibi", "packed", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="one part, or several")
    parser.add_argument("--chips", nargs="+", choices=list(CORES), default=["v5e", "v6e"])
    options = parser.parse_args()
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    made = provenance()
    with Compiler() as compiler:
        for part in options.only or PARTS:
            print(f"# {part}", flush=True)
            if part == "packed":
                found = packed(options.chips)
            else:
                found = globals()[part](compiler, options.chips)
            results[part] = {**found, "made": made}
            RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
