"""What `show` says of a recipe, against numbers by hand."""

from dataclasses import replace

import numpy as np
import pytest

from mosaicjax import recipe_file
from mosaicjax.data.store import Store
from mosaicjax.methods.lora import LoRA
from mosaicjax.show import described, masked_text, memory, shard_bytes, weights_table
from tests import tiny

EMBED, HEADS, MLP, VOCAB, LAYERS = 32, 2, 64, 320, 2
TABLE = VOCAB * EMBED
ATTENTION = LAYERS * EMBED * EMBED
UP = LAYERS * EMBED * MLP
NORMS = 2 * LAYERS * EMBED + EMBED
COUNT = TABLE + 4 * ATTENTION + 2 * UP + NORMS


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    return recipe_file.load(str(tiny_recipe)).recipe


def test_weights_axes_partition_and_counts(recipe):
    lines = list(weights_table(described(recipe, 8)))
    cells = {line.split("  ")[0]: [cell.strip() for cell in line.split("  ") if cell] for line in lines[1:-1]}
    assert cells["embed/tokens"] == ["embed/tokens", "vocab embed", "320x32", "tensor, fsdp", f"{TABLE:,}"]
    assert cells["stacks/0/0/layer/attention/query"] == [
        "stacks/0/0/layer/attention/query",
        "layers embed heads head_dim",
        "2x32x2x16",
        "-, fsdp, tensor, -",
        f"{ATTENTION:,}",
    ]
    assert cells["norm/scale"][3:] == ["fsdp", "32"]
    assert lines[-1] == f"{COUNT:,} parameters"
    assert sum(int(cell[-1].replace(",", "")) for cell in cells.values()) == COUNT


def test_adapters_stand_below_the_weights(recipe):
    adapted = replace(recipe, methods=(LoRA(rank=4, targets=("*/mlp/up",)),), init_from="elsewhere")
    lines = list(weights_table(described(adapted, 8)))
    a, b = ([cell.strip() for cell in line.split("  ") if cell] for line in lines[-3:-1])
    assert a == ["stacks/0/0/layer/mlp/up/a", "layers embed rank", "2x32x4", "-, fsdp, -", "256"]
    assert b == ["stacks/0/0/layer/mlp/up/b", "layers rank mlp", "2x4x64", "-, -, tensor", "512"]
    assert lines[-1] == f"{COUNT:,} parameters, {COUNT:,} of them frozen, and 768 in adapters beside them"


def test_a_dim_over_several_mesh_axes(recipe):
    recipe = recipe_file.override(recipe, ["--mesh.fsdp", "2", "2", "--mesh.tensor", "2"], "test")
    (line,) = [line for line in weights_table(described(recipe, 8)) if line.startswith("embed/tokens")]
    assert "tensor, fsdp0*fsdp1" in line


def test_bytes_of_each_chip(recipe):
    step = described(recipe, 8)
    state = step.abstract_state()
    # Everything has the dim embed, which the 8 chips share; the tensor axis is 1.
    assert shard_bytes(state.trainable) == COUNT * 4 // 8
    # Adam's two moments, and two counts of steps, which every chip has.
    assert shard_bytes(state.optimizer) == 2 * COUNT * 4 // 8 + 2 * 4
    # One row of 32 tokens, targets and weights, and its number.
    assert shard_bytes(step.abstract_batch()) == 3 * 32 * 4 + 4
    lines = list(memory(step, 8))
    assert lines[0] == (
        "per chip of 8 (data 1 x fsdp 8 x tensor 1), without activations and gathered weights:"
    )


def test_gibibytes_of_a_large_model(recipe):
    large = recipe_file.override(
        recipe,
        ["--model.embed", "4096", "--model.heads", "32", "--model.mlp", "16384", "--model.layers", "32"]
        + ["--batch", "16"],
        "test",
    )
    lines = [line.split() for line in memory(described(large, 16), 16)]
    count = 32 * (12 * 4096**2 + 2 * 4096) + 320 * 4096 + 4096
    said = {line[0]: float(line[1]) for line in lines[1:]}
    share = count * 4 / 16 / 2**30
    assert said["weights"] == said["gradients"] == pytest.approx(share, abs=1e-4)
    assert said["optimizer"] == pytest.approx(2 * share, abs=1e-4)
    assert said["together"] == pytest.approx(4 * share, abs=2e-3)


def test_the_command_shows_the_first_rows(recipe, tiny_recipe, tiny_store, capsys):
    assert tiny.run("show", tiny_recipe, "--devices", 8) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{COUNT:,} parameters" in lines
    (row,) = [i for i, line in enumerate(lines) if line.startswith("row 0 of the first batch: ")]
    assert lines[row] == "row 0 of the first batch: 32 targets, 32 bear loss, 1 segment"
    store = Store.open(tiny_store)
    texts = store.split("train").tokens(0, len(store.split("train")))
    shown = "\n".join(line.removeprefix("  | ") for line in lines[row + 1 :] if line.startswith("  | "))
    assert "[[" not in shown
    # The row is one of those that the split is cut into.
    rows = [store.tokenizer.decode(texts[at + 1 : at + 33].tolist()) for at in range(0, len(texts) - 33, 32)]
    assert any(shown.startswith("\n".join(text.splitlines())) for text in rows if text.strip())
    assert any(line.startswith("6 steps x 8 rows x 32 tokens = 1.54k tokens; ") for line in lines)


def test_targets_without_loss_stand_in_brackets(tiny_store):
    tokenizer = Store.open(tiny_store).tokenizer
    ids = tokenizer.encode("the river walks")
    first = len(tokenizer.encode("the river"))
    weights = np.ones(len(ids), np.float32)
    weights[:first] = 0
    assert masked_text(tokenizer, np.array(ids), weights) == "[[the river]] walks"
    assert masked_text(tokenizer, np.array(ids), 1 - weights) == "the river[[ walks]]"
    assert masked_text(tokenizer, np.array(ids), np.ones(len(ids))) == "the river walks"
    assert masked_text(tokenizer, np.array(ids), np.zeros(len(ids))) == "[[the river walks]]"
    long = np.array(ids * 100)
    assert masked_text(tokenizer, long, np.ones(len(long))) == ("the river walks" * 100)[:400] + " ..."
