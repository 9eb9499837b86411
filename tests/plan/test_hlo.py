"""Reading compiled programs: a small one written by hand, and what XLA makes of loops and products here."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.plan import count, hlo

# As a TPU's program looks: tiles and memories in layouts, comments in tuples, a loop whose condition alone
# says how often, a slice of stacked weights within a fusion, a gather that goes on beside a product.
PROGRAM = Path(__file__).with_name("step.hlo").read_text()

ROW = 16 * 128 * 2
SLICE = 8 * 128 * 2


def by_name(text):
    return {op.name: op for op in count.operations(hlo.read(text))}


def test_a_program_by_hand():
    ops = by_name(PROGRAM)
    assert {op.times for name, op in ops.items() if name in ("sliced", "going", "next")} == {4}
    assert ops["kernel"].times == ops["reduced"].times == 1
    # 16 x 128 x 16 multiply-adds, twice.
    assert ops["going"].flops == 2 * 2 * 16 * 128 * 16
    assert (ops["going"].cycles, ops["going"].modelled) == (700, True)
    assert not ops["next"].modelled
    # One of four layers is read, into VMEM, and its number.
    assert ops["sliced"].hbm == SLICE + 4
    # The gathered matrix is written where the gather begins, and counted there alone.
    assert ops["start"].hbm == 128 * 128 * 2
    # x is read and y written; what passes through is not.
    assert ops["going"].hbm == 2 * ROW
    assert (ops["kernel"].flops, ops["kernel"].kernel, ops["kernel"].hbm) == (4_096, True, 2 * ROW)
    assert ops["kernel"].place == "jit(step)/gradients/attend"
    assert count.total(list(ops.values()), "flops") == 4 * 2 * 2 * 16 * 128 * 16 + 4_096


def test_lines_that_a_kernels_metadata_breaks_are_one():
    whole = by_name(PROGRAM)
    line = next(line for line in PROGRAM.splitlines() if line.startswith("  %kernel ="))
    broken = line.replace(
        ", metadata=",
        ', frontend_attributes={kernel_metadata={\n"block": "{\\"q\\": 512}"\n\n}}, metadata=',
        1,
    )
    assert broken != line
    assert by_name(PROGRAM.replace(line, broken)) == whole


def test_computations_of_another_core_of_the_chip_end_with_its_name():
    named = PROGRAM.replace("\n}\n", '\n}, execution_thread="sparsecore"\n')
    assert named.count("sparsecore") > 2 and by_name(named) == by_name(PROGRAM)


def test_collectives_of_a_program_by_hand():
    ops = by_name(PROGRAM)
    (gather,), (reduced,) = ops["start"].collectives, ops["reduced"].collectives
    assert (gather.kind, gather.group, gather.overlapped) == ("all-gather", tuple(range(16)), True)
    assert (gather.whole, gather.sent) == (16 * SLICE, 15 * SLICE)
    # Of 32 devices in a grid of 16 x 2, turned over: the even ones.
    assert (reduced.kind, reduced.group, reduced.overlapped) == ("all-reduce", tuple(range(0, 32, 2)), False)
    assert reduced.sent == 2 * ROW * 15 / 16
    assert [name for name, op in ops.items() if op.collectives] == ["start", "reduced"]
    assert count.sent(list(ops.values())) == 4 * 15 * SLICE + 2 * ROW * 15 / 16


def test_an_all_reduce_of_which_shards_are_kept_is_a_reduce_scatter():
    config = (
        ', backend_config={"collective_algorithm_config":{"emitter":"SingleInputAllReduceScatterFusion"}}'
    )
    reduced = by_name(PROGRAM.replace("to_apply=%adding", f"to_apply=%adding{config}"))["reduced"]
    (one,) = reduced.collectives
    assert (one.kind, one.sent) == ("reduce-scatter", ROW * 15 / 16)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups={{0,3},{1,2}}, use", (0, 3)),
        ("replica_groups=[4,2]<=[8], dim", (0, 1)),
        ("replica_groups=[2,4]<=[2,2,2]T(2,0,1), dim", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=3,'c'=2] {'a','c'}", (0, 1, 6, 7)),
        ("replica_groups=mesh['a'=16] {'a':(2)4}", (0, 2, 4, 6)),
        ("replica_groups={}", ()),
    ],
)
def test_groups(groups, expected):
    assert count.first_group(f" {groups}") == expected


def test_memory_is_counted_in_whole_tiles():
    def leaf(text):
        return hlo.read(f"ENTRY %m (p: f32[]) -> f32[] {{\n  ROOT %p = {text} parameter(0)\n}}\n")

    def size(text):
        return hlo.hbm_bytes(leaf(text).computations["m"].root.shape)

    # 16 numbers in the minor dim fill a lane of 128; with the other dim minor they are 2 rows of 8.
    assert size("f32[50432,16]{1,0:T(8,128)}") == 50_432 * 128 * 4
    assert size("f32[50432,16]{0,1:T(8,128)}") == 50_432 * 16 * 4
    assert size("bf16[3,5,100]{2,1,0:T(8,128)(2,1)}") == 3 * 8 * 128 * 2
    assert size("(f32[8]{0:T(128)}, /*index=1*/(pred[4]{0:T(512)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}))") == (
        4 * 128 + 512
    )
    assert size("f8e4m3fn[100]{0}") == 100 and size("s4[100]{0}") == 50


FUSED = """
%fused (f: s32[]) -> s32[] {
  %f = s32[]{:T(128)} parameter(0)
  %more = s32[]{:T(128)} constant(STEP)
  %half = s32[]{:T(128)} add(%f, %more)
  ROOT %all = s32[]{:T(128)} add(%more, %half)
}

%body ("""


@pytest.mark.parametrize(("step", "turns"), [(1, 4), (2, 2), (3, 2), (4, 1), (9, 1)])
def test_turns_of_a_loop_that_counts_by_more_than_one(step, turns):
    # So do collective matmuls: XLA unrolls their loops in pairs of chunks.
    text = PROGRAM.replace("%one = s32[]{:T(128)} constant(1)", f"%one = s32[]{{:T(128)}} constant({step})")
    assert by_name(text)["going"].times == turns
    # The sum may stand in a fusion, and be made of several.
    fused = PROGRAM.replace("\n%body (", FUSED.replace("STEP", str(step)), 1)
    fused = fused.replace("add(%i, %one)", "fusion(%i), kind=kLoop, calls=%fused")
    assert by_name(fused)["going"].times == -(-4 // (2 * step))


@pytest.mark.parametrize("made", ["add(%i, %i)", "multiply(%i, %one)", "add(%one, %one)"])
def test_a_loop_that_counts_otherwise_is_refused(made):
    with pytest.raises(InputError, match="the loop loop in the compiled program has no known number"):
        by_name(PROGRAM.replace("add(%i, %one)", made))


def test_a_loop_without_a_known_end_is_refused():
    text = PROGRAM.replace("compare(%j, %bound)", "compare(%j, %j)")
    with pytest.raises(
        InputError, match="the loop loop in the compiled program has no known number of turns"
    ):
        by_name(text)
    with pytest.raises(ValueError, match="no compiled program"):
        hlo.read("HloModule nothing\n")


@given(
    out=st.integers(1, 9),
    entries=st.integers(1, 9),
    size=st.integers(1, 9),
    stride=st.integers(1, 4),
    low=st.integers(-3, 8),
    spread=st.integers(1, 4),
    wide=st.integers(1, 3),
)
def test_taps_are_those_of_a_convolution_done_by_hand(out, entries, size, stride, low, spread, wide):
    given_line = [0] * low if low > 0 else []
    for n in range(entries):
        given_line += [1] + ([0] * (spread - 1) if n < entries - 1 else [])
    given_line = given_line[-low:] if low < 0 else given_line
    expected = sum(
        given_line[o * stride + t * wide] if o * stride + t * wide < len(given_line) else 0
        for o in range(out)
        for t in range(size)
    )
    window = {"size": (size,), "stride": (stride,), "pad": (low, 0), "lhs_dilate": (spread,)}
    assert count._taps(out, entries, window | {"rhs_dilate": (wide,)}) == expected


@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 40),
    inner=st.integers(1, 40),
    columns=st.integers(1, 40),
    turns=st.integers(1, 5),
)
def test_products_in_loops_that_xla_compiled(batch, rows, inner, columns, turns):
    def run(a, b):
        def turn(carry, _):
            return jnp.tanh(jnp.einsum("zrc,zic->zri", jnp.einsum("zri,zic->zrc", carry, b), b)), None

        return jax.lax.scan(turn, a, None, length=turns)[0]

    shapes = [jax.ShapeDtypeStruct((batch, *s), jnp.float32) for s in ((rows, inner), (inner, columns))]
    text = jax.jit(run).lower(*shapes).compile().as_text()
    counted = count.total(count.operations(hlo.read(text)), "flops")
    # A product with a dim of 1 may become a multiplication of entries, which is no product of matrices.
    if min(rows, inner, columns) > 1:
        assert counted == 2 * 2 * batch * rows * inner * columns * turns
    else:
        assert counted <= 2 * 2 * batch * rows * inner * columns * turns


@pytest.mark.parametrize(
    "written", ["convolution(%a, %b), dim_labels=bf_io->bf", "dot(%a, %b), lhs_contracting_dims={1}"]
)
@pytest.mark.parametrize(
    ("left", "right", "kind"),
    [
        ("s8", "s8", "int8"),
        ("u8", "s8", "int8"),
        ("f8e4m3fn", "f8e5m2", "float8"),
        ("s8", "bf16", ""),
        ("s8", "f8e5m2", ""),
        ("bf16", "bf16", ""),
    ],
)
def test_products_are_of_8_bits_where_both_operands_are(left, right, kind, written):
    """Within a fusion; compilers for TPUs write a product as a convolution."""
    module = hlo.read(f"""
fused (a: {left}[16,32], b: {right}[32,64]) -> f32[16,64] {{
  %a = {left}[16,32]{{1,0}} parameter(0)
  %b = {right}[32,64]{{1,0}} parameter(1)
  ROOT %product = f32[16,64]{{1,0}} {written}
}}

ENTRY main (x: {left}[16,32], y: {right}[32,64]) -> f32[16,64] {{
  %x = {left}[16,32]{{1,0}} parameter(0)
  %y = {right}[32,64]{{1,0}} parameter(1)
  ROOT %out = f32[16,64]{{1,0}} fusion(%x, %y), kind=kOutput, calls=%fused
}}
""")
    (product,) = (op for op in count.operations(module) if op.flops)
    flops = 2 * 16 * 32 * 64
    assert (product.flops, product.narrow) == (flops, {kind: flops} if kind else {})


def test_bytes_of_an_addition_that_xla_compiled():
    x = jax.ShapeDtypeStruct((100, 30), jnp.float32)
    text = jax.jit(lambda a, b: a * 2 + b).lower(x, x).compile().as_text()
    assert count.total(count.operations(hlo.read(text)), "hbm") == 3 * 100 * 30 * 4


def test_only_the_slices_that_a_loop_reads_are_counted():
    layers, size = 6, 64

    def run(x, w):
        return jax.lax.scan(lambda x, w: (x + w, None), x, w)[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((size,), (layers, size))]
    text = jax.jit(run).lower(*shapes).compile().as_text()
    found = count.total(count.operations(hlo.read(text)), "hbm")
    # Each turn reads x and a layer, and writes x; around it there may be copies of x and counters.
    least = layers * 3 * size * 4
    assert least <= found <= 2 * least + 64 * layers
    assert math.isfinite(found)
