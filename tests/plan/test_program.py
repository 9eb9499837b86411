"""Planning and training lower one and the same step."""

import json

import pytest

from tests import tiny


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("--model.remat", "FULL", "--microbatch", "8", "--mesh.gather", "explicit")]
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


@pytest.mark.slow
def test_each_phase_is_planned_as_it_is_run(tmp_path, tiny_store, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tiny.write_recipe(
        tmp_path / "phased.py", tiny_store, before="from mosaicjax.recipe import Later", steps="20"
    )
    phases = "    seed=3,\n    phases=(Later(5, seq=16), Later(12, batch=16)),"
    path.write_text(path.read_text().replace("    seed=3,", phases))
    tiny.train(path, tmp_path / "run", "--eval.every", 0)
    ran = json.loads((tmp_path / "run" / "run.json").read_text())["program"]
    out = tmp_path / "plan.json"
    assert tiny.run("plan", path, "--topology", "cpu:8", "--json", out) == 0
    rows = json.loads(out.read_text())
    assert rows[0]["program"] == ran and len({row["program"] for row in rows}) == 3
    assert tiny.metrics(tmp_path / "run")[-1]["tokens"] == 5 * 8 * 32 + 7 * 8 * 16 + 8 * 16 * 16
    page = capsys.readouterr().out
    assert "phase 2" in page and "16 rows x 16 tokens a step" in page
    assert tiny.run("plan", path, "--topology", "cpu:8", "--fit") == 2
    capsys.readouterr()
