"""Tables of tokens made longer: known rows stay, new ones are their mean, on any mesh; and runs so begun."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from mosaicjax.data.build import build
from mosaicjax.data.special_tokens import add_special_tokens
from mosaicjax.data.tokenizer import load_tokenizer
from mosaicjax.errors import InputError
from mosaicjax.hub.grow import NOISE, Growth, grown, growth, shapes_before
from mosaicjax.mesh import Mesh, shardings
from mosaicjax.models import gptj, mpt
from tests import tiny
from tests.models import forward

GPTJ = gptj.Config(layers=2, embed=16, heads=2, mlp=32, vocab=24)
TIED = mpt.Config(layers=2, embed=16, heads=2, mlp=32, vocab=24)
MESHES = {"one": Mesh(fsdp=(1,)), "eight": Mesh(data=2, fsdp=(2,), tensor=2)}


def grow(family, to, known, mesh, seed=0):
    """Random weights of a family, grown on a mesh, as numpy by name, before and after."""
    spec, after = (each.decoder().spec() for each in (family, replace(family, vocab=to)))
    layout = mesh.build(jax.devices()[: 1 if mesh is MESHES["one"] else 8])
    weights = forward.random_weights(family.decoder())
    how = Growth(known, family.vocab, to)
    abstract = after.abstract("float32", shardings(after, layout))
    places = shapes_before(after, how, abstract)
    put = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), weights, places)
    made = grown(put, after, how, abstract, seed)
    assert jax.tree.map(lambda leaf: leaf.sharding, made) == shardings(after, layout)
    trees = (jax.tree.leaves(tree) for tree in (weights, made))
    names = [(name, param) for name, param in spec.items()]
    return {
        name: (param, np.asarray(old), np.asarray(new))
        for (name, param), old, new in zip(names, *trees, strict=True)
    }


# 23 rows divide over no mesh; of 24 only 20 may be known.
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("family", "known"), [(GPTJ, 24), (GPTJ, 20), (TIED, 20)], ids=str)
def test_new_rows_are_the_mean_of_the_known_ones(family, known, mesh):
    tables = 0
    for param, old, new in grow(family, 32, known, MESHES[mesh]).values():
        if "vocab" not in param.axes:
            np.testing.assert_array_equal(old, new)
            continue
        tables += 1
        assert new.shape == (32, *old.shape[1:])
        np.testing.assert_array_equal(new[:known], old[:known])
        mean, spread = old[:known].astype(np.float64).mean(0), old[:known].std(0)
        assert (np.abs(new[known:] - mean) <= 6 * NOISE * spread + 1e-6).all()
        if old.ndim > 1:
            assert len(np.unique(new[known:], axis=0)) == 32 - known
    # Table, head and its bias; a tied head has none.
    assert tables == (3 if family is GPTJ else 1)


def test_the_mesh_changes_nothing_and_the_seed_does():
    one, eight, other = (
        grow(GPTJ, 32, 24, MESHES[mesh], seed) for mesh, seed in (("one", 0), ("eight", 0), ("one", 1))
    )
    for name, (_, _, rows) in one.items():
        np.testing.assert_allclose(rows, eight[name][2], rtol=1e-6, atol=1e-7)
    assert not np.array_equal(one["embed/tokens"][2], other["embed/tokens"][2])


def test_tables_that_divide_over_no_mesh_are_read_whole():
    for _, old, new in grow(replace(TIED, vocab=23), 32, 23, MESHES["eight"]).values():
        if len(old) == 23:
            np.testing.assert_array_equal(new[:23], old)


def test_what_a_text_is_worth_moves_no_more_than_the_share_of_new_tokens():
    """A mean row scores no more than the log of the mean exponential: known tokens lose at most that."""
    tree = {name: new for name, (_, _, new) in grow(TIED, 32, 24, MESHES["one"]).items()}
    after = replace(TIED, vocab=32).decoder()
    flat = iter(tree.values())
    weights = after.spec().map(lambda _: next(flat))
    tokens = np.random.default_rng(0).integers(0, 24, (2, 9))
    before = forward.logits(TIED.decoder(), forward.random_weights(TIED.decoder()), tokens)
    now = forward.logits(after, weights, tokens)
    np.testing.assert_allclose(now[..., :24], before, rtol=1e-5, atol=1e-5)
    lost = np.log(np.exp(now).sum(-1)) - np.log(np.exp(before).sum(-1))
    assert (lost <= np.log(32 / 24) + 1e-4).all()


def test_when_tables_grow(tiny_store, tmp_path):
    """By the vocabulary, or by tokens among the rows that pad it; not where all tokens are known."""
    old = load_tokenizer(tiny_store.parent / "tokenizer")
    new = add_special_tokens(tiny_store.parent / "tokenizer", tmp_path, ("<a>", "<b>"))

    def shapes(vocab):
        spec = replace(TIED, vocab=vocab).decoder().spec()
        return spec, {name: param.shape(spec.dims) for name, param in spec.items()}

    spec, found = shapes(320)
    assert growth(found, spec, old, old) is None
    assert growth(found, spec, None, new) is None
    assert growth(found, spec, old, new) == Growth(300, 320, 320)
    assert growth(shapes(300)[1], spec, old, new) == Growth(300, 300, 320)
    assert growth(shapes(300)[1], spec, None, new) == Growth(300, 300, 320)
    assert growth(shapes(384)[1], spec, old, new) is None
    new.pieces = (*new.pieces[:40], b"other", *new.pieces[41:])
    with pytest.raises(InputError, match="not that of init_from with tokens added; .* as token 40"):
        growth(found, spec, old, new)


@pytest.mark.slow
def test_a_run_begins_with_tokens_that_its_base_does_not_know(tiny_store, tiny_run, tmp_path, capsys):
    folder = tiny_store.parent
    made = add_special_tokens(folder / "tokenizer", tmp_path / "tokenizer", ("<|im_start|>", "<|im_end|>"))
    common = dict(tokenizer=made, held_out=0.1, workers=1, progress=False)
    build([folder / "documents.jsonl"], tmp_path / "store", **common)
    recipe = tiny.write_recipe(tmp_path / "recipe.py", tmp_path / "store")
    options = ("--init-from", tiny_run, "--model.vocab", 384, "--steps", 1, "--optimizer.lr.peak", 1e-9)
    options += ("--optimizer.weight-decay", 0.0)
    tiny.train(recipe, tmp_path / "run", *options)
    said = capsys.readouterr().out
    assert "rows 300 to 383 of the tables of tokens are new, and begin as the mean of the others" in said
    assert "model.vocab was" not in said
    table = tiny.weights(tmp_path / "run", 1)["embed"]["tokens"]
    before = tiny.weights(tiny_run, 6)["embed"]["tokens"]
    np.testing.assert_allclose(table[:300], before[:300], atol=1e-6)
    np.testing.assert_allclose(table[300:], np.broadcast_to(before[:300].mean(0), (84, 32)), atol=1e-4)
    lora = "methods=(ClipGradients(norm=1.0), LoRA(rank=2))"
    text = recipe.read_text().replace("methods=(ClipGradients(norm=1.0),)", lora)
    imports = "from mosaicjax.methods.lora import LoRA\n"
    (tmp_path / "lora.py").write_text(text.replace("recipe = ", f"{imports}recipe = "))
    assert tiny.run("train", tmp_path / "lora.py", "--out", tmp_path / "lora", *options) == 2
    assert "LoRA with tokens new to" in capsys.readouterr().err
