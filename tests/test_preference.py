"""Runs on preference pairs: margins grow, what they compare with stays, and a stopped run goes on exactly."""

import json
import math
import random
import re
import shutil

import jax
import numpy as np
import pytest

from mosaicjax import recipe_file
from mosaicjax.data.build import build
from mosaicjax.data.chat import Chat
from mosaicjax.data.store import Store
from mosaicjax.data.tokenizer import load_tokenizer
from mosaicjax.hub import start
from mosaicjax.mesh import shardings
from mosaicjax.run_data import open_data
from mosaicjax.show import described, memory
from tests import tiny
from tests.methods import pairs
from tests.models import forward

LIKED, DISLIKED = tiny.WORDS[:6], tiny.WORDS[6:12]
BEFORE = """from mosaicjax.data.mixture import Rows
from mosaicjax.methods.dpo import DPO
from mosaicjax.methods.ema import Ema
from mosaicjax.methods.freeze import FreezeLayers
from mosaicjax.methods.lora import LoRA
"""
METHODS = {
    "full": "(ClipGradients(norm=1.0), DPO(beta=0.5))",
    "lora": "(ClipGradients(norm=1.0), LoRA(rank=4, alpha=8.0), DPO(beta=0.5))",
}
RATES = {"full": 2e-3, "lora": 1e-2}
STEPS = 12


@pytest.fixture(scope="module")
def pair_store(tiny_store, tmp_path_factory):
    """200 pairs whose chosen answers have other words than the rejected ones."""
    folder, rng = tmp_path_factory.mktemp("pairs"), random.Random(2)

    def words(some, most):
        return " ".join(rng.choice(some) for _ in range(rng.randint(1, most)))

    rows = [
        {"prompt": words(tiny.WORDS, 4) + "?", "chosen": words(LIKED, 4), "rejected": words(DISLIKED, 4)}
        for _ in range(200)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(tiny_store.parent / "tokenizer")
    chat = Chat.of("plain", tokenizer)
    options = {"tokenizer": tokenizer, "held_out": 0.15, "workers": 1, "progress": False}
    build([folder / "rows.jsonl"], folder / "store", chat=chat, **options)
    return folder / "store"


@pytest.fixture(scope="module")
def base(tiny_recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "base"
    tiny.train(tiny_recipe, out, "--model.mlp", 128, "--save.every", 0, "--eval.every", 0)
    return out


def write(path, store, base, methods, rate=2e-3, rows="Rows.PAIRS"):
    """The tiny recipe on pairs, from a run's weights."""
    data = f"TokenStore({str(store)!r}, isolate=True, rows={rows})"
    optimizer = f"AdamW(lr=Cosine(peak={rate}, warmup=2, final=0.5))"
    model = "mpt.Config(layers=2, embed=32, heads=2, mlp=128, vocab=320)"
    fields = {
        "model": model,
        "data": data,
        "optimizer": optimizer,
        "methods": methods,
        "seq": "96",
        "steps": str(STEPS),
    }
    tiny.write_recipe(path, store, before=BEFORE, eval="Eval(every=6)", **fields)
    path.write_text(path.read_text().replace("    seed=3,", f"    seed=3,\n    init_from={str(base)!r},"))
    return path


@pytest.fixture(scope="module")
def recipes(pair_store, base):
    return {
        kind: write(base.parent / f"{kind}.py", pair_store, base, methods, RATES[kind])
        for kind, methods in METHODS.items()
    }


@pytest.fixture(scope="module")
def finished(recipes, base):
    """A run of each kind."""
    outs = {kind: base.parent / f"run-{kind}" for kind in recipes}
    for kind, recipe in recipes.items():
        tiny.train(recipe, outs[kind])
    return outs


def weights_of(path, step=start.NEWEST):
    family = start.described(path)[0]
    spec = family.decoder().spec()
    return start.weights(str(path), step, spec.abstract("float32", shardings(spec, forward.one_device())))


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_held_out_pairs_are_told_apart(finished, kind, capsys):
    first, *_, last = tiny.metrics(finished[kind], "eval")
    assert (first["step"], last["step"]) == (0, STEPS)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and abs(first["reward_margin"]) < 1e-3
    assert last["reward_margin"] > 0.5 and last["reward_accuracy"] > 0.9
    assert last["loss"] < 0.6
    summary = json.loads((finished[kind] / "summary.json").read_text())
    assert summary["heldout"]["reward_margin"] == last["reward_margin"]
    assert "perplexity" not in summary["heldout"]
    trained = tiny.metrics(finished[kind])
    assert trained[-1]["reward_margin"] > trained[0]["reward_margin"] + 0.5
    capsys.readouterr()
    assert tiny.run("evaluate", finished[kind]) == 0
    said = capsys.readouterr().out
    loss, margin = map(float, re.search(r"held-out loss ([\d.]+), margin ([\d.]+)", said).groups())
    assert (loss, margin) == pytest.approx((last["loss"], last["reward_margin"]), abs=2e-4)


def held_out_by_hand(path, recipe, reference, beta=0.5):
    """The scores of a directory's weights on held-out pairs, from logits of their rows by the paper."""
    loaded = recipe_file.load(str(recipe)).recipe
    data, decoder = open_data(loaded), loaded.model.build()
    rows = data.held_out.rows(range(len(data.held_out)))
    both = []
    for weights in (weights_of(path), weights_of(reference)):
        where = (rows["positions"], rows["segments"])
        with tiny.quick():
            both.append(forward.logits(decoder, weights, rows["tokens"], *where))
    loss, _, worths = pairs.naive(*both, rows, beta)
    logs = pairs.log_softmax(both[0])
    picked = np.take_along_axis(logs, rows["targets"][..., None].astype(np.int64), -1)[..., 0]
    chosen = rows["weights"] * (rows["segments"] % 2 == 1)
    return {
        "loss": loss / len(worths),
        "reward_chosen": worths[:, 0].mean(),
        "reward_rejected": worths[:, 1].mean(),
        "reward_margin": (worths[:, 0] - worths[:, 1]).mean(),
        "reward_accuracy": (worths[:, 0] > worths[:, 1]).mean(),
        "chosen_loss": -(picked * chosen).sum() / chosen.sum(),
        "pairs": len(worths),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_held_out_scores_are_the_papers(finished, recipes, base, kind, pair_store):
    found = tiny.metrics(finished[kind], "eval")[-1]
    expected = held_out_by_hand(finished[kind], recipes[kind], base)
    assert expected["pairs"] == Store.open(pair_store).manifest.splits["validation"].documents // 2
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_what_it_compares_with_is_where_it_began(finished, base, kind):
    """And in no checkpoint: those hold the weights and two moments, or of adapters these alone."""
    about = json.loads((finished[kind] / "base.json").read_text())
    assert (about["path"], about["step"]) == (str(base), 6)
    arrays = tiny.arrays(finished[kind], STEPS)
    count = sum(array.size for array in tiny.arrays(base, 6).values() if array.ndim)
    held = sum(array.size for array in arrays.values() if array.ndim)
    assert held == count if kind == "full" else held < count / 3
    changed = [
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(*(jax.tree.leaves(weights_of(path)) for path in (finished[kind], base)), strict=True)
    ]
    assert sum(changed) > len(changed) // 2


@pytest.mark.slow
def test_a_card_tells_pairs_from_tokens(finished, tmp_path):
    last = tiny.metrics(finished["full"], "eval")[-1]
    assert tiny.run("export", finished["full"], "--out", tmp_path / "hf") == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    told = f"{last['loss']:.4f} nats a preference pair, {last['reward_accuracy']:.1%} of pairs told apart"
    assert told in card and "nats a token" not in card


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_a_stopped_run_goes_on_exactly(finished, recipes, kind, tmp_path):
    resumed = tiny.copy_run(finished[kind], tmp_path / "resumed", until=6)
    (resumed / "summary.json").unlink()
    tiny.train(recipes[kind], resumed)
    assert tiny.rows(resumed) == tiny.rows(finished[kind])
    ours, theirs = (tiny.arrays(path, STEPS) for path in (resumed, finished[kind]))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name, strict=True)


@pytest.mark.slow
def test_other_weights_where_it_began_are_refused(finished, recipes, base, tmp_path, capsys):
    moved = tiny.copy_run(finished["full"], tmp_path / "moved", until=6)
    about = json.loads((moved / "base.json").read_text())
    (moved / "base.json").write_text(json.dumps(about | {"digest": "0" * 64}))
    assert tiny.run("train", recipes["full"], "--out", moved) == 2
    assert f"{base} holds other weights than those that {moved} began from" in capsys.readouterr().err
    (moved / "base.json").write_text(json.dumps(about | {"path": str(tmp_path / "gone")}))
    assert tiny.run("train", recipes["full"], "--out", moved) == 2
    assert f"the weights that {moved} stands on are not there" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.soak
def test_the_base_may_train_on_meanwhile(recipes, base, tmp_path):
    """A run compares with the checkpoint that it began from, also once there are later ones."""
    ahead, straight, later = tmp_path / "base", tmp_path / "straight", tmp_path / "later"
    shutil.copytree(base, ahead)
    options = ("--init-from", ahead, "--steps")
    tiny.train(recipes["full"], straight, *options, 6)
    shutil.copytree(straight, later)
    tiny.train(recipes["full"], straight, *options, 8)
    tiny.train(ahead, ahead, "--steps", 9)
    assert {6, 9} <= set(tiny.complete(ahead))
    tiny.train(recipes["full"], later, *options, 8)
    assert tiny.rows(later) == tiny.rows(straight)


@pytest.mark.slow
def test_averages_and_frozen_layers_beside_it(pair_store, base, tmp_path):
    """Gone on with too: averages are saved, frozen layers stay, and held-out scores are the averages'."""
    methods = '(FreezeLayers(("embed/*", "layer/0/*")), DPO(beta=0.5), Ema(decay=0.5))'
    recipe = write(tmp_path / "both.py", pair_store, base, methods)
    tiny.train(recipe, tmp_path / "whole")
    resumed = tiny.copy_run(tmp_path / "whole", tmp_path / "resumed", until=6)
    (resumed / "summary.json").unlink()
    tiny.train(recipe, resumed)
    assert tiny.rows(resumed) == tiny.rows(tmp_path / "whole")
    found = tiny.metrics(tmp_path / "whole", "eval")[-1]
    expected = held_out_by_hand(tmp_path / "whole", recipe, base)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.slow
def test_without_weights_to_begin_from_it_compares_with_the_seeds(recipes, tmp_path):
    options = ("--init-from", "")
    tiny.train(recipes["full"], tmp_path / "whole", *options)
    stopped = tiny.copy_run(tmp_path / "whole", tmp_path / "again", until=6)
    (stopped / "summary.json").unlink()
    tiny.train(recipes["full"], stopped, *options)
    assert tiny.rows(stopped) == tiny.rows(tmp_path / "whole")
    assert tiny.metrics(stopped)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert not (stopped / "base.json").exists()


@pytest.mark.slow
@pytest.mark.soak
def test_two_processes_do_the_same(finished, recipes, tmp_path):
    results = tiny.ended(tiny.launch_job("train", recipes["full"], "--out", tmp_path / "job"))
    assert [result.returncode for result in results] == [0, 0], results
    np.testing.assert_allclose(tiny.losses(tmp_path / "job"), tiny.losses(finished["full"]), rtol=1e-3)


def test_what_does_not_go_together_is_refused(pair_store, tiny_store, base, tmp_path, capsys):
    def refused(methods, message, *options, store=pair_store, rows="Rows.PAIRS"):
        recipe = write(tmp_path / "a.py", store, base, methods, rows=rows)
        assert tiny.run("train", recipe, "--out", tmp_path / "run", *options) == 2
        assert message in capsys.readouterr().err

    dpo, plain = "(DPO(),)", "()"
    refused(plain, "data.rows PAIRS without a method that compares their answers; fix: methods=(..., DPO())")
    refused(
        dpo, "the method DPO learns from preference pairs; expected data.rows PAIRS", rows="Rows.BEST_FIT"
    )
    refused(plain, f"{pair_store} holds preference pairs; expected data.rows PAIRS", rows="Rows.BEST_FIT")
    refused(plain, f"{pair_store} holds preference pairs", rows="Rows.CONCATENATED")
    refused(dpo, f"{tiny_store} holds no preference pairs", store=tiny_store)
    refused(dpo, "documents packed whole that see each other", "--data.isolate", "False")
    refused(dpo, " pairs in ", "--seq", 32)
    refused(dpo, "loss.z_loss with DPO", "--loss.z-loss", "0.1")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_show_counts_the_reference(pair_store, tmp_path):
    """A copy of all weights, on each chip its share; adapters need none."""
    large = ["--model.embed", "1024", "--model.heads", "8", "--model.mlp", "4096", "--seq", "1024"]
    found = {}
    for kind, methods in METHODS.items():
        loaded = recipe_file.load(str(write(tmp_path / "shown.py", pair_store, "x", methods)), large)
        step = described(loaded.recipe, 8)
        found[kind] = dict(line.split()[:2] for line in list(memory(step, 8))[1:])
    assert found["full"]["reference"] == found["full"]["weights"] == found["lora"]["frozen"] != "0.0000"
    assert "reference" not in found["lora"] and "frozen" not in found["full"]
