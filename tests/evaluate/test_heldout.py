"""Held-out loss: every token once, whatever the batches and the devices."""

import json
import math

import jax
import numpy as np
import pytest

from mosaicjax import recipe_file
from mosaicjax.data.stream import HeldOut
from mosaicjax.errors import InputError
from mosaicjax.evaluate.heldout import Evaluator
from mosaicjax.mesh import Mesh, shardings
from mosaicjax.run_data import open_data
from tests import tiny
from tests.models import oracle


@pytest.fixture(scope="module")
def opened(tiny_recipe):
    """The recipe, its data, and its decoder."""
    recipe = recipe_file.load(str(tiny_recipe)).recipe
    return recipe, open_data(recipe), recipe.model.build()


@pytest.fixture(scope="module")
def weights(tiny_run):
    """Trained weights as the package's tree: numbered parts are lists."""
    tree = tiny.weights(tiny_run, 6)
    tree["stacks"] = [[tree["stacks"][0][0]]]
    return tree


def evaluator(opened, layout, rows, held_out=None, chunk=0):
    recipe, data, decoder = opened
    sizes = data.tokenizer.token_bytes
    with tiny.quick():
        return Evaluator(decoder, layout, recipe.dtypes, held_out or data.held_out, sizes, rows, chunk)


def placed(opened, weights, layout):
    return jax.device_put(weights, shardings(opened[2].spec(), layout))


def layout_of(devices):
    return Mesh(fsdp=(-1,)).build(jax.devices()[:devices])


def naive(opened, weights, tokens_from_documents):
    """Nats and bytes, from the whole token array cut into rows by hand."""
    recipe, data, _ = opened
    split = data.stores[0].split("validation")
    tokens = split.tokens(0, len(split))
    nats = 0.0
    for start in range(0, len(tokens) - 1, recipe.seq):
        piece = tokens[start : start + recipe.seq + 1]
        (logits,) = oracle.logits(recipe.model, weights, piece[None, :-1])
        lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        nats += float(np.sum(lse - logits[np.arange(len(piece) - 1), piece[1:]]))
    return nats, len(tokens) - 1


def test_every_held_out_token_counts_once(opened, weights, tiny_store):
    layout = layout_of(1)
    nats, targets = naive(opened, weights, tiny_store)
    rows = -(-targets // 32)
    for batch in (1, 7, rows + 3):
        assert batch == 1 or rows % batch, "a batch that does not divide is the point"
        found = evaluator(opened, layout, batch)(placed(opened, weights, layout))
        assert found.tokens == targets
        assert found.nats == pytest.approx(nats, rel=1e-5)
        assert found.per_token == pytest.approx(nats / targets, rel=1e-5)


@pytest.mark.parametrize(
    ("isolate", "seq", "chunk"), [(False, 40, 0), (True, 40, 8), (False, 33, 11), (True, 12, 0)]
)
def test_losses_by_how_much_comes_before(opened, weights, tiny_store, isolate, seq, chunk):
    """Each row cut by hand: a target's group is told by its place in its row, or in its document there."""
    recipe, data, _ = opened
    separator = data.tokenizer.separator
    split = data.stores[0].split("validation")
    held_out = HeldOut({"all": split}, separator=separator, seq=seq, isolate=isolate)
    layout = layout_of(1)
    found = evaluator(opened, layout, 3, held_out, chunk)(placed(opened, weights, layout)).told_from
    tokens = split.tokens(0, len(split))
    sizes = data.tokenizer.token_bytes
    expected = {most: [0.0, 0, 0] for most in (16, 32, 64, 128) if most < seq} | {seq: [0.0, 0, 0]}
    for start in range(0, len(tokens) - 1, seq):
        piece = tokens[start : start + seq + 1]
        begins = [i for i in range(len(piece) - 1) if i == 0 or (isolate and piece[i] == separator)]
        for first, end in zip(begins, [*begins[1:], len(piece) - 1], strict=True):
            (logits,) = oracle.logits(recipe.model, weights, piece[None, first:end])
            shifted = logits - logits.max(-1, keepdims=True)
            logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
            for place in range(end - first):
                target = piece[first + place + 1]
                sums = expected[min(most for most in expected if place + 1 <= most)]
                sums[0] -= logprobs[place, target]
                sums[1] += 1
                sums[2] += int(sizes[target])
    assert list(found) == sorted(expected)
    for most, (nats, targets, text_bytes) in expected.items():
        assert (found[most].tokens, found[most].text_bytes) == (targets, text_bytes)
        assert found[most].nats == pytest.approx(nats, rel=1e-5)
    assert min(targets for _, targets, _ in expected.values()) > 0


def test_eight_devices_are_one(opened, weights):
    losses = []
    for devices, rows in ((1, 5), (8, 8), (8, 24)):
        layout = layout_of(devices)
        losses.append(evaluator(opened, layout, rows)(placed(opened, weights, layout)))
    for loss in losses[1:]:
        assert (loss.tokens, loss.text_bytes) == (losses[0].tokens, losses[0].text_bytes)
        assert loss.nats == pytest.approx(losses[0].nats, rel=1e-6)


def test_bits_per_byte_are_over_the_bytes_of_the_documents(opened, weights, tiny_store):
    texts = [
        json.loads(line)["text"].encode()
        for line in (tiny_store.parent / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    counts = opened[1].stores[0].manifest.splits["validation"]
    assert sum(map(len, texts)) == counts.bytes + opened[1].stores[0].manifest.splits["train"].bytes
    layout = layout_of(1)
    loss = evaluator(opened, layout, 8)(placed(opened, weights, layout))
    assert loss.text_bytes == counts.bytes
    assert loss.bits_per_byte == pytest.approx(loss.nats / math.log(2) / counts.bytes, rel=1e-12)
    assert loss.metrics() == {
        "loss": loss.per_token,
        "bits_per_byte": loss.bits_per_byte,
        "tokens": loss.tokens,
        "perplexity": pytest.approx(math.exp(loss.per_token), rel=1e-12),
    }


def test_the_loss_of_the_run_is_that_of_its_weights(opened, weights, tiny_run):
    layout = layout_of(1)
    found = evaluator(opened, layout, 8)(placed(opened, weights, layout))
    logged = tiny.metrics(tiny_run, "eval")[-1]
    assert logged["loss"] == pytest.approx(found.per_token, rel=1e-5)
    assert logged["bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=1e-5)


def test_some_rows_are_evenly_spaced(opened, weights):
    layout = layout_of(1)
    some = evaluator(opened, layout, 4)
    total = len(opened[1].held_out)
    assert some.chosen(0) == some.chosen(total) == some.chosen(total + 9) == list(range(total))
    for rows in (1, 3, total - 1):
        chosen = some.chosen(rows)
        assert len(chosen) == rows == len(set(chosen)) and chosen[0] == 0
        steps = np.diff([*chosen, total])
        assert steps.max() - steps.min() <= 1
    whole = placed(opened, weights, layout)
    one_by_one = evaluator(opened, layout, 1)
    chosen = some.chosen(6)
    each = [one_by_one.held_out.rows([row]) for row in chosen]
    assert some(whole, 6).tokens == int(sum(batch["weights"].sum() for batch in each))


def test_rows_that_the_mesh_cannot_split_are_refused(opened):
    with pytest.raises(InputError, match="rows of evaluation; expected a multiple of 8; got 12"):
        evaluator(opened, layout_of(8), 12)
