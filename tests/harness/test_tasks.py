import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mosaicjax import cli
from mosaicjax.errors import InputError
from mosaicjax.harness.finished import Finished
from tests.harness import local_tasks


def test_finished_tasks_are_found_again_and_others_refused(tmp_path):
    finished = Finished(str(tmp_path))
    settings = {"weights": "abc", "limit": 3, "pair": (1, 2)}
    assert finished.read("a/b", settings) is None
    finished.write("a/b", settings, {"acc": 0.5})
    assert finished.read("a/b", settings) == {"acc": 0.5}
    assert finished.read("a_b", settings) is None
    with pytest.raises(
        InputError, match="a/b done with another limit; expected 3; got 4; fix: another --out"
    ):
        finished.read("a/b", settings | {"limit": 4})
    with pytest.raises(InputError, match="another seed; expected None; got 1|another seed; got 1"):
        finished.read("a/b", settings | {"seed": 1})
    (tmp_path / "tasks" / "a%2Fb.json").write_text("{")
    with pytest.raises(InputError, match="holds no results of a task"):
        finished.read("a/b", settings)
    nothing = Finished("")
    nothing.write("a", settings, {})
    assert nothing.read("a", settings) is None


@pytest.fixture(scope="module")
def model(shared_data):
    return str(shared_data("tinystories-260k") / "hf")


@pytest.fixture(scope="module")
def files(tmp_path_factory, shared_data):
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    return {kind: local_tasks.write(kind, folder, shared_data("eval")) for kind in local_tasks.KINDS}


def arguments(model, files, out, *more):
    names = f"{files['choice']},{files['last_word']}"
    return ["eval", model, "--tasks", names, "--out", str(out), "--limit", "8", "--batch", "4", *more]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(model, files, tmp_path, capsys):
    out, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "mosaicjax.cli", *arguments(model, files, out)]
    # No name is looked up anywhere else: the files are all there is.
    offline = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    with subprocess.Popen(command, env=offline, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("choice: "):
                break
        for line in process.stdout:
            if "loglikelihood: 4 of 8" in line:
                break
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    first = out / "tasks" / "choice.json"
    assert sorted(os.listdir(out / "tasks")) == ["choice.json"]
    assert not (out / "results.json").exists()
    before = first.stat().st_mtime_ns, first.read_bytes()

    assert cli.main(arguments(model, files, out)) == 0
    said = capsys.readouterr().out
    assert "choice: finished before" in said and "last_word: 8 documents" in said
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before

    assert cli.main(arguments(model, files, whole)) == 0
    results = [json.loads((folder / "results.json").read_text()) for folder in (out, whole)]
    for part in ("results", "configs", "versions", "n-shot", "n-samples", "higher_is_better"):
        assert results[0][part] == results[1][part]
    for kind in ("choice", "last_word"):
        name = f"samples_{kind}.jsonl"
        assert (out / name).read_bytes() == (whole / name).read_bytes()
        assert len((out / name).read_text().splitlines()) == 8

    capsys.readouterr()
    assert cli.main(arguments(model, files, out, "--num-fewshot", "1")) == 2
    assert "done with another num_fewshot; expected 0; got 1" in capsys.readouterr().err


@pytest.mark.slow
def test_tasks_that_cannot_be_loaded_are_refused(model, files, tmp_path, capsys):
    broken = tmp_path / "broken.yaml"

    def refused(name):
        assert cli.main(["eval", model, "--tasks", str(name)]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("mosaicjax: ")
        return said

    assert "no.yaml does not exist" in refused("no.yaml")
    broken.write_text("task: [")
    assert "cannot be loaded" in refused(broken)
    broken.write_text("task: x\nknown: no\n")
    assert "cannot be loaded" in refused(broken)
    broken.write_text(Path(files["choice"]).read_text().replace(".jsonl", ".none"))
    assert "cannot be loaded" in refused(broken)


@pytest.mark.slow
def test_the_gauntlet_on_local_files(model, shared_data, tmp_path, capsys):
    """One task of each kind, none done twice; a file that is gone makes its category partial."""
    spec = tmp_path / "small.yaml"
    data = shared_data("eval")
    names = {
        "copa": ("commonsense_reasoning", "multiple_choice", 0, 0.5),
        "winograd_wsc": ("language_understanding", "schema", 2, 0.5),
        "bigbench_operators": ("symbolic_problem_solving", "language_modeling", 1, 0),
        "svamp": ("symbolic_problem_solving", "generation_task_with_answers", 1, 0),
    }
    tasks = [
        f"- {{label: {name}, dataset_uri: local_data/{folder}/{name}.jsonl, num_fewshot: [{shots}],"
        f" icl_task_type: {kind}}}\n"
        for name, (folder, kind, shots, _) in names.items()
    ]
    benchmarks = {
        name: f"{{name: {name}, num_fewshot: {shots}, random_baseline: {baseline}}}"
        for name, (_, _, shots, baseline) in names.items()
    }
    parts = {"language": ["copa", "winograd_wsc"], "symbols": ["bigbench_operators", "svamp"]}
    categories = [
        f"  - {{name: {part}, benchmarks: [{', '.join(benchmarks[name] for name in some)}]}}\n"
        for part, some in parts.items()
    ]
    spec.write_text("eval_gauntlet:\n  categories:\n" + "".join(categories) + "icl_tasks:\n" + "".join(tasks))
    out = tmp_path / "out"
    command = ["eval", model, "--gauntlet", str(spec), "--gauntlet-data", str(data), "--out", str(out)]
    assert cli.main([*command, "--limit", "6", "--batch", "8"]) == 0
    found = json.loads((out / "gauntlet.json").read_text())
    assert {len(task["right"][""]) for task in found["tasks"].values()} == {6}
    for task in found["tasks"].values():
        assert task["accuracy"] == task["right"][""].count("1") / 6
    accuracy = {
        name: found["tasks"][f"{name}/{shots}-shot"]["accuracy"] for name, (_, _, shots, _) in names.items()
    }
    language = ((accuracy["copa"] - 0.5) / 0.5 + (accuracy["winograd_wsc"] - 0.5) / 0.5) / 2
    symbols = (accuracy["bigbench_operators"] + accuracy["svamp"]) / 2
    assert found["categories"] == {
        "language": {"score": pytest.approx(language)},
        "symbols": {"score": pytest.approx(symbols)},
    }
    assert found["averages"]["default_average"]["score"] == pytest.approx((language + symbols) / 2)
    capsys.readouterr()
    spec.write_text(spec.read_text().replace("symbolic_problem_solving/svamp", "nowhere/svamp"))
    assert cli.main([*command, "--limit", "6"]) == 0
    said = capsys.readouterr().out
    assert said.count("finished before") == 3
    assert "symbols                          partial, " in said and "missing: svamp/1-shot" in said
    assert json.loads((out / "gauntlet.json").read_text())["categories"]["symbols"]["score"] is None
    assert cli.main([*command, "--limit", "7"]) == 2
    assert "done with another limit; expected 6; got 7" in capsys.readouterr().err
