"""Runs in this process, on 8 devices: what they write, refuse, and survive."""

import gzip
import json
import math
import re
import shutil
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from mosaicjax import recipe_file
from mosaicjax.checkpoint import Checkpoints
from mosaicjax.errors import InputError
from mosaicjax.feed import Feed
from mosaicjax.report.live import LiveLine
from mosaicjax.run import prepare
from mosaicjax.stop_request import StopRequest
from mosaicjax.train import Run, train
from tests import jobs, tiny
from tests.models import oracle

NO_EVAL = ("--eval.every", 0, "--log.tensorboard", "False")
RELATIVE = 1e-5


def opened(recipe, out, *options):
    """A run prepared as the command prepares it, by the library."""
    loaded = recipe_file.load(str(recipe), [str(option) for option in options])
    return prepare(loaded, str(out), lambda text: None)


def trained(ready):
    line = LiveLine(sys.stdout, time.monotonic)
    with tiny.quick():
        return train(ready, started=time.time(), say=lambda text: None, line=line)


def naive_loss(config, weights, batch):
    """Mean cross-entropy of a batch by the float64 oracle."""
    logits = oracle.logits(config, weights, batch["tokens"])
    lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    chosen = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    return float(np.average(lse - chosen, weights=batch["weights"]))


def test_a_run_leaves_what_it_takes_to_read_it(tiny_run, tiny_recipe):
    assert [row["step"] for row in tiny.metrics(tiny_run)] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in tiny.metrics(tiny_run, "eval")] == [4, 6]
    assert [row["tokens"] for row in tiny.metrics(tiny_run)] == [8 * 32 * n for n in range(1, 7)]
    assert tiny.complete(tiny_run) == [3, 6]
    about = json.loads((tiny_run / "run.json").read_text())
    assert about["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1} and about["seed"] == 3
    assert about["packages"]["jax"] == jax.__version__
    assert (tiny_run / "recipe.py").read_text() == tiny_recipe.read_text()
    assert (tiny_run / "sample.txt").read_text() and (tiny_run / "loss.png").read_bytes()[1:4] == b"PNG"
    # embed and head are one table; per layer 4 x 32 x 32 of attention, 2 x 32 x 64 of MLP, 2 norms of 32.
    assert about["parameters"] == 320 * 32 + 2 * (4 * 32 * 32 + 2 * 32 * 64 + 2 * 32) + 32
    peak = 2e-3
    warm = [peak * n / 4 for n in (1, 2, 3, 4)]
    cosine = [peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * n / 2))) for n in (0, 1)]
    np.testing.assert_allclose([row["lr"] for row in tiny.metrics(tiny_run)], warm + cosine, rtol=1e-6)


def test_the_time_is_accounted_for(tiny_run):
    summary = json.loads((tiny_run / "summary.json").read_text())
    seconds = summary["seconds"]
    parts = {name: value for name, value in seconds.items() if name != "total"}
    assert set(parts) == {"compile", "evaluate", "save", "data_wait", "train", "other"}
    assert all(value >= 0 for value in parts.values()), parts
    assert all(parts[name] > 0 for name in ("compile", "evaluate", "save", "train"))
    assert math.isclose(sum(parts.values()), seconds["total"], rel_tol=1e-9)
    assert summary["tokens"] == 6 * 8 * 32 and summary["steps"] == 6
    assert summary["loss"]["train"] == tiny.losses(tiny_run)[-1]
    assert summary["heldout"]["loss"] == pytest.approx(tiny.metrics(tiny_run, "eval")[-1]["loss"], rel=1e-12)
    steps = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    spent = sum(row["time"]["step_seconds"] for row in steps if row["kind"] == "train")
    assert math.isclose(spent, seconds["train"] + seconds["data_wait"], rel_tol=1e-6)


def test_a_profile_holds_the_named_parts_of_the_step(tiny_run):
    traces = list((tiny_run / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    trace = traces[0].read_bytes()
    for scope in (b"optimizer", b"gradients", b"block0"):
        assert scope in trace, scope
    assert not list((tiny_run / "checkpoints").rglob("*.xplane.pb"))
    assert list((tiny_run / "profile").rglob("*.trace.json.gz"))


@pytest.fixture(scope="module")
def continued(tiny_run, tiny_recipe, tmp_path_factory):
    """One step from the weights of another run."""
    out = tmp_path_factory.mktemp("continued") / "run"
    options = ("--init-from", tiny_run, "--log.norms", "True", "--steps", 1, "--seed", 5)
    tiny.train(tiny_recipe, out, *options, *NO_EVAL)
    return out


def test_init_from_takes_the_weights_alone(continued, tiny_run, tiny_recipe, tiny_store):
    (row,) = tiny.metrics(continued)
    recipe = recipe_file.from_run(str(continued)).recipe
    batch = first_batch(recipe)
    expected = naive_loss(recipe.model, tiny.weights(tiny_run, 6), batch)
    assert row["loss"] == pytest.approx(expected, rel=RELATIVE)
    assert (row["step"], row["tokens"], row["lr"]) == (1, 256, pytest.approx(2e-3 / 4))
    arrays = tiny.arrays(continued, 1)
    counts = [array for name, array in arrays.items() if name.startswith("optimizer") and array.ndim == 0]
    assert counts and all(count == 1 for count in counts) and arrays["step"] == 1


@pytest.mark.slow
def test_prompts_bear_no_loss(tiny_run, tiny_store, tmp_path, capsys):
    """From rows of prompt and response to a run's loss and its tokens."""
    lines = (tiny_store.parent / "documents.jsonl").read_text().splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for text in documents:
            file.write(
                json.dumps({"prompt": text[: len(text) // 2], "response": text[len(text) // 2 :]}) + "\n"
            )
    store, tokenizer = tmp_path / "store", tiny_store.parent / "tokenizer"
    build = ("data", "build", rows, "--out", store, "--tokenizer", tokenizer, "--held-out", 0.1)
    assert tiny.run(*build, "--format", "prompt") == 2
    assert "--format and --loss-on are of conversations; fix: --template" in capsys.readouterr().err
    assert tiny.run(*build, "--template", "plain", "--loss-on", "answer") == 2
    assert "no such --loss-on; expected response or last or all; got answer" in capsys.readouterr().err
    assert tiny.run(*build, "--template", "plain") == 0
    assert tiny.run("data", "inspect", store) == 0
    share = float(re.search(r"tokens that bear loss: [\d,]+, ([\d.]+)%", capsys.readouterr().out)[1])
    recipe, out = tiny.write_recipe(tmp_path / "masked.py", store), tmp_path / "run"
    tiny.train(recipe, out, "--init-from", tiny_run, "--steps", 1, "--eval.every", 1)
    (row,) = tiny.metrics(out)
    recipe = recipe_file.from_run(str(out)).recipe
    batch = first_batch(recipe)
    assert row["tokens"] == batch["weights"].sum() and 40 < share < 65
    assert abs(row["tokens"] / 256 - share / 100) < 0.1
    expected = naive_loss(recipe.model, tiny.weights(tiny_run, 6), batch)
    assert row["loss"] == pytest.approx(expected, rel=RELATIVE)
    everywhere = naive_loss(recipe.model, tiny.weights(tiny_run, 6), batch | {"weights": np.ones((8, 32))})
    assert row["loss"] != pytest.approx(everywhere, rel=1e-3)


@pytest.mark.slow
def test_norms_are_those_of_a_naive_gradient(continued, tiny_run):
    (row,) = tiny.metrics(continued)
    recipe = recipe_file.from_run(str(continued)).recipe
    weights, batch = tiny.weights(tiny_run, 6), first_batch(recipe)
    scale = weights["stacks"][0][0]["layer"]["attention_norm"]["scale"] = np.array(
        weights["stacks"][0][0]["layer"]["attention_norm"]["scale"], np.float64
    )
    slope, width = np.zeros(32), 1e-4
    for i in range(32):
        scale[1, i] += width
        slope[i] = naive_loss(recipe.model, weights, batch)
        scale[1, i] -= 2 * width
        slope[i] = (slope[i] - naive_loss(recipe.model, weights, batch)) / (2 * width)
        scale[1, i] += width
    rms = math.sqrt(np.mean(slope**2))
    name = "stacks/0/0/layer/attention_norm/scale"
    assert row[f"grad_rms/{name}.1"] == pytest.approx(rms, rel=1e-4)
    assert f"grad_rms/{name}.2" not in row and row[f"grad_rms/{name}.0"] != row[f"grad_rms/{name}.1"]
    # AdamW's first update of a weight that does not decay is the learning rate, up or down.
    assert row[f"update_rms/{name}.1"] == pytest.approx(row["lr"], rel=1e-3)
    embedded = weights["embed"]["tokens"][batch["tokens"]].astype(np.float64)
    assert row["activation_rms.0"] == pytest.approx(math.sqrt(np.mean(embedded**2)), rel=RELATIVE)
    assert "activation_rms.2" in row and "activation_rms.3" not in row
    # The norm of all gradients, before they are clipped, is what their parts add up to.
    counts = {path: np.array(leaf).size for path, leaf in leaves(weights)}
    total = 0.0
    for path, size in counts.items():
        layers = [row[key] for key in row if key.startswith(f"grad_rms/{path}.")]
        each = layers or [row[f"grad_rms/{path}"]]
        total += sum(value**2 * size / len(each) for value in each)
    assert row["grad_norm"] == pytest.approx(math.sqrt(total), rel=RELATIVE)


def leaves(tree, prefix=""):
    for name, part in tree.items():
        if isinstance(part, dict):
            yield from leaves(part, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", part


def first_batch(recipe):
    from mosaicjax.run_data import open_data

    return open_data(recipe).stream.rows(0, range(recipe.batch))


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(("--mesh.fsdp", 2, 2, "--mesh.tensor", 2), marks=pytest.mark.slow),
        ("--mesh.data", 2, "--mesh.fsdp", 4, "--mesh.gather", "explicit", "--microbatch", 8),
    ],
    ids=["2 x 2 x tensor 2", "data 2 x fsdp 4, explicit"],
)
def test_another_mesh_goes_on_with_the_same_losses(tiny_run, tmp_path, mesh, capsys):
    out = tiny.copy_run(tiny_run, tmp_path / "run", until=3)
    logged = (out / "metrics.jsonl").read_text().splitlines()
    tiny.train(out, out, *mesh, *NO_EVAL, "--log.norms", "False")
    said = capsys.readouterr().out
    assert "going on after step 3\n" in said and "changed since the last time: mesh.fsdp: [-1] -> " in said
    np.testing.assert_allclose(tiny.losses(out), tiny.losses(tiny_run), rtol=RELATIVE)
    assert tiny.rows(out)[:3] == tiny.rows(tiny_run)[:3]
    # What was done after the checkpoint was done in vain, and is paid for.
    elapsed = max(json.loads(line)["time"].get("elapsed_seconds", 0.0) for line in logged)
    seconds = json.loads((out / "summary.json").read_text())["seconds"]
    assert seconds["total"] > elapsed and seconds["other"] > 0


@pytest.mark.slow
def test_one_device_goes_on_with_the_same_losses(tiny_run, tmp_path):
    out = tiny.copy_run(tiny_run, tmp_path / "run", until=3)
    (result,) = tiny.ended([tiny.launch("train", out, devices=1)])
    assert result.returncode == 0 and "on 1 device;" in result.stdout, result
    np.testing.assert_allclose(tiny.losses(out), tiny.losses(tiny_run), rtol=RELATIVE)


def test_safe_changes_are_said_and_go_on(tiny_run, tiny_store, tmp_path, capsys):
    out = tiny.copy_run(tiny_run, tmp_path / "run", until=6)
    store = tmp_path / "moved"
    shutil.copytree(tiny_store, store)
    options = ("--steps", 8, "--save.every", 1, "--optimizer.lr.peak", "1e-3", "--data.path", store)
    tiny.train(out, out, *options, *NO_EVAL)
    lines = capsys.readouterr().out.splitlines()
    for change in (
        "steps: 6 -> 8",
        "save.every: 3 -> 1",
        "optimizer.lr.peak: 0.002 -> 0.001",
        f"data.path: {tiny_store} -> {store}",
    ):
        assert f"changed since the last time: {change}" in lines
    assert "going on after step 6" in lines
    assert tiny.rows(out)[:6] == tiny.rows(tiny_run)[:6] and len(tiny.losses(out)) == 8
    assert tiny.metrics(out)[-1]["lr"] == pytest.approx(
        1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 3 / 4)))
    )
    before, after = (json.loads((run / "summary.json").read_text()) for run in (tiny_run, out))
    assert after["seconds"]["total"] > before["seconds"]["train"] and after["steps"] == 8
    assert tiny.run("train", out) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "finished already, at step 8; more --steps go on from there"
    )


@pytest.mark.slow
def test_a_run_killed_before_its_summary_gets_one(tiny_run, tmp_path, capsys):
    out = tiny.copy_run(tiny_run, tmp_path / "run", until=6)
    for name in ("summary.json", "loss.png", "sample.txt"):
        (out / name).unlink()
    tiny.train(out, out)
    assert "finished already" not in capsys.readouterr().out
    assert tiny.rows(out) == tiny.rows(tiny_run)
    assert (out / "sample.txt").read_bytes() == (tiny_run / "sample.txt").read_bytes()
    summaries = [json.loads((run / "summary.json").read_text()) for run in (out, tiny_run)]
    for part in ("loss", "heldout", "steps", "tokens"):
        assert summaries[0][part] == summaries[1][part]
    tiny.train(out, out)
    assert "finished already" in capsys.readouterr().out


def test_unsafe_changes_leave_the_run_alone(tiny_run, tmp_path, capsys):
    out = tiny.copy_run(tiny_run, tmp_path / "run", until=6)
    other = tiny.build_store(tmp_path / "other", seed=1)
    before = tiny.contents(out)
    for options, reason in {
        ("--seed", 4): "was trained by another recipe (seed: 3 -> 4)",
        ("--model.layers", 4, "--batch", 16): "(model.layers: 2 -> 4; batch: 8 -> 16)",
        ("--data.path", other, "--steps", 9): "was trained on other tokens than the store holds now",
    }.items():
        assert tiny.run("train", out, *options) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1
        assert tiny.contents(out) == before


OWN = """
from dataclasses import dataclass

from mosaicjax.layers.position import Alibi


@dataclass(frozen=True)
class Gentle(Alibi):
    share: float = 0.5

    def slopes(self, heads):
        return self.share * super().slopes(heads)
"""


@pytest.mark.slow
def test_a_run_can_be_had_again_from_its_directory_alone(tiny_store, tmp_path):
    model = "mpt.Config(layers=2, embed=32, heads=2, mlp=64, vocab=320, position=Gentle(share=0.25))"
    recipe = tiny.write_recipe(tmp_path / "own.py", tiny_store, before=OWN, model=model)
    first, second = tmp_path / "first", tmp_path / "second"
    tiny.train(recipe, first, "--steps", 2, *NO_EVAL)
    recipe.unlink()
    (first / "checkpoints").rename(tmp_path / "elsewhere")
    tiny.train(first, second)
    assert tiny.rows(first) == tiny.rows(second)
    assert (first / "recipe.json").read_text() == (second / "recipe.json").read_text()
    assert (first / "recipe.py").read_text() == (second / "recipe.py").read_text()


class Unreadable:
    """Rows of which some, by step or number, cannot be read."""

    def __init__(self, rows, broken):
        self._rows, self._broken = rows, broken

    def __getattr__(self, name):
        return getattr(self._rows, name)

    def __len__(self):
        return len(self._rows)

    def rows(self, *where):
        if self._broken():
            raise InputError("shard c/7 is damaged")
        return self._rows.rows(*where)


def test_an_unreadable_batch_stops_after_the_last_readable_one(tiny_recipe, tmp_path):
    out = tmp_path / "run"
    ready = opened(tiny_recipe, out, "--steps", 20, "--save.every", 0, *NO_EVAL)
    calls = iter(range(100))
    stream = Unreadable(ready.data.stream, lambda: next(calls) >= 5)
    with pytest.raises(InputError, match="^shard c/7 is damaged$"):
        trained(replace(ready, data=replace(ready.data, stream=stream)))
    assert tiny.complete(out) == [5] and len(tiny.losses(out)) == 5


def test_unreadable_held_out_rows_lose_no_step(tiny_recipe, tmp_path):
    out = tmp_path / "run"
    ready = opened(tiny_recipe, out, "--save.every", 0)
    held_out = Unreadable(ready.data.held_out, lambda: True)
    with pytest.raises(InputError, match="^shard c/7 is damaged$"):
        trained(replace(ready, data=replace(ready.data, held_out=held_out)))
    assert tiny.complete(out) == [4] and len(tiny.losses(out)) == 4


@pytest.mark.slow
def test_what_one_process_cannot_read_stops_both(tiny_recipe, tmp_path):
    out = tmp_path / "run"
    results = jobs.run_job("train_worker.py", "unreadable", tiny_recipe, out)
    for result in results:
        assert result.returncode == 2, result
        assert result.stderr.splitlines()[-1] == "process 1: shard c/7 is damaged"
    assert tiny.complete(out) == [5] and len(tiny.losses(out)) == 5


class Watched:
    """A metric that notes when it is read."""

    def __init__(self, value, note):
        self._value, self._note = value, note

    def __array__(self, dtype=None, copy=None):
        self._note()
        return np.asarray(self._value)


def test_metrics_are_read_while_the_next_step_runs(tiny_recipe, tmp_path):
    ready = opened(tiny_recipe, tmp_path / "run", "--save.every", 0, *NO_EVAL)
    with tiny.quick():
        run = Run(ready, time.time(), lambda text: None, LiveLine(sys.stdout, time.monotonic))
    events = []
    compiled = run.compiled

    def watched(state, *rest):
        number = run.number + 1
        events.append(("step", number))
        state, halted, metrics = compiled(state, *rest)

        def note():
            if events[-1] != ("read", number):
                events.append(("read", number))

        return state, halted, {name: Watched(value, note) for name, value in metrics.items()}

    run.compiled = watched
    with run.log, run.checkpoints, StopRequest() as stop:
        with Feed(ready.data.stream, ready.steps, 0, 6) as feed:
            run.loop(feed, stop, None)
    order = [("step", 1)]
    for number in range(2, 7):
        order += [("step", number), ("read", number - 1)]
    assert events == [*order, ("read", 6)]


def test_evaluate_tells_the_bits_of_model_and_gzip(tiny_run, tiny_store, capsys):
    assert tiny.run("evaluate", tiny_run) == 0
    title, model, packed, perplexity, *by_position = capsys.readouterr().out.splitlines()
    documents = held_out_documents(tiny_store)
    size = sum(map(len, documents))
    assert title == f"{tiny_run}, step 6, on {len(documents)} held-out documents of {size:,} bytes:"
    row = tiny.metrics(tiny_run, "eval")[-1]
    bits = sum(8 * len(gzip.compress(document, 9, mtime=0)) for document in documents)
    assert packed.split()[2:6] == [f"{bits:,}", "bits,", f"{bits / size:.4f}", "a"]
    targets = int(model.split("(")[1].split()[0].replace(",", ""))
    # Printed to the whole bit, and its evaluation is compiled anew.
    printed, expected = int(model.split()[1].replace(",", "")), row["loss"] * targets / math.log(2)
    assert printed == pytest.approx(expected, rel=1e-5, abs=0.6)
    assert float(perplexity.split()[1]) == pytest.approx(math.exp(row["loss"]), rel=1e-3)
    head, *groups = (line.split() for line in by_position)
    assert head[:2] == ["tokens", "before"]
    # Rows of 32; weighed by tokens, the groups make up the whole.
    assert [line[2] for line in groups] == ["16", "32"]
    counts = [int(line[-1].replace(",", "")) for line in groups]
    assert sum(counts) == targets
    mean = sum(count * float(line[3]) for count, line in zip(counts, groups, strict=True)) / targets
    assert mean == pytest.approx(row["loss"], rel=1e-4)


def held_out_documents(store):
    """The bytes of the held-out documents, found again among those that the store was built of."""
    from mosaicjax.data.store import Store

    opened = Store.open(store)
    split = opened.split("validation")
    tokens = split.tokens(0, len(split))
    cuts = np.flatnonzero(tokens == opened.manifest.tokenizer.separator)
    pieces = [
        opened.tokenizer.decode_bytes(tokens[a + 1 : b].tolist())
        for a, b in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    lines = (store.parent / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {json.loads(line)["text"].encode() for line in lines}
    assert set(pieces) <= texts and len(pieces) == len(set(pieces))
    return pieces


def test_skipped_data_steps_are_left_out_and_may_be_added_later(tiny_recipe, tiny_run, tmp_path, capsys):
    stream = opened(tiny_recipe, tmp_path / "plain").data.stream
    skipping = opened(tiny_recipe, tmp_path / "skipping", "--skips", 2, 5).data.stream
    for step, data_step in enumerate([0, 1, 3, 4, 6]):
        ours, plain = skipping.rows(step, range(8)), stream.rows(data_step, range(8))
        np.testing.assert_array_equal(ours["tokens"], plain["tokens"])
    out = tiny.copy_run(tiny_run, tmp_path / "run", until=3)
    # Data steps 0 to 2 are trained by then: 4 can still be left out, 1 cannot.
    assert tiny.run("train", out, "--skips", 1) == 2
    assert "has left out other data steps so far" in capsys.readouterr().err
    assert tiny.run("train", out, "--skips", 4, "--steps", 5, *NO_EVAL) == 0
    assert "skips: [] -> [4]" in capsys.readouterr().out
    losses, whole = tiny.losses(out), tiny.losses(tiny_run)
    np.testing.assert_array_equal(losses[:3], whole[:3])
    assert json.loads((out / "recipe.json").read_text())["skips"] == [4]
    cursor = Checkpoints(str(out)).cursor(5)
    assert (cursor["skips"], cursor["tokens"]) == ([4], 5 * 8 * 32)


OWN_ATTENTION = '''
from dataclasses import dataclass

from mosaicjax.layers.attention import Attention


@dataclass(frozen=True)
class Halved(Attention):
    """Attention at half strength."""

    def apply(self, weights, x_BLD, context, kv, layer):
        out_BLD, kv = super().apply(weights, x_BLD, context, kv, layer)
        return out_BLD * 0.5, kv

'''


@pytest.mark.slow
def test_an_attention_of_ones_own_and_its_code(tiny_store, tmp_path, capsys):
    model = "mpt.Config(layers=2, embed=32, heads=2, mlp=64, vocab=320, attention=Halved())"
    own = tiny.write_recipe(tmp_path / "own.py", tiny_store, before=OWN_ATTENTION, model=model)
    plain = tiny.write_recipe(tmp_path / "plain.py", tiny_store)
    out = tmp_path / "run"
    tiny.train(own, out, "--steps", 3, *NO_EVAL)
    tiny.train(plain, tmp_path / "plain", "--steps", 3, *NO_EVAL)
    ready = opened(own, tmp_path / "other")
    batch = ready.data.stream.rows(0, range(8))
    weights = jax.tree.map(np.float64, jax.tree.map(np.asarray, ready.step.init().trainable))
    # Half the attention's output is a layer whose projection out of it is halved.
    halved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf / 2 if "'attention'" in str(path) and "'out'" in str(path) else leaf, weights
    )
    whole = recipe_file.load(str(plain)).recipe.model
    assert tiny.losses(out)[0] == pytest.approx(naive_loss(whole, halved, batch), rel=RELATIVE)
    assert tiny.losses(tmp_path / "plain")[0] == pytest.approx(
        naive_loss(whole, weights, batch), rel=RELATIVE
    )
    capsys.readouterr()
    own.write_text(
        own.read_text().replace('"""Attention at half strength."""', '"""The same."""  # a comment')
    )
    own.write_text(own.read_text().replace("out_BLD * 0.5", "out_BLD * 0.25"))
    assert tiny.run("train", own, "--out", out, "--steps", 4, *NO_EVAL) == 2
    assert "was trained by other code" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_without_a_checkpoint_takes_another_recipe(tiny_recipe, tmp_path, capsys):
    out = tmp_path / "run"
    ready = opened(tiny_recipe, out, "--steps", 20, "--save.every", 0, *NO_EVAL)
    stream = Unreadable(ready.data.stream, lambda: True)
    with pytest.raises(InputError):
        trained(replace(ready, data=replace(ready.data, stream=stream)))
    assert (out / "recipe.json").exists() and tiny.complete(out) == []
    assert tiny.run("train", tiny_recipe, "--out", out, "--batch", 16, "--steps", 2, *NO_EVAL) == 0
    assert len(tiny.losses(out)) == 2


@pytest.mark.slow
def test_processes_given_different_recipes_refuse(tiny_recipe, tmp_path):
    address = jobs.free_address()
    place = ("--processes", 2, "--coordinator", address, "--cpu-devices", 4, "--out", tmp_path / "run")
    processes = [
        tiny.launch("train", tiny_recipe, *place, "--process", index, "--seed", 3 + index) for index in (0, 1)
    ]
    for result in tiny.ended(processes):
        assert result.returncode == 2, result
        assert "process 1 was given another recipe or other data than process 0" in result.stderr
    assert tiny.complete(tmp_path / "run") == []


def test_narrow_explicit_sums_are_refused_where_xla_would_crash(tiny_recipe, tmp_path, capsys):
    words = ("--mesh.gather", "explicit", "--mesh.sums", "compute", "--dtypes.compute", "bfloat16")
    assert tiny.run("train", tiny_recipe, "--out", tmp_path / "run", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "XLA for CPUs cannot sum bfloat16 over devices by explicit gathers; fix: --mesh.sums reduce" in line
    )
