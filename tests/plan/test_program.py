"""Planning and training lower one and the same step."""

import json

import pytest

from tests import tiny


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(
            ("--model.remat", "FULL", "--microbatch", "8", "--mesh.gather", "explicit"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_plan_and_a_run_have_the_same_program(options, tmp_path, tiny_recipe, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = [str(tiny_recipe), "--steps", "2", *options]
    tiny.train(*words[:1], tmp_path / "run", *words[1:])
    ran = json.loads((tmp_path / "run" / "run.json").read_text())["program"]

    def planned(*more):
        out = tmp_path / "plan.json"
        assert tiny.run("plan", *words, "--topology", "cpu:8", "--json", out, *more) == 0
        return json.loads(out.read_text())

    capsys.readouterr()
    found = planned()
    assert found["program"] == ran and len(ran) == 64
    page = capsys.readouterr().out
    assert f"program   {ran[:16]}" in page and "not timed: nobody states how fast a CPU is" in page
    assert found["memory"]["temporaries"] > 0 and "step_seconds" not in found
    # Another rate is another program.
    assert planned("--optimizer.lr.peak", "1.5e-5")["program"] != ran
