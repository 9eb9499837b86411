"""Runs on several domains, and on rows packed of whole documents."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from mosaicjax import recipe_file
from mosaicjax.data.build import build
from mosaicjax.data.mixture import By, Rows
from mosaicjax.data.store import Store
from mosaicjax.errors import InputError
from mosaicjax.models import llama, mpt
from mosaicjax.run_data import open_data
from tests import tiny
from tests.models import forward

MIXTURE = "Mixture((Domain('prose', {first!r}, 3.0), Domain('numbers', {second!r}, 1.0)){more})"


@pytest.fixture(scope="module")
def numbers(tiny_store, tmp_path_factory):
    """A second store of the same tokenizer: columns of numbers."""
    folder = tmp_path_factory.mktemp("numbers")
    rng = np.random.default_rng(2)
    rows = [{"text": " ".join(map(str, rng.integers(0, 999, rng.integers(3, 40))))} for _ in range(200)]
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = tiny_store.parent / "tokenizer"
    build([source], folder / "store", tokenizer=tokenizer, held_out=0.2, workers=1, progress=False)
    return folder / "store"


def written(folder, tiny_store, numbers, more="", **replaced):
    """A recipe file on both stores."""
    data = MIXTURE.format(first=str(tiny_store), second=str(numbers), more=more)
    before = "from mosaicjax.data.mixture import By, Domain, Mixture, Rows"
    return tiny.write_recipe(folder / "mixed.py", tiny_store, before=before, data=data, **replaced)


@pytest.fixture(scope="module")
def mixed_run(tiny_store, numbers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    recipe = written(folder, tiny_store, numbers, ", isolate=True", batch="16, microbatch=8")
    tiny.train(recipe, folder / "run")
    return folder


def test_domains_make_up_the_whole(mixed_run):
    """Each step's loss is the mean of its domains', weighed by tokens; so is the held-out one."""
    stream = open_data(recipe_file.load(str(mixed_run / "mixed.py")).recipe).stream
    for step, row in enumerate(tiny.metrics(mixed_run / "run")):
        counts = np.bincount(stream.rows(step, range(16))["domain"], minlength=2) * 32
        found = [row.get(f"step_tokens/{name}", 0) for name in ("prose", "numbers")]
        assert found == counts.tolist()
        means = [row.get(f"loss/{name}", 0.0) for name in ("prose", "numbers")]
        total = float(np.dot(means, counts))
        assert total / sum(counts) == pytest.approx(row["loss"], rel=1e-5)
    seen = sum(row.get("step_tokens/numbers", 0) for row in tiny.metrics(mixed_run / "run"))
    assert seen == pytest.approx(6 * 16 * 32 / 4, abs=2 * 32)
    last = tiny.metrics(mixed_run / "run", "eval")[-1]
    parts = [last["loss/prose"], last["loss/numbers"]]
    assert min(parts) < last["loss"] < max(parts)


@pytest.mark.slow
def test_held_out_domains_are_those_of_runs_of_their_own(mixed_run, tiny_store, numbers, tmp_path):
    """Each domain's held-out loss is the loss of the same weights on a store of it alone."""
    last = tiny.metrics(mixed_run / "run", "eval")[-1]
    for name, store in (("prose", tiny_store), ("numbers", numbers)):
        recipe = tiny.write_recipe(
            tmp_path / f"{name}.py", store, data=f"TokenStore({str(store)!r}, isolate=True)"
        )
        options = ("--init-from", mixed_run / "run", "--steps", 1, "--optimizer.lr.peak", "1e-30")
        tiny.train(recipe, tmp_path / name, *options)
        alone = tiny.metrics(tmp_path / name, "eval")[-1]
        assert alone["loss"] == pytest.approx(last[f"loss/{name}"], rel=1e-5)
        assert alone["bits_per_byte"] == pytest.approx(last[f"bits_per_byte/{name}"], rel=1e-5)


@pytest.mark.slow
def test_a_resumed_mixture_goes_on_in_its_order(mixed_run, tmp_path):
    recipe = mixed_run / "mixed.py"
    tiny.train(recipe, tmp_path / "run", "--steps", 3, "--optimizer.lr.final", "0.1")
    tiny.train(recipe, tmp_path / "run")
    whole, resumed = (tiny.metrics(out, "train") for out in (mixed_run / "run", tmp_path / "run"))
    for name in ("step_tokens/prose", "step_tokens/numbers"):
        assert [row.get(name) for row in resumed] == [row.get(name) for row in whole]
    # Another share of the rows is another order, which a run cannot go on with.
    assert tiny.run("train", recipe, "--out", tmp_path / "run", "--data.domains.0.amount", 4.0) == 2


def test_mixtures_are_recipes_like_any_other(mixed_run):
    loaded = recipe_file.load(
        str(mixed_run / "mixed.py"), ["--data.by", "ROWS", "--data.domains.1.amount", "9"]
    )
    assert loaded.recipe.data.by is By.ROWS
    assert [domain.amount for domain in loaded.recipe.data.domains] == [3.0, 9.0]
    assert recipe_file.from_json(recipe_file.to_json(loaded.recipe)) == loaded.recipe
    moved = recipe_file.load(str(mixed_run / "mixed.py"), ["--data.domains.1.path", "elsewhere"]).recipe
    before = recipe_file.load(str(mixed_run / "mixed.py")).recipe
    (change,) = recipe_file.check_continues(before, moved, "run")
    assert (change.name, change.after) == ("data.domains.1.path", "elsewhere")
    with pytest.raises(InputError, match=r"data.domains.1.amount: 1.0 -> 9.0"):
        recipe_file.check_continues(before, loaded.recipe, "run")


def test_stores_of_two_tokenizers_are_refused(tiny_store, tmp_path, capsys):
    other = tiny.build_store(tmp_path / "other", seed=0)
    tokenizer = tmp_path / "own"
    from mosaicjax.data.tokenizer import train_tokenizer

    documents = [tmp_path / "other" / "documents.jsonl"]
    train_tokenizer(documents, tokenizer, vocab=280, held_out=0.1)
    build(documents, tmp_path / "store", tokenizer=tokenizer, held_out=0.1, workers=1, progress=False)
    assert Store.open(other).manifest.tokenizer.hash == Store.open(tiny_store).manifest.tokenizer.hash
    recipe = written(tmp_path, tiny_store, tmp_path / "store")
    assert tiny.run("train", recipe, "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'store'} was built with another tokenizer than {tiny_store}" in said


def test_whole_documents_must_be_kept_apart(tiny_recipe, tmp_path, capsys):
    options = ("--data.rows", "BEST_FIT")
    assert tiny.run("train", tiny_recipe, "--out", tmp_path / "run", *options) == 2
    assert "documents packed whole that see each other" in capsys.readouterr().err


@pytest.mark.slow
def test_a_packed_run_counts_the_tokens_that_it_has(tiny_recipe, tmp_path):
    options = ("--data.rows", "BEST_FIT", "--data.isolate", "True", "--seq", 64)
    tiny.train(tiny_recipe, tmp_path / "run", *options)
    recipe = recipe_file.from_run(str(tmp_path / "run")).recipe
    assert recipe.data.rows is Rows.BEST_FIT
    stream = open_data(recipe).stream
    seen = 0
    for step, row in enumerate(tiny.metrics(tmp_path / "run")):
        seen += int(stream.rows(step, range(8))["weights"].sum())
        assert row["tokens"] == seen
    assert 0.9 * 6 * 8 * 64 < seen < 6 * 8 * 64


@pytest.mark.parametrize(
    "config",
    [
        mpt.Config(layers=2, embed=32, heads=2, mlp=64, vocab=320),
        llama.Config(layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=64, vocab=320),
    ],
)
def test_packed_documents_have_the_logits_of_each_alone(tiny_recipe, config):
    """Positions, segments and attention together: a packed document does not know of its neighbours."""
    options = ["--data.rows", "BEST_FIT", "--data.isolate", "True", "--seq", "64"]
    stream = open_data(recipe_file.load(str(tiny_recipe), options).recipe).stream
    batch = stream.rows(0, range(4))
    decoder = config.build()
    weights = forward.random_weights(decoder)
    together = forward.logits(
        decoder, weights, batch["tokens"], jnp.asarray(batch["positions"]), jnp.asarray(batch["segments"])
    )
    documents = 0
    for row in range(4):
        for segment in range(1, batch["segments"][row].max() + 1):
            mine = batch["segments"][row] == segment
            alone = np.zeros((1, 64), np.int32)
            alone[0, : mine.sum()] = batch["tokens"][row][mine]
            got, expected = together[row][mine], forward.logits(decoder, weights, alone)[0, : mine.sum()]
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
            documents += 1
    assert documents >= 6
