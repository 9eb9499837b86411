import json
import re
import resource
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from mosaicjax import cli
from mosaicjax.errors import InputError
from mosaicjax.hub import import_model, model_of, start
from mosaicjax.hub.foreign_dir import open_model
from mosaicjax.hub.model_dir import read_imported
from mosaicjax.hub.read import load
from mosaicjax.mesh import Mesh, shardings
from mosaicjax.models import llama, mixtral
from mosaicjax.spec import path_name
from tests import jobs, tiny
from tests.hub import models

MESHES = (
    Mesh(fsdp=(1,)),
    Mesh(fsdp=(8,)),
    Mesh(data=2, fsdp=(2,), tensor=2),
    Mesh(fsdp=(2, 2), tensor=2),
)
LLAMA = llama.Config(
    layers=2, embed=16, heads=4, kv_heads=2, head_dim=4, mlp=24, vocab=32, tied=True, mlp_bias=True
)
LLAMA_CONFIG = LLAMA.to_hf(128)


def placed(family, mesh, dtype):
    size = mesh.data * mesh.tensor * int(np.prod(mesh.fsdp))
    layout = mesh.build(jax.devices()[:size])
    spec = family.decoder().spec()
    return spec.abstract(dtype, shardings(spec, layout))


def by_name(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_bits(tree, expected):
    found = by_name(tree)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert (array.dtype, array.tobytes()) == (expected[name].dtype, expected[name].tobytes()), name


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(
    ("family", "config", "shards"),
    [(models.FAMILY, models.CONFIG, 3), (LLAMA, LLAMA_CONFIG, 1)],
    ids=["mpt", "llama"],
)
def test_weights_reach_every_mesh_to_the_last_bit(tmp_path, mesh, family, config, shards):
    arrays = models.tensors(family)
    source = models.write(tmp_path / "hf", arrays, config, shards)
    abstract = placed(family, mesh, "float32")
    loaded = load(open_model(source), abstract)
    assert_same_bits(loaded, models.expected(arrays, family))
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == jax.tree.map(
        lambda leaf: leaf.sharding, abstract
    )
    import_model(str(source), str(tmp_path / "run"))
    assert_same_bits(start.weights(tmp_path / "run", start.NEWEST, abstract), models.expected(arrays, family))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rules", [{}, {"experts": "fsdp", "embed": "none"}], ids=["whole", "spread"])
def test_experts_reach_the_devices_that_hold_them(tmp_path, rules, dtype):
    family = mixtral.Config(layers=2, embed=16, heads=4, kv_heads=2, head_dim=4, mlp=24, vocab=32, experts=4)
    arrays = models.tensors(family, dtype)
    source = models.write(tmp_path / "hf", arrays, family.to_hf(128))
    loaded = load(open_model(source), placed(family, Mesh(fsdp=(4,), tensor=2, rules=rules), dtype))
    assert_same_bits(loaded, models.expected(arrays, family))


@pytest.mark.parametrize("stored", sorted(models.DTYPES))
@pytest.mark.parametrize("wanted", sorted(models.DTYPES))
def test_every_dtype_into_every_other(tmp_path, stored, wanted):
    arrays = models.tensors(dtype=stored)
    source = models.write(tmp_path / "hf", arrays)
    expected = {
        name: array.astype(np.float32).astype(models.DTYPES[wanted])
        for name, array in models.expected(arrays).items()
    }
    abstract = placed(models.FAMILY, MESHES[2], wanted)
    assert_same_bits(load(open_model(source), abstract), expected)
    read = import_model(str(source), str(tmp_path / "run"), dtype=wanted)
    assert (read.dtype, read.nbytes) == (wanted, sum(array.nbytes for array in arrays.values()))
    assert {array.dtype.name for array in tiny.arrays(tmp_path / "run", 0).values()} == {wanted}
    assert_same_bits(start.weights(tmp_path / "run", 0, abstract), expected)
    # Kept as they were, and cast when they are read.
    import_model(str(source), str(tmp_path / "own"))
    assert read_imported(tmp_path / "own").dtype == stored
    assert_same_bits(start.weights(tmp_path / "own", 0, abstract), expected)


def test_mixed_dtypes_rest_in_one_that_holds_all(tmp_path):
    arrays = models.tensors(dtype="bfloat16")
    arrays["transformer.norm_f.weight"] = arrays["transformer.norm_f.weight"].astype(np.float16)
    source = models.write(tmp_path / "hf", arrays)
    said = []
    assert import_model(str(source), str(tmp_path / "run"), say=said.append).dtype == "float32"
    assert "the weights are of several dtypes (bfloat16, float16): they rest in float32" in said


@pytest.mark.parametrize("with_base", [True, False])
def test_names_may_lack_the_base_and_buffers_are_ignored(tmp_path, with_base):
    arrays = models.tensors(LLAMA)
    stored = arrays | {
        "lm_head.weight": np.zeros((32, 16), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.arange(2),
    }
    named = {name if with_base else name.removeprefix("model."): array for name, array in stored.items()}
    source = models.write(tmp_path / "hf", named, LLAMA_CONFIG)
    loaded = load(open_model(source), placed(LLAMA, MESHES[0], "float32"))
    assert_same_bits(loaded, models.expected(arrays, LLAMA))


@pytest.fixture
def sharded(tmp_path):
    return models.write(tmp_path / "hf", models.tensors(), shards=2)


NORM = "transformer.norm_f.weight"


def rewrite(folder, change):
    arrays = models.tensors()
    change(arrays)
    shutil.rmtree(folder)
    models.write(folder, arrays, shards=2)


def configured(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**models.CONFIG, **changes}))


def cut(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BAD = {
    "truncated": (
        cut,
        r"hf/model-00002-of-00002.safetensors is truncated: tensor transformer\.\S+ is cut off; .*",
    ),
    "missing shard": (
        lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(),
        r"hf/model-00001-of-00002.safetensors is missing: \d+ tensors lie in it, as transformer\.\S+; .*",
    ),
    "unknown model_type": (
        lambda folder: configured(folder, model_type="rwkv"),
        r"hf/config.json: model_type is not known here; expected .*mpt.*; got 'rwkv'",
    ),
    "no model_type": (
        lambda folder: configured(folder, model_type=None),
        r"hf/config.json: model_type is not known here; expected .*; got None",
    ),
    "contradicting shape": (
        lambda folder: configured(folder, vocab_size=48),
        r"hf/model-0000\d-of-00002.safetensors: tensor transformer.wte.weight has a shape that contradicts"
        r" config.json; expected \[48, 24\]; got \[40, 24\]",
    ),
    "missing tensor": (
        lambda folder: rewrite(folder, lambda arrays: arrays.pop(NORM)),
        rf"hf lacks tensor {NORM}; expected a shape of \[24\]; got nothing",
    ),
    "unexpected tensor": (
        lambda folder: rewrite(folder, lambda arrays: arrays.update(odd=np.zeros((2, 3), np.float32))),
        r"hf/model-0000\d-of-00002.safetensors: tensor odd is not one of the model that config.json"
        r" describes; got F32 \[2, 3\]",
    ),
    "integers": (
        lambda folder: rewrite(folder, lambda arrays: arrays.update({NORM: np.arange(24)})),
        rf"hf/model-0000\d-of-00002.safetensors: tensor {NORM} is of a dtype that weights are not .* I64",
    ),
    "an index that lies": (
        lambda folder: shutil.copy(
            folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"
        ),
        r"tensor transformer\.\S+ lies in two files; got .*00001.*, .*00002.*",
    ),
    "an index of nothing": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        r"hf/model.safetensors.index.json does not say which file holds which tensor; .*",
    ),
    "no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        r"hf/config.json is no JSON; .*",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        r"hf holds no model; expected config.json; got .*",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        r"hf holds no weights; expected model.safetensors, .*",
    ),
    "overflow": (
        lambda folder: rewrite(folder, lambda arrays: arrays[NORM].__setitem__(3, 1e6)),
        rf".*hf/model-0000\d-of-00002.safetensors: tensor {NORM} has numbers that float16 cannot hold; .*",
    ),
}


@pytest.mark.parametrize("what", sorted(BAD))
def test_bad_input_is_one_line_and_leaves_no_model(sharded, tmp_path, capsys, what):
    change, said = BAD[what]
    change(sharded)
    code = cli.main(["import", str(sharded), "--out", str(tmp_path / "run"), "--dtype", "float16"])
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert re.fullmatch(rf"mosaicjax: \S*?/?{said}|mosaicjax: {said}", line), line
    with pytest.raises(InputError, match="holds no (model|checkpoint)"):
        start.weights(tmp_path / "run", start.NEWEST, placed(models.FAMILY, MESHES[0], "float32"))


def test_an_interrupted_import_looks_like_none_and_can_be_made_again(sharded, tmp_path):
    out = tmp_path / "run"
    killed = models.killed_at(8_000, "import", sharded, "--out", out)
    assert killed.returncode == -tiny.signal.SIGXFSZ, killed.stderr
    assert (out / "model.json").exists()
    with pytest.raises(InputError, match="holds no checkpoint"):
        start.weights(out, start.NEWEST, placed(models.FAMILY, MESHES[0], "float32"))
    # The same limit without its signal: the store says no, in one line.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        with pytest.raises(InputError, match="cannot (write|save)"):
            import_model(str(sharded), str(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    import_model(str(sharded), str(out))
    loaded = start.weights(out, start.NEWEST, placed(models.FAMILY, MESHES[0], "float32"))
    assert_same_bits(loaded, models.expected(models.tensors()))
    with pytest.raises(InputError, match="holds a run or a model already; fix: another --out"):
        import_model(str(sharded), str(out))


def test_an_imported_model_says_what_it_is(tmp_path, capsys):
    config = models.CONFIG | {"some_new_knob": 3, "eos_token_id": [0, 2]}
    source = models.write(tmp_path / "hf", models.tensors(), config)
    assert cli.main(["import", str(source), "--out", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "keys of config.json that were not read: some_new_knob" in told
    assert f"{source} into {tmp_path / 'run'}: mpt, 0.02M parameters in float32: " in told
    imported = read_imported(tmp_path / "run")
    assert imported.model == models.FAMILY == model_of(str(tmp_path / "run")) == model_of(str(source))
    assert (imported.dtype, imported.length, imported.around) == ("float32", 64, None)
    assert imported.special == {"bos_token_id": None, "eos_token_id": [0, 2], "pad_token_id": None}
    assert (imported.source["model_type"], imported.source["unread"]) == ("mpt", ["some_new_knob"])
    before = open_model(source).digest()
    assert imported.source["digest"] == before
    tiny.flip(source / "model.safetensors")
    assert open_model(source).digest() != before


@pytest.mark.slow
def test_two_processes_import_and_read_together(tmp_path):
    arrays = models.tensors(dtype="bfloat16")
    source = models.write(tmp_path / "hf", arrays, shards=2)
    expected = models.expected(arrays)
    bits = {name.replace("/", "."): array.view(np.uint16) for name, array in expected.items()}
    np.savez(tmp_path / "expected.npz", **bits)
    results = jobs.run_job(
        "hub_worker.py", source, tmp_path / "run", tmp_path / "expected.npz", count=2, devices=4
    )
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    found = tiny.arrays(tmp_path / "run", 0)
    assert found.keys() == {f"trainable.{name}" for name in bits}
    for name, array in bits.items():
        assert found[f"trainable.{name}"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[f"trainable.{name}"].view(np.uint16), array)
