"""The check for people who hold a TPU, as far as one can go without: comparing, arithmetic, its file."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kernels import hardware_cases
from benchmarks.kernels import hardware_check as check
from benchmarks.kernels import hardware_times as times
from benchmarks.kernels.hardware_cases import Attention, Decode, Product, Way, agreement, compare, drawn
from benchmarks.kernels.hardware_check import Report
from benchmarks.kernels.hardware_times import Sample
from mosaicjax.hardware import chip_named
from mosaicjax.kernels import attention_tiles
from tests import tiny

INTERPRETED = Way(interpreted=True)
ONE = Attention("one", "float32", 64, queries=200, keys=200, heads=2, kv_heads=1)
REFUSED = Product("refused", "bfloat16", (16, 16), 2_880, 2_880)


@pytest.fixture(autouse=True)
def quick():
    with tiny.quick():
        yield


def test_without_a_tpu_it_is_one_line(capsys, tmp_path):
    out = tmp_path / "out.json"
    assert check.main(["--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected a TPU as jax's first device; got cpu (JAX_PLATFORMS is cpu)" in line
    assert not out.exists()


def test_options_that_select_nothing_or_lead_nowhere_are_one_line(capsys, tmp_path):
    assert check.main(["--interpret", "--only", "no such case"]) == 2
    assert check.main(["--interpret", "--only", "time matmul"]) == 2
    assert check.main(["--interpret", "--out", str(tmp_path / "none" / "out.json")]) == 2
    assert ["nothing to run", "nothing to run", "no such folder"] == [
        line.removeprefix("hardware_check: ").partition(";")[0]
        for line in capsys.readouterr().err.splitlines()
    ]


def test_interpreted_cases_pass_with_real_errors(tmp_path, capsys):
    out = tmp_path / "out.json"
    names = ("attention bfloat16 C=128 alibi", "decode float32 C=128 plain", "grouped bfloat16 few rows")
    options = [word for name in names for word in ("--only", name)]
    assert check.main(["--interpret", "--out", str(out), *options]) == 0
    text = out.read_text()
    found = json.loads(text)
    assert found["finished"] and found["interpreted"] and found["kernel"] == "interpreted"
    assert found["summary"] == {"cases": 3, "timings": 0, "failed": 0}
    assert [case["name"] for case in found["cases"]] == list(names)
    results = [{each["name"]: each for each in case["errors"]} for case in found["cases"]]
    assert set(results[0]) == {"out", "lse", "dq", "dk", "dv", "dalibi_slopes"}
    assert (set(results[1]), set(results[2])) == ({"out"}, {"out", "dx", "dweight"})
    for case, each in zip(found["cases"], results, strict=True):
        assert all(0 < one["scaled"] < case["tolerance"] for one in each.values())
        assert all(0 < one["local"] < case["tolerance"] for one in each.values())
    # bfloat16 cannot be as near as float32, and nothing compares an array with itself.
    assert results[0]["out"]["scaled"] > 100 * results[1]["out"]["scaled"]
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert str(check.ROOT) not in text and str(Path.home()) not in text


def test_another_scale_or_another_mask_is_noticed():
    tolerance = hardware_cases.TOLERANCES["float32"]
    x = drawn(ONE, seed=0)
    got = hardware_cases.kernel(ONE, INTERPRETED, x)

    def errors(other):
        return [each.error for each in compare(got, hardware_cases.reference(other, x))]

    assert 0 < max(errors(ONE)) < tolerance
    assert min(errors(replace(ONE, scale=1.01 * 64**-0.5))) > 10 * tolerance
    # A window that takes one key from the last query, and nothing from any other.
    assert min(errors(replace(ONE, window=199))) > 10 * tolerance


def test_a_decode_kernel_that_reads_another_layer_is_noticed():
    case = Decode("one", "float32", 64, slots=150, layers=3)
    x = drawn(case, seed=0)
    wrong = hardware_cases.reference(case, x | {"layer": jnp.asarray(0, jnp.int32)})
    (found,) = compare(hardware_cases.kernel(case, INTERPRETED, x), wrong)
    assert found.error > 0.1


def test_agreement_by_hand():
    expected = np.asarray([[1.0, -4.0], [0.5, 0.0], [2.0, 0.0]], np.float32)
    got = expected + np.asarray([[0.0, 0.2], [-0.1, 0.0], [0.0, 0.0]], np.float32)
    found = agreement("x", got, expected)
    assert (found.name, found.largest) == ("x", 4.0)
    # 0.2 of 4; the three rows are stretches of norms sqrt(17), 0.5 and 2.
    assert found.scaled == pytest.approx(0.05, rel=1e-6)
    assert found.local == found.error == pytest.approx(0.2, rel=1e-6)
    assert agreement("x", expected, expected).error == 0


def test_an_error_in_small_late_results_is_noticed():
    places = np.arange(1, 1_025)
    expected = np.random.default_rng(0).standard_normal((1, 1_024, 2, 8)) / places[None, :, None, None]
    got = expected.copy()
    got[:, 896:] = 0
    found = agreement("out", got, expected)
    assert found.scaled < 2e-3
    assert found.local == 1


@pytest.mark.parametrize(
    ("got", "expected", "error"),
    [
        ([1.0, -math.inf], [1.0, -math.inf], 0.0),
        ([1.0, 2.0], [1.0, -math.inf], math.inf),
        ([1.0, -math.inf], [1.0, 2.0], math.inf),
        ([1.0, math.inf], [1.0, -math.inf], math.inf),
        ([1.0, math.nan], [1.0, 2.0], math.inf),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
    ],
)
def test_what_is_not_finite(got, expected, error):
    found = agreement("lse", np.asarray(got), np.asarray(expected))
    assert found.error == error
    assert found.dump()["scaled"] == (None if error else 0)


def test_other_shapes_and_names_are_errors():
    with pytest.raises(ValueError, match=r"dq: shape \(2,\) where the reference has \(3,\)"):
        compare({"dq": np.zeros(2)}, {"dq": np.zeros(3)})
    with pytest.raises(ValueError, match=r"results \['dq'\] where the reference has \['dk'\]"):
        compare({"dq": np.zeros(2)}, {"dk": np.zeros(2)})


def test_the_reference_by_rows_is_the_reference_at_once():
    case = replace(ONE, batch=2, segments=True, alibi=True, sinks=True, keys=240, q_offset=40)
    x = drawn(case, seed=0)
    at_once, by_rows = (hardware_cases.reference(replace(case, rows=rows), x) for rows in (0, 50))
    assert max(each.error for each in compare(by_rows, at_once)) < 2e-6


def test_a_refused_case_is_a_line_and_the_rest_runs(tmp_path, capsys):
    out = tmp_path / "out.json"
    options = check.argparse.Namespace(interpret=True, seed=0, rounds=1)
    report = Report(out, {"kernel": "interpreted"})
    few = Product("few", "float32", (3, 0, 13), 128, 128)
    assert check.run(report, [REFUSED, few], [], options) == 1
    found = json.loads(out.read_text())
    assert [case["passed"] for case in found["cases"]] == [False, True]
    assert found["summary"] == {"cases": 2, "timings": 0, "failed": 1}
    assert found["cases"][0]["error"].startswith("InputError: megablox: no block of these dims fits")
    assert [text[:4] for text in capsys.readouterr().out.splitlines()] == ["FAIL", "ok  "]


def test_a_file_says_whether_all_ran(tmp_path):
    out = tmp_path / "out.json"
    report = Report(out, {"seed": 3})
    assert json.loads(out.read_text())["finished"] is False
    report.add("cases", {"name": "a", "passed": True})
    found = json.loads(out.read_text())
    assert (found["finished"], found["seed"], found["cases"]) == (False, 3, [{"name": "a", "passed": True}])
    report.add("timings", {"name": "b", "passed": False})
    report.save(finished=True)
    found = json.loads(out.read_text())
    assert (found["finished"], found["summary"]) == (True, {"cases": 1, "timings": 1, "failed": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_times_by_hand():
    # 100 calls more take 20 ms, 25 ms and 21 ms more, whatever every loop costs beside.
    samples = [
        Sample(50, 0.500, 150, 0.520),
        Sample(50, 0.010, 150, 0.035),
        Sample(50, 0.009, 150, 0.030),
    ]
    row = times.timed({"name": "x", "predicted_us": 168.0}, samples, 168.0)
    assert row["measured_us"] == pytest.approx({"median": 210, "least": 200, "most": 250})
    assert row["ratio"] == pytest.approx(1.25)
    assert (row["calls"], row["rounds"]) == ([50, 150], 3)
    assert times.timed({}, samples, None)["ratio"] is None
    shown = check.line(row | {"passed": True})
    assert shown == "ok   x: 210.0 us (200.0-250.0), predicted 168.0, ratio 1.25"


@pytest.mark.parametrize(
    ("seconds", "expected"), [(1e-3, (50, 200)), (2.9e-3, (16, 64)), (3.0, (2, 8)), (0.0, (5_000, 20_000))]
)
def test_calls_of_a_sample(seconds, expected):
    assert times.call_counts(seconds) == expected


def test_a_loop_makes_two_calls_a_turn():
    run = times.repeated(lambda x, y: 2 * x + y)
    # x becomes 2 x + 3, six times: 64 x + 63 * 3.
    assert run(jnp.asarray(3), jnp.asarray(5), jnp.asarray(3)) == 64 * 5 + 63 * 3


def test_predictions_by_hand():
    v5e, tpu7x = chip_named("v5e"), chip_named("tpu7x")
    assert times.matmul_loop(v5e).predicted_us == pytest.approx(2 * 8_192**3 / 197e12 * 1e6)
    # A device is half a chip.
    assert times.matmul_loop(tpu7x).predicted_us == pytest.approx(2 * 8_192**3 / (2_307e12 / 2) * 1e6)
    assert times.hbm_loop(v5e).predicted_us == pytest.approx(2 * 2**30 / 819e9 * 1e6)
    # Keys and values of 16 sequences, 8 heads, 2,048 places, 128 numbers of 2 bytes.
    found = times.decode_loop(128, 2_048, v5e, "TPU v5 lite")
    assert found.predicted_us == pytest.approx(2 * 16 * 8 * 2_048 * 128 * 2 / 819e9 * 1e6)
    assert all(loop.predicted_us is None for loop in times.loops(None, "TPU of tomorrow"))


def test_predictions_of_attention_are_the_tables():
    path = Path(attention_tiles.__file__).with_name(attention_tiles.TABLE)
    rows = json.loads(path.read_text())["entries"]
    loops = {loop.name: loop.predicted_us for loop in times.loops(chip_named("v6e"), "TPU v6 lite")}
    asked = [
        row
        for row in rows
        if row[:2] == ["v6e", "bfloat16"] and row[2] in (64, 128, 256) and row[3] >= 2_048 and not row[4]
    ]
    checked = [row for row in asked if row[3] != 16_384]
    assert len(checked) == 12
    for _, _, head_dim, length, _, _, _, (forward, backward), _ in checked:
        assert loops[f"time forward C={head_dim} L={length}"] == forward
        assert loops[f"time backward C={head_dim} L={length}"] == backward


def test_cases_cover_the_grid_and_keep_their_features_when_small():
    cases = hardware_cases.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    grid = {(case.dtype, case.head_dim) for case in cases if isinstance(case, Attention)}
    assert grid >= {(dtype, dim) for dtype in ("bfloat16", "float32") for dim in attention_tiles.HEAD_DIMS}
    for case in cases:
        small = case.small()
        assert small.name == case.name
        if isinstance(case, Attention):
            assert max(small.queries, small.keys) <= hardware_cases.SMALL_LENGTH
            assert small.queries % (small.rows or 1) == 0 == case.queries % (case.rows or 1)
            assert bool(small.window) == bool(case.window) and small.window <= small.keys
            assert bool(small.q_offset) == bool(case.q_offset)
            assert small.q_offset + small.queries <= small.keys or not case.causal
        elif isinstance(case, Decode):
            assert small.slots <= hardware_cases.SMALL_LENGTH and bool(small.window) == bool(case.window)
        else:
            assert [size > 0 for size in small.sizes] == [size > 0 for size in case.sizes]


@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_cases_interpreted(dtype, tmp_path):
    out = tmp_path / "out.json"
    assert check.main(["--interpret", "--out", str(out), "--only", f" {dtype} "]) == 0
    found = json.loads(out.read_text())
    assert found["summary"]["cases"] == sum(case.dtype == dtype for case in hardware_cases.cases())
