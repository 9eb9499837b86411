"""The gate: which changes it lets through, by hand, and regressions planted in a copy of the sources."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gate
from mosaicjax.plan.topology import compiler_there

ROOT = Path(__file__).resolve().parents[1]
BEFORE = {"flops": 1e12, "peak_bytes": 1_000_000, "aliased_bytes": 500_000, "cycles": 1e6, "spills": 0}


def lines(**changed):
    return list(gate.worse("a step", BEFORE, BEFORE | changed))


def test_what_is_allowed_by_hand():
    assert lines() == []
    assert lines(flops=1.0009e12, peak_bytes=1_004_900, aliased_bytes=497_600, cycles=1_009_000) == []
    assert lines(flops=0.5e12, peak_bytes=1, aliased_bytes=10**9, cycles=1) == []
    assert lines(flops=1.002e12) == ["a step: flops was 1e+12, is 1.002e+12 (+0.20%)"]
    assert lines(peak_bytes=1_006_000) == ["a step: peak_bytes was 1e+06, is 1.006e+06 (+0.60%)"]
    # Of what is given back in place less is worse.
    assert lines(aliased_bytes=0) == ["a step: aliased_bytes was 500,000, is 0 (-100.00%)"]
    assert lines(spills=1) == ["a step: spills was 0, is 1"]
    gone = {name: value for name, value in BEFORE.items() if name != "cycles"}
    assert list(gate.worse("a step", BEFORE, gone)) == ["a step: cycles is measured no more"]


def test_what_improved_is_said(capsys):
    stored = {"cases": {"a": BEFORE, "b": BEFORE}}
    assert gate.compare(stored, {"a": BEFORE | {"flops": 0.5e12, "aliased_bytes": 600_000}, "c": BEFORE}) == 0
    said = capsys.readouterr().out.splitlines()
    assert "better    a: flops was 1e+12, is 5e+11 (-50.00%); --write stores it" in said
    assert "better    a: aliased_bytes was 500,000, is 600,000 (+20.00%); --write stores it" in said
    assert "new       c; --write stores it" in said
    assert gate.compare(stored, {"a": BEFORE | {"flops": 2e12}}) == 1
    assert "WORSE     a: flops was 1e+12, is 2e+12 (+100.00%)" in capsys.readouterr().out


def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch):
    missing = tmp_path / "none.json"
    if compiler_there():
        assert gate.main(["--stored", str(missing)]) == 2
        assert capsys.readouterr().err == "gate: no none.json; fix: python benchmarks/gate.py --write\n"
        missing.write_text('{"machine": {"packages": {"jax": "0.1"}}, "cases": {}}')
        assert gate.main(["--stored", str(missing)]) == 2
        assert "the stored figures are of other versions; expected {'jax': '0.1'}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert gate.main(["--stored", str(missing)]) == 2
    assert capsys.readouterr().err == "gate: no TPU compiler is installed; fix: make peers\n"


PLANTED = {
    "a doubled product": (
        "mosaicjax/layers/linear.py",
        "return x_RI @ weight_IO",
        "return x_RI @ (weight_IO * 0.5) + x_RI @ (weight_IO * 0.25)",
        "flops",
    ),
    "a lost donation": ("mosaicjax/step.py", "donate_argnums=(0,)", "donate_argnums=()", "aliased_bytes"),
}


@pytest.mark.slow
@pytest.mark.skipif(not compiler_there(), reason="libtpu, the TPU compiler, is not installed")
@pytest.mark.parametrize(
    "name", ["a doubled product", pytest.param("a lost donation", marks=pytest.mark.soak)]
)
def test_planted_regressions_are_caught(name, tmp_path):
    file, before, after, figure = PLANTED[name]
    for folder in ("mosaicjax", "benchmarks", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (tmp_path / file).read_text()
    assert text.count(before) == 1
    (tmp_path / file).write_text(text.replace(before, after))
    done = subprocess.run(
        [sys.executable, "benchmarks/gate.py", "--only", "step: mpt"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    worse = [line for line in done.stdout.splitlines() if line.startswith("WORSE")]
    assert any(f": {figure} was" in line for line in worse), worse
