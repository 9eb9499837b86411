"""A run of adapters: what it saves, goes on from, and is used as; and refusals of other weights under it."""

import json
import shutil

import numpy as np
import pytest

from mosaicjax.adapters import Adapter
from mosaicjax.hub import export_model, start
from mosaicjax.mesh import shardings
from mosaicjax.spec import join
from tests import tiny
from tests.methods.test_lora import effective
from tests.models import forward

pytestmark = pytest.mark.slow
LORA = "LoRA(rank=4, alpha=8.0)"
STEPS = 6


def write_lora(path, store, base, methods=f"(ClipGradients(norm=1.0), {LORA})"):
    """The tiny recipe with adapters, on a run's weights."""
    before = "from mosaicjax.methods.ema import Ema\nfrom mosaicjax.methods.lora import LoRA\n"
    optimizer = "AdamW(lr=Cosine(peak=2e-2, warmup=2, final=0.5))"
    tiny.write_recipe(path, store, before=before, methods=methods, optimizer=optimizer)
    path.write_text(path.read_text().replace("    seed=3,", f"    seed=3,\n    init_from={str(base)!r},"))
    return path


@pytest.fixture(scope="module")
def base(tiny_recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "base"
    tiny.train(tiny_recipe, out, "--model.mlp", 128, "--steps", 12, "--save.every", 0, "--eval.every", 0)
    return out


@pytest.fixture(scope="module")
def recipe(tiny_store, base):
    return write_lora(base.parent / "lora.py", tiny_store, base)


@pytest.fixture(scope="module")
def run(recipe):
    out = recipe.parent / "lora"
    tiny.train(recipe, out, "--model.mlp", 128)
    return out


def weights_of(path, family):
    """A directory's weights as the package reads them, as numpy."""
    import jax

    spec, layout = family.decoder().spec(), forward.one_device()
    abstract = spec.abstract("float32", shardings(spec, layout))
    return jax.tree.map(np.asarray, start.weights(str(path), start.NEWEST, abstract))


def by_hand(run, base, step=STEPS, field="adapters"):
    """The base's weights and the adapters as trees, from the arrays of both checkpoints alone."""
    family = start.described(base)[0]
    spec, arrays = family.decoder().spec(), tiny.arrays(run, step)
    under = tiny.arrays(base, max(tiny.complete(base)))
    names = [name for name, _ in spec.items()]
    weights, adapters = (
        iter([under["trainable." + name.replace("/", ".")] for name in names]),
        iter([adapter_of(arrays, f"{field}." + name.replace("/", ".")) for name in names]),
    )
    return spec.map(lambda _: next(weights)), spec.map(lambda _: next(adapters))


def adapter_of(arrays, name):
    if f"{name}.a" not in arrays:
        return None
    summed = 2 if name.endswith("out") else 1
    return Adapter(arrays[f"{name}.a"], arrays[f"{name}.b"], 2.0, summed)


def tokens(vocab, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, (2, 24))


def test_a_checkpoint_holds_adapters_alone(run):
    arrays = tiny.arrays(run, STEPS)
    weights = {
        name: array for name, array in arrays.items() if name.split(".")[0] in ("trainable", "adapters")
    }
    # Two layers of embed 32, two heads of 16, mlp 128, rank 4: six matrices, a [in, 4] and b [4, out].
    each = 4 * (32 + 32) * 4 + 2 * 4 * (32 + 128)
    assert sum(array.size for array in weights.values()) == 2 * each
    assert all(name.startswith("adapters.stacks.0.0.layer.") for name in weights)
    moments = [array.size for name, array in arrays.items() if name.startswith("optimizer.") and array.ndim]
    assert sum(moments) == 2 * 2 * each
    assert all(array.any() for array in weights.values())


def test_merged_weights_do_what_adapters_beside_them_do(run, base, tmp_path):
    """Exported, or read to generate: both are the base's with a b added; logits as with adapters beside."""
    family = start.described(base)[0]
    weights, adapters = by_hand(run, base)
    beside = forward.logits(family.decoder(), join(adapters, weights), tokens(family.vocab))
    export_model(str(run), str(tmp_path / "hf"))
    for path in (run, tmp_path / "hf"):
        merged = weights_of(path, family)
        jax_close(merged, effective(adapters, weights))
        assert np.abs(forward.logits(family.decoder(), merged, tokens(family.vocab)) - beside).max() < 1e-5
    plain = forward.logits(family.decoder(), weights, tokens(family.vocab))
    assert np.abs(plain - beside).max() > 1e-2


def jax_close(got, expected):
    import jax

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, expected)


def test_held_out_loss_is_that_of_the_base_and_then_that_of_merged_weights(run, base, capsys):
    first, *_, last = tiny.metrics(run, "eval")
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(tiny.metrics(base, "eval")[-1]["loss"], rel=1e-5)
    assert last["step"] == STEPS and last["loss"] < first["loss"] - 0.05
    assert tiny.run("evaluate", run) == 0
    assert f"{last['bits_per_byte']:.4f} a byte" in capsys.readouterr().out


def test_a_killed_run_goes_on_as_if_it_had_not_been(run, recipe, tmp_path):
    resumed = tiny.copy_run(run, tmp_path / "resumed", until=3)
    (resumed / "summary.json").unlink()
    tiny.train(recipe, resumed, "--model.mlp", 128)
    assert tiny.rows(resumed) == tiny.rows(run)
    ours, theirs = (tiny.arrays(path, STEPS) for path in (resumed, run))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.soak
def test_two_processes_train_the_same(run, recipe, tmp_path):
    job = tiny.launch_job("train", recipe, "--out", tmp_path / "job", "--model.mlp", 128)
    for process in tiny.ended(job):
        assert process.returncode == 0, process.stderr
    np.testing.assert_allclose(tiny.losses(tmp_path / "job"), tiny.losses(run), rtol=1e-5)
    assert (tmp_path / "job" / "base.json").read_bytes() == (run / "base.json").read_bytes()
    ours, theirs = (tiny.arrays(path, STEPS) for path in (tmp_path / "job", run))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-3, atol=1e-6, err_msg=name)


def test_the_average_of_adapters_is_what_is_used(tiny_store, base, tmp_path):
    recipe = write_lora(tmp_path / "ema.py", tiny_store, base, f"({LORA}, Ema(decay=0.5))")
    tiny.train(recipe, tmp_path / "ema", "--model.mlp", 128, "--dtypes.compute", "bfloat16")
    family = start.described(base)[0]
    weights, averages = by_hand(tmp_path / "ema", base, field="evaluated")
    export_model(str(tmp_path / "ema"), str(tmp_path / "hf"))
    for path in (tmp_path / "ema", tmp_path / "hf"):
        jax_close(weights_of(path, family), effective(averages, weights))


def test_adapters_on_adapters(run, tiny_store, base, tmp_path):
    """A run of adapters may begin from another: its weights are those with all of them added."""
    family = start.described(base)[0]
    tiny.train(write_lora(tmp_path / "again.py", tiny_store, run), tmp_path / "again", "--model.mlp", 128)
    weights, first = by_hand(run, base)
    _, second = by_hand(tmp_path / "again", base)
    export_model(str(tmp_path / "again"), str(tmp_path / "hf"))
    expected = effective(second, effective(first, weights))
    for path in (tmp_path / "again", tmp_path / "hf"):
        jax_close(weights_of(path, family), expected)


def test_other_weights_under_the_adapters_are_refused(run, base, tmp_path, capsys):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    about = json.loads((moved / "base.json").read_text())
    assert about["path"] == str(base) and about["step"] == 12
    for change, message in (
        ({"path": str(tmp_path / "gone")}, f"the weights that {moved} stands on are not there"),
        ({"digest": "0" * 64}, f"{base} holds other weights than those that {moved} began from"),
    ):
        (moved / "base.json").write_text(json.dumps(about | change))
        assert tiny.run("export", moved, "--out", tmp_path / "hf") == 2
        assert message in capsys.readouterr().err
        assert tiny.run("generate", moved, "--prompt", "the") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--init-from", ""), "LoRA of weights drawn from the seed, which its run would not keep"),
        (("--methods.1.rank", 0), "LoRA; expected rank of 1 or more"),
        (("--methods.1.targets", "nothing"), "'nothing' matches no weight"),
    ],
)
def test_a_run_that_cannot_be_is_refused(recipe, tmp_path, capsys, options, message):
    assert tiny.run("train", recipe, "--out", tmp_path / "run", "--model.mlp", 128, *options) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_adapters_has_none_to_export(base, run, tmp_path, capsys):
    assert tiny.run("export", base, "--out", tmp_path / "peft", "--adapter") == 2
    assert "holds no adapters" in capsys.readouterr().err
    assert tiny.run("export", run, "--out", tmp_path / "peft", "--adapter") == 2
    assert f"mosaicjax export {base} --out HF_DIR, and --base HF_DIR" in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()
