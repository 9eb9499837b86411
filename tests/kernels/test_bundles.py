"""Reading the TPU compiler's schedules, on small texts written by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.kernels.bundles import (
    Counts,
    Kernel,
    Node,
    cycles,
    parse,
    seconds,
    useful_share,
    vmem_bytes,
)
from mosaicjax import hardware
from mosaicjax.errors import InputError
from mosaicjax.hardware import CORES

CHIP = "v5e"
COLUMNS = ("MATMUL", "VALU", "VSTORE", "VSTORE:SPILL", "SALU")

# A grid's loop that starts a copy behind a branch, sets up behind another, has two inner loops (the first
# behind a branch over it, with a bundle without instructions and a comment over two lines), and writes out.
SCHEDULE = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s0 = smov.u32 0 /* Start region 1 */ }
   0x1 LB: > { %s1 = sadd.s32 1, %s0 } /* Start region 2 */
   0x2   : > { %3 = sbr.rel (%p1) target = $region4 }
   0x3   : > { %4 = dma.hbm_to_vmem } /* Start region 3 :: End region 3 */
   0x4 PF: > { %5 = vmov 0 } /* End empty region 4 */
   0x5   : > { %6 = sbr.rel (%p2) target = $region6 }
   0x6   : > { %7 = vst [vmem:[#allocation2]] /* of shape f32[8,128]
second line { not a bundle } */ } /* Start region 5 :: End region 5 */
   0x7   : > { %8 = vst [vmem:[#allocation2 + $0x8]] }
   0x8 PF: > { %9 = sbr.rel (%p3) target = $region8 } /* Start/End empty region 6 */
   0x9   : > { %10 = vmov 0 } /* Start region 7 */
   0xa LB: >> { %11 = vmatmul.bf16 ;; vst [vmem:[#allocation9_spill]] } /* Start region 9 */
   0xb   :  {}
   0xc   : >> { %12 = vmatmul.bf16 ;; vld [vmem:[#allocation9_spill]] ;; vld [vmem:[#allocation10_spill]] }
   0xd   : >> { %13 = sbr.rel (!%p4) target = $region9 }
   0xe PF: > { %14 = vmov 0 } /* Start/End empty region 8 */
   0xf LB: >> { %15 = vmatmul.bf16 } /* Start region 10 */
  0x10   : >> { %16 = sbr.rel (!%p5) target = $region10 }
  0x11   : > { %17 = vst [vmem:[#allocation3]] } /* End region 10 */
  0x12   : > { %18 = sbr.rel (!%p6) target = $region2 }
  0x13   :  { %19 = shalt } /* End region 2 */
"""
ROWS = {
    0x6: (0, 1, 1, 0, 0),
    0x7: (0, 0, 1, 0, 0),
    0xA: (1, 0, 1, 1, 0),
    0xC: (2, 0, 0, 0, 0),
    0xF: (1, 3, 0, 0, 0),
    0x11: (0, 0, 1, 0, 0),
}
USE = "\n".join(
    ["== CAPACITY:", ", ".join(COLUMNS), "  4 4 1 1 2", "== UTILIZATION:"]
    + [" ".join(map(str, ROWS.get(at, (0, 0, 0, 0, 1)))) for at in range(0x14)]
)
# On paper: outside the grid 0x0 and 0x13; each step 0x1, 2, 4, 5, 8, e, 11, 12, and 0x9 of the branch over
# the first loop; 0x3 starts a copy; 0x6 and 0x7 set up; the loops have 4 and 2 bundles.
OUTSIDE, STEP, COPY, SET_UP, FIRST, SECOND = 2, 9, 1, 2, 4, 2


def kernel() -> Kernel:
    return Kernel("hand_written", parse(SCHEDULE, USE), 0)


def test_the_tree_of_a_schedule():
    tree = kernel().tree
    (grid,) = tree.parts
    assert (tree.kind, tree.bundles, grid.kind, grid.bundles) == ("kernel", OUTSIDE, "loop", STEP - 1)
    kinds = [(part.kind, part.bundles) for part in grid.parts]
    assert kinds == [("branch", COPY), ("branch", SET_UP), ("branch", 1), ("loop", SECOND)]
    assert [(part.kind, part.bundles) for part in grid.parts[2].parts] == [("loop", FIRST)]
    assert [loop.total("MATMUL") for loop in kernel().loops] == [3, 1]
    assert tree.total() == 0x14
    assert kernel().spills == 1
    sums = {
        name: sum(ROWS.get(at, (0, 0, 0, 0, 1))[n] for at in range(0x14)) for n, name in enumerate(COLUMNS)
    }
    assert {name: tree.total(name) for name in COLUMNS} == sums


@given(
    st.integers(1, 99), st.integers(0, 99), st.integers(0, 9_999), st.integers(0, 9_999), st.integers(0, 99)
)
def test_cycles_are_bundles_times_how_often_they_run(steps, rows, whole, partly, visits):
    counts = Counts(steps, visits, rows, (whole, partly))
    expected = OUTSIDE + steps * (STEP + COPY) + rows * SET_UP + whole * FIRST + partly * SECOND
    assert cycles(CHIP, kernel(), counts) == expected


def test_a_branch_that_multiplies_runs_at_visits():
    body = Node("branch", 100, {"MATMUL": 7, "VSTORE": 3})
    step = Node(
        "loop", 10, {}, parts=(body, Node("branch", 5, {"VSTORE": 4}), Node("branch", 3, {"SALU": 2}))
    )
    peer = Kernel("peer", Node("kernel", 1, {}, parts=(step,)), 0)
    assert cycles(CHIP, peer, Counts(steps=8, visits=6, rows=2)) == 1 + 8 * (10 + 3) + 6 * 100 + 2 * 5


@pytest.mark.parametrize("turns", [(), (3,), (3, 4, 5)])
def test_loops_that_were_not_counted_are_an_error(turns):
    with pytest.raises(InputError, match="loops"):
        cycles(CHIP, kernel(), Counts(4, turns=turns))


def test_texts_that_do_not_belong_together_are_an_error():
    with pytest.raises(ValueError, match="20 bundles, but 19 rows"):
        parse(SCHEDULE, USE.rpartition("\n")[0])


@pytest.mark.parametrize(
    ("chip", "kind", "expected"),
    # 30 turns of 2 bundles, or of 5 products of 16 rows of bfloat16 (8 of float32) at 1 row a cycle, or 2.
    [
        ("v5e", "bf16", 30 * 5 * 16),
        ("v4", "lmr.f32", 30 * 5 * 8),
        ("v5p", "f32", 30 * 5 * 8),
        ("v6e", "bf16", 30 * 5 * 8),
    ],
)
def test_a_matrix_unit_takes_what_it_is_fed(chip, kind, expected):
    product, other = f"%9 = vmatmul.{kind}.mxu1", f"%9 = vmatmul.{kind}.mxu0"
    text = "\n".join(
        [
            "     0   :  { %0 = vmov 0 }",
            f"   0x1 LB: > {{ {' ;; '.join([product] * 4)} ;; {other} }}",
            f"   0x2   : > {{ {product} ;; %1 = sbr.rel (!%p) target = $region1 }}",
            "   0x3   :  { %2 = shalt }",
        ]
    )
    use = "\n".join(["MATMUL, VALU", "== UTILIZATION:", "0 0", "5 0", "1 0", "0 0"])
    tree = parse(text, use)
    assert [part.rows for part in tree.parts] == [5 * (8 if "f32" in kind else 16)]
    assert cycles(chip, Kernel("fed", tree, 0), Counts(steps=30)) == 2 + expected


def test_vmem_is_what_the_report_says_of_each_kernel():
    report = """<html><script>
const DATA = {"program": {"one": {"total_size": 4096, "parts": {"windows": {"size": 1}}},
  "two": {"total_size": 100, "inner": {"three": {"total_size": 7}}}}};
draw(DATA);</script>"""
    assert vmem_bytes(report) == {"one": 4_096, "two": 100, "three": 7}
    with pytest.raises(ValueError):
        vmem_bytes("<html></html>")


@pytest.mark.parametrize("chip", sorted(CORES))
def test_a_chip_that_multiplies_all_the_time_reaches_its_published_peak(chip):
    core = CORES[chip]
    cubed = 8_192**3
    issued = cubed / core.macs
    assert useful_share(chip, cubed, issued) == 1
    peak = hardware.chip_named(chip).peak("bfloat16")
    assert 2 * cubed / seconds(chip, issued, 0) == pytest.approx(peak, rel=0.005)
    bandwidth = hardware.chip_named(chip).hbm_bandwidth.value
    assert seconds(chip, 1, bandwidth / 4) == 0.25
