"""Stored results against fresh ones: what counts as within, and what cannot be run again."""

import json
import subprocess

import pytest

from benchmarks import reproduce


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=reproduce.ROOT, capture_output=True, text=True).stdout


def spread(median, least, most):
    return {"median": median, "least": least, "most": most}


@pytest.mark.parametrize(
    "new, slack, outside",
    [(9.0, 0.0, 0), (11.0, 0.0, 0), (8.9, 0.0, 1), (11.1, 0.0, 1), (8.9, 0.02, 0), (11.3, 0.02, 1)],
)
def test_the_new_median_is_held_against_the_old_bounds(new, slack, outside):
    before = {"124M": {"results": {"PyTorch": {"speed": spread(10.0, 9.0, 11.0)}}, "steps": 8}}
    now = {"124M": {"results": {"PyTorch": {"speed": spread(new, 0.0, 99.0)}}, "steps": 9}}
    lines, count, missing = reproduce.compare(before, now, slack)
    assert (len(lines), count, missing) == (1, outside, 0)
    assert lines[0].startswith("OUTSIDE" if outside else "within")
    assert "124M/results/PyTorch/speed" in lines[0]


def test_figures_that_are_not_measured_again_are_counted():
    before = {"a": spread(1.0, 1.0, 1.0), "b": {"c": spread(2.0, 1.0, 3.0)}}
    lines, outside, missing = reproduce.compare(before, {"b": {"c": spread(5.0, 5.0, 5.0)}}, 0.0)
    assert (len(lines), outside, missing) == (1, 1, 1)


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "no such result"),
        ("{", "is no JSON"),
        (json.dumps({"machine": {}}), "does not say what made it"),
        (
            json.dumps({"script": "x.py", "arguments": [], "machine": {"commit": "abc+changes"}}),
            "was measured on a tree that is in no commit",
        ),
    ],
)
def test_what_cannot_be_run_again_is_refused(tmp_path, capsys, text, said):
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    assert reproduce.main([str(path)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(not (reproduce.ROOT / ".git").exists(), reason="no git repository here to lay out")
def test_a_result_is_run_again_from_its_commit(tmp_path, capsys):
    """By a script that writes no result, which is said; the tree laid out for it is gone after."""
    commit = git("rev-parse", "HEAD").strip()
    stored = {
        "script": "benchmarks/machine.py",
        "arguments": [],
        "machine": {"commit": commit, "packages": {}, "cpu": "", "cores": 0, "python": ""},
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(stored))
    before = git("worktree", "list")
    assert reproduce.main([str(path)]) == 2
    assert f"benchmarks/machine.py at {commit[:12]} ended without a result" in capsys.readouterr().err
    assert git("worktree", "list") == before
