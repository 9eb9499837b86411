import fcntl
import json
import math
import os
import re
import resource

import fsspec
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from mosaicjax import cli, recipe_file
from mosaicjax.data.tokenizer import load_tokenizer
from mosaicjax.errors import InputError
from mosaicjax.hub import export_model, import_model, model_of
from mosaicjax.hub.export_model import GIGA
from mosaicjax.run import first_state, prepare
from tests import tiny
from tests.hub import models


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory):
    """A finished run of a model that Transformers has."""
    out = tmp_path_factory.mktemp("runs") / "run"
    tiny.train(tiny_recipe, out, "--model.mlp", 128)
    return out


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "hf"
    export_model(str(run), str(out))
    return out


def safetensors(folder):
    arrays = {}
    for path in sorted(folder.glob("*.safetensors")):
        arrays |= load_file(path)
    return arrays


def saved(run, step):
    """A checkpoint's weights by leaf, read with TensorStore alone."""
    arrays = tiny.arrays(run, step)
    begin = "trainable."
    return {
        name.removeprefix(begin).replace(".", "/"): array
        for name, array in arrays.items()
        if name.startswith(begin)
    }


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert (array.dtype, array.tobytes()) == (theirs[name].dtype, theirs[name].tobytes()), name


def test_weights_leave_and_come_back_to_the_last_bit(run, exported, tmp_path):
    family = model_of(str(run))
    assert_equal(models.expected(safetensors(exported), family), saved(run, 6))
    import_model(str(exported), str(tmp_path / "back"))
    assert_equal(saved(tmp_path / "back", 0), saved(run, 6))
    export_model(str(tmp_path / "back"), str(tmp_path / "again"))
    kept = tiny.contents(exported)
    again = tiny.contents(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert again[name] == kept[name], name
    assert sorted(again) == sorted(kept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shards_of_a_size_with_an_index(run, tmp_path, dtype):
    out = tmp_path / "hf"
    options = ["--dtype", dtype, "--shard-size", "20KB", "--step", "3"]
    assert cli.main(["export", str(run), "--out", str(out), *options]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    held = {file: load_file(out / file) for file in files}
    assert index["weight_map"] == {name: file for file, arrays in held.items() for name in arrays}
    sizes = {file: sum(array.nbytes for array in arrays.values()) for file, arrays in held.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for file, arrays in held.items():
        assert sizes[file] <= 20_000 or len(arrays) == 1
    expected = {name: array.astype(models.DTYPES[dtype]) for name, array in saved(run, 3).items()}
    assert_equal(models.expected(safetensors(out), model_of(str(run))), expected)
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def facts(folder):
    rows = [line.strip("| ").split(" | ") for line in (folder / "README.md").read_text().splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_the_card_has_the_runs_facts(run, exported, tmp_path):
    summary = json.loads((run / "summary.json").read_text())
    ran = json.loads((run / "run.json").read_text())
    found = facts(exported)
    count = sum(array.size for array in saved(run, 6).values())
    assert found["Parameters"] == f"{count:,}"
    assert found["Trained on"] == f"{summary['tokens']:,} tokens"
    assert found["Steps"] == "6 of 8 rows of 32 tokens"
    loss = summary["heldout"]["loss"]
    assert found["Held-out loss"] == f"{loss:.4f} nats a token, perplexity {math.exp(loss):.2f}"
    assert found["Held-out bits"] == f"{summary['heldout']['bits_per_byte']:.4f} bits a byte"
    assert found["Training loss"] == f"{summary['loss']['train']:.4f} nats a token (last step)"
    assert found["Data"] == f"token store {recipe_file.from_run(str(run)).recipe.data.path}"
    assert (found["Digest of the training tokens"], found["Commit"]) == (ran["data"], ran["git"])
    assert f"jax {jax.__version__}" in found["Packages"]
    assert found["Cost"].startswith("unknown")
    seconds = summary["seconds"]
    assert found["Goodput"] == f"{seconds['train'] / seconds['total']:.1%} of the time in steps"
    assert (run / "recipe.py").read_text().rstrip() in (exported / "README.md").read_text()
    # The summary's losses are of the run's end; at step 4 there was an evaluation, at step 3 none.
    export_model(str(run), str(tmp_path / "third"), step=3)
    third = facts(tmp_path / "third")
    assert third["Steps"] == "3 of 8 rows of 32 tokens"
    assert third["Training loss"] == f"{tiny.losses(run)[2]:.4f} nats a token (last step)"
    assert "Held-out loss" not in third and "Goodput" not in third


def test_the_configuration_and_tokenizer_are_the_runs(run, exported):
    config = json.loads((exported / "config.json").read_text())
    tokenizer = load_tokenizer(run / "tokenizer")
    assert (config["vocab_size"], config["max_seq_len"], config["dtype"]) == (320, 32, "float32")
    special = {"bos_token_id": tokenizer.separator, "eos_token_id": tokenizer.separator, "pad_token_id": None}
    assert {key: config[key] for key in special} == special
    assert json.loads((exported / "generation_config.json").read_text()) == special
    theirs = load_tokenizer(exported)
    assert theirs.encode("the river größe") == tokenizer.encode("the river größe")
    assert theirs.separator == tokenizer.separator


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shard-size", "5"], "--shard-size; expected a whole number of KB, MB or GB, as 5GB; got 5"),
        (["--shard-size", "0MB"], "--shard-size; .* got 0MB"),
        (["--step", "5"], r"no complete checkpoint of step 5 in \S+; expected one of \[3, 6\]"),
        (["--out", "{full}"], r"\S+/full is there and not empty; fix: another --out, or remove it"),
        (["--out", "{file}"], r"\S+/file is there and not empty; .*"),
    ],
)
def test_wrong_orders_are_one_line(run, tmp_path, capsys, options, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    names = {"full": tmp_path / "full", "file": tmp_path / "file"}
    options = [option.format(**names) for option in options]
    assert cli.main(["export", str(run), "--out", str(tmp_path / "hf"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"mosaicjax: {said}", line), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_knob_that_transformers_lacks_is_named(tiny_run, tmp_path, capsys):
    assert cli.main(["export", str(tiny_run), "--out", str(tmp_path / "hf")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "mlp" in line and "128" in line and "64" in line
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_no_directory(run, exported, tmp_path):
    out = tmp_path / "hf"
    killed = models.killed_at(60_000, "export", run, "--out", out)
    assert killed.returncode == -tiny.signal.SIGXFSZ, killed.stderr
    (left,) = tmp_path.iterdir()
    assert left.name == ".hf.unfinished"
    assert not (left / "config.json").exists() and (left / "model.safetensors").stat().st_size == 60_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(InputError, match="cannot write .*model.safetensors"):
            export_model(str(run), str(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    export_model(str(run), str(out))
    assert tiny.contents(out) == tiny.contents(exported)


def test_an_export_that_is_under_way_is_left_alone(run, tmp_path):
    (tmp_path / ".hf.unfinished").mkdir()
    held = os.open(tmp_path / ".hf.unfinished", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(InputError, match="another process is writing"):
            export_model(str(run), str(tmp_path / "hf"))
    finally:
        os.close(held)
    export_model(str(run), str(tmp_path / "hf"))


def test_a_remote_export_ends_with_its_configuration(run, exported):
    remote = fsspec.filesystem("memory")
    export_model(str(run), "memory://bucket/hf")
    files = {name.rsplit("/", 1)[-1]: remote.cat(name) for name in remote.find("/bucket/hf")}
    assert files == tiny.contents(exported)
    made = {name.rsplit("/", 1)[-1]: remote.created(name) for name in remote.find("/bucket/hf")}
    assert max(made, key=made.get) == "config.json"


def test_training_starts_from_an_imported_model(run, exported, tiny_store, tmp_path):
    imported = tmp_path / "imported"
    import_model(str(exported), str(imported), dtype="bfloat16")
    source = {name: array.astype(ml_dtypes.bfloat16) for name, array in saved(run, 6).items()}
    for path in (imported, exported, run):
        text = f"model_of({str(path)!r})"
        recipe = tiny.write_recipe(
            tmp_path / "recipe.py", tiny_store, before="from mosaicjax.hub import model_of", model=text
        )
        loaded = recipe_file.load(str(recipe), ["--init-from", str(path)])
        said = []
        ready = prepare(loaded, str(tmp_path / "out"), said.append)
        assert said == []
        state, _ = first_state(ready)
        expected = saved(run, 6) if path != imported else source
        for (name, _), leaf in zip(
            ready.decoder.spec().items(), jax.tree.leaves(state.trainable), strict=True
        ):
            assert leaf.dtype == np.float32
            np.testing.assert_array_equal(np.asarray(leaf), expected[name].astype(np.float32))
        back = recipe_file.from_json(recipe_file.to_json(loaded.recipe))
        assert back.model == model_of(str(path))


def test_training_refuses_another_model(exported, tiny_recipe, tmp_path):
    def prepared(*options, out="out"):
        said = []
        loaded = recipe_file.load(str(tiny_recipe), ["--init-from", str(exported), *options])
        prepare(loaded, str(tmp_path / out), said.append)
        return said

    with pytest.raises(
        InputError, match=r"holds another model .*mlp/up.*; expected .*64.*; got .*128.*model_of"
    ):
        prepared()
    assert prepared("--model.mlp", "128", "--model.residual-dropout", "0.5") == [
        "init_from: model.residual_dropout was 0.0 and is 0.5 in the recipe"
    ]
    import_model(str(exported), str(tmp_path / "imported"))
    with pytest.raises(InputError, match="holds an imported model; fix: another --out"):
        prepared("--model.mlp", "128", out="imported")


def test_a_gigabyte_is_decimal():
    assert cli._bytes("5GB") == 5 * GIGA


OWN = """
from dataclasses import dataclass


@dataclass(frozen=True)
class Mine(mpt.Config):
    spare: int = 3
"""


@pytest.mark.slow
def test_a_run_with_a_class_of_its_own_is_started_from_by_its_own_kind(tiny_store, tmp_path):
    model = "Mine(layers=2, embed=32, heads=2, mlp=64, vocab=320)"
    recipe = tiny.write_recipe(tmp_path / "own.py", tiny_store, before=OWN, model=model)
    tiny.train(recipe, tmp_path / "run", "--steps", 1, "--eval.every", 0)
    said = []
    loaded = recipe_file.load(str(recipe), ["--init-from", str(tmp_path / "run"), "--model.spare", "4"])
    ready = prepare(loaded, str(tmp_path / "out"), said.append)
    assert said == ["init_from: model.spare was 3 and is 4 in the recipe"]
    assert ready.recipe == recipe_file.from_json(recipe_file.to_json(loaded.recipe))
    with pytest.raises(
        InputError, match="is of a class in its recipe's own file; got Mine; fix: copy the class"
    ):
        model_of(str(tmp_path / "run"))
