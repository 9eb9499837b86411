"""Tasks in the loop beside `mosaicjax eval` on what the loop saved."""

import json

import numpy as np
import pytest
import yaml

from mosaicjax.checkpoint import read_about
from mosaicjax.cli import main
from mosaicjax.errors import InputError
from mosaicjax.hub.card import card
from mosaicjax.hub.origin import origin_of
from mosaicjax.recipe import Tasks
from mosaicjax.recipe_file import load
from mosaicjax.report.page import page
from mosaicjax.report.shown import read
from tests import tiny


def task_file(folder):
    """Twelve questions of four answers each, of random words."""
    rng = np.random.default_rng(2)
    words = ["river", "stone", "light", "seven", "green", "paper", "house", "night"]

    def text(count):
        return " ".join(rng.choice(words, count))

    rows = [
        {"query": text(6), "choices": [text(2) for _ in range(4)], "gold": int(rng.integers(4))}
        for _ in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "arrays")}
    config = {"task": "words", "dataset_path": "json", "dataset_kwargs": source, "test_split": "test"}
    config |= {"output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_target": "gold"}
    (folder / "words.yaml").write_text(yaml.safe_dump(config | {"doc_to_choice": "choices"}))
    return folder / "words.yaml"


@pytest.mark.peer
def test_the_loops_scores_are_those_of_eval_on_what_it_saved(tiny_recipe, tmp_path):
    pytest.importorskip("lm_eval")
    file, out = task_file(tmp_path), tmp_path / "run"
    options = (f"--tasks.names={file}", "--tasks.every=3", "--tasks.limit=10", "--tasks.batch=5")
    tiny.train(tiny_recipe, out, *options, "--save.every=3")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scored = {row["step"]: row for row in rows if row["kind"] == "tasks"}
    assert sorted(scored) == [3, 6]
    kept = tmp_path / "kept"
    asked = ["eval", str(out), "--tasks", str(file), "--limit", "10", "--batch", "4", "--out", str(kept)]
    assert main(asked) == 0
    found = json.loads((kept / "results.json").read_text())["results"]["words"]
    assert scored[6]["words/acc"] == found["acc,none"]
    assert scored[6]["words/acc_norm"] == found["acc_norm,none"]
    assert scored[3]["tokens"] == scored[6]["tokens"] // 2
    # The same steps as without tasks: scoring changes nothing of training.
    plain = tmp_path / "plain"
    tiny.train(tiny_recipe, plain, "--save.every=3")
    np.testing.assert_array_equal(tiny.losses(plain), tiny.losses(out))
    origin = origin_of(str(out), read_about(str(out), 6), 6)
    assert f"words/acc {found['acc,none']:.4f}" in card(origin, "float32")
    text = page([read(str(out), "run")], "run")
    assert 'aria-label="words/acc"' in text


def test_what_cannot_be_is_refused(tiny_recipe):
    for field, value in (("every", -1), ("limit", -1), ("shots", -2), ("batch", 0)):
        with pytest.raises(InputError, match=f"tasks.{field} of the recipe"):
            load(str(tiny_recipe), [f"--tasks.{field}={value}"]).recipe.check()
    assert load(str(tiny_recipe), []).recipe.tasks == Tasks()
