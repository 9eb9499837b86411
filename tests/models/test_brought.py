import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mosaicjax import recipe_file
from mosaicjax.errors import InputError
from mosaicjax.mesh import Mesh
from mosaicjax.models import flops
from mosaicjax.models.brought import NnxModel
from mosaicjax.program import Phase
from mosaicjax.run_data import open_data
from mosaicjax.step import Step
from tests import stepping, tiny
from tests.models import forward

# A transformer as a user writes one, in the recipe's file.
MODULE = """
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from mosaicjax.models.brought import NnxModel


class Layer(nnx.Module):
    def __init__(self, width, heads, dropout, rngs):
        named = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 3 * width, kernel_init=named, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(3 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def __call__(self, x, mask):
        x = x + self.attention(self.norm(x), mask=mask)
        h = self.down(nnx.gelu(self.up(x)))
        return x + (self.dropout(h) if self.dropout else h)


class Transformer(nnx.Module):
    def __init__(self, vocab, width, heads, dropout, rngs):
        self.tokens = nnx.Embed(vocab, width, rngs=rngs)
        self.positions = nnx.Embed(64, width, rngs=rngs)
        self.layers = nnx.List([Layer(width, heads, dropout, rngs) for _ in range(1)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.causal = jnp.tril(jnp.ones((64, 64), bool))

    def __call__(self, tokens, positions, segments):
        length = tokens.shape[1]
        same = segments[:, :, None] == segments[:, None, :]
        mask = (same & self.causal[None, :length, :length])[:, None]
        x = self.tokens(tokens) + self.positions(positions)
        for layer in self.layers:
            x = layer(x, mask)
        return self.tokens.attend(self.norm(x))


@dataclass(frozen=True)
class Mine(NnxModel):
    width: int = 16
    heads: int = 2
    dropout: float = 0.0

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        return Transformer(self.vocab, self.width, self.heads, self.dropout, rngs)

"""
PEAK, STEPS, WARMUP = 2e-3, 6, 4


@pytest.fixture(scope="module")
def recipe(tiny_store):
    """A recipe whose documents are isolated, with a module of its own as the model."""
    path = tiny_store.parent / "own.py"
    data = f"TokenStore({str(tiny_store)!r}, isolate=True)"
    return tiny.write_recipe(path, tiny_store, before=MODULE, model="Mine(vocab=320)", data=data)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("own") / "run"
    tiny.train(recipe, out)
    return out


def cross_entropy(module, batch):
    logits = module(batch["tokens"], batch["positions"], batch["segments"])
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.sum(each * batch["weights"]) / jnp.sum(batch["weights"])


def rates():
    """The recipe's cosine, by hand."""
    for step in range(STEPS):
        done = max(step - WARMUP, 0) / (STEPS - WARMUP)
        yield PEAK * ((step + 1) / WARMUP if step < WARMUP else 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * done)))


def trained_by_hand(recipe):
    """Loss and gradient norm of every step, and the module in the end, with nnx and optax alone."""
    stream = open_data(recipe).stream
    with nnx.use_eager_sharding(False):
        module = recipe.model.module(nnx.Rngs(recipe.seed))
    weights = nnx.to_flat_state(nnx.state(module, nnx.Param))
    leaves = [leaf[...] for _, leaf in weights]
    decayed = [path[-1] in ("kernel", "embedding") for path, _ in weights]
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.inject_hyperparams(optax.adamw, static_args=("mask",))(
            0.0, b1=0.9, b2=0.95, weight_decay=1e-4 / PEAK, mask=decayed
        ),
    )
    grad = nnx.jit(nnx.value_and_grad(cross_entropy))
    state, rows = optimizer.init(leaves), []
    for step, rate in enumerate(rates()):
        loss, grads = grad(module, stream.rows(step, range(recipe.batch)))
        grads = [leaf[...] for _, leaf in nnx.to_flat_state(grads)]
        rows.append((float(loss), float(optax.tree.norm(grads))))
        state[1].hyperparams["learning_rate"] = jnp.float32(rate)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, leaves)
        leaves = optax.apply_updates(leaves, updates)
        named = zip(nnx.to_flat_state(nnx.state(module, nnx.Param)), leaves, strict=True)
        nnx.update(module, nnx.from_flat_state([(path, old.replace(new)) for (path, old), new in named]))
    return np.array(rows), module


@pytest.mark.slow
def test_a_run_is_what_nnx_and_optax_make_of_it(recipe, finished, capsys):
    loaded = recipe_file.from_file(str(recipe)).recipe
    with tiny.quick():
        expected, module = trained_by_hand(loaded)
    logged = np.array([(row["loss"], row["grad_norm"]) for row in tiny.metrics(finished)])
    np.testing.assert_allclose(logged, expected, rtol=2e-5)

    # The command, from the run directory alone, finds the bits that the module gives the held-out text.
    assert recipe_file.to_json(recipe_file.from_run(str(finished)).recipe) == recipe_file.to_json(loaded)
    assert tiny.run("evaluate", finished) == 0
    said = re.search(r"model +([\d,]+) bits, ([\d.]+) a byte \(([\d,]+) tokens\)", capsys.readouterr().out)
    held_out = open_data(loaded).held_out
    rows = held_out.rows(range(len(held_out)))
    with tiny.quick():
        mean = nnx.jit(cross_entropy)(module, rows)
    bits = float(mean) * rows["weights"].sum() / math.log(2)
    assert float(said[1].replace(",", "")) == pytest.approx(bits, rel=1e-4)
    assert said[3].replace(",", "") == f"{rows['weights'].sum():.0f}"


def test_what_a_module_cannot_do_is_said(finished, capsys):
    assert not (finished / "sample.txt").exists()
    assert tiny.run("generate", finished, "--prompt", "a") == 2
    assert capsys.readouterr().err.startswith(
        "mosaicjax: Mine is a module of one's own, which has no cache of keys and values; expected"
    )
    assert tiny.run("train", finished) == 0
    assert "finished already, at step 6" in capsys.readouterr().out
    assert tiny.run("train", finished, "--loss.chunk", 8) == 2
    assert "loss.chunk with a module of one's own" in capsys.readouterr().err


def test_show_says_what_it_counts(recipe, capsys):
    assert tiny.run("show", recipe, "--devices", 4) == 0
    said = capsys.readouterr().out
    # 320 + 64 rows of 16, attention's four and the MLP's two matrices.
    matrices = 384 * 16 + 4 * 16 * 16 + 2 * 16 * 48
    each = f"= 1.54k tokens; {6 * matrices / 1e3:.1f}k FLOPs a token (6 x the weights of its matrices;"
    assert each in said
    model = recipe_file.from_file(str(recipe)).recipe.model.build()
    assert flops.per_token(model, 32) == flops.Flops(6.0 * matrices, 6.0 * matrices)


@pytest.mark.slow
def test_resuming_changes_nothing(recipe, finished, tmp_path):
    out = tiny.copy_run(finished, tmp_path / "again", until=3)
    tiny.train(recipe, out)
    assert tiny.rows(out) == tiny.rows(finished)
    before, after = tiny.arrays(finished, 6), tiny.arrays(out, 6)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)


@pytest.mark.slow
def test_a_nan_is_told_from_the_modules_outside(finished, tmp_path, capsys):
    out = tiny.copy_run(finished, tmp_path / "broken", until=6)
    tiny.poison(out, 6, "trainable.norm.scale", 0, np.inf)
    assert tiny.run("train", out, "--steps", 8, "--eval.every", 0) == 1
    assert "first made by the module's logits (its output; microbatch 0)" in capsys.readouterr().err


MESHES = {
    "fsdp": Mesh(fsdp=(8,)),
    "explicit": Mesh(fsdp=(8,), gather="explicit"),
    "tensor": Mesh(data=2, fsdp=(2,), tensor=2),
}


@pytest.mark.slow
def test_meshes_agree_with_one_device(recipe):
    model = recipe_file.from_file(str(recipe)).recipe.model.build()

    def path(mesh, devices):
        made = stepping.program(model, Phase(16, 8, 8), packed=True)
        return stepping.train(Step(made, stepping.place(mesh, devices), seed=5), 320, 4, packed=True)[0]

    with tiny.quick():
        alone = path(Mesh(fsdp=(1,)), 1)
        for name, mesh in MESHES.items():
            np.testing.assert_allclose(path(mesh, 8), alone, rtol=1e-5, err_msg=name)


def test_weights_are_those_of_the_module(recipe):
    model = recipe_file.from_file(str(recipe)).recipe.model
    step = Step(stepping.program(model.build(), Phase(16, 8, 8)), stepping.place(Mesh(), 8), seed=9)
    with tiny.quick(), nnx.use_eager_sharding(False):
        drawn = step.init().trainable
        module = model.module(nnx.Rngs(9))
    for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        found = drawn
        for part in path:
            found = found[str(part)]
        np.testing.assert_allclose(found, leaf[...], rtol=1e-5, atol=1e-7, err_msg=str(path))
    assert len(drawn["tokens"]["embedding"].addressable_shards) == 8
    assert drawn["tokens"]["embedding"].addressable_shards[0].data.shape == (40, 16)


def test_dropout_draws_in_training_alone(recipe):
    model = dataclasses.replace(recipe_file.from_file(str(recipe)).recipe.model, dropout=0.5)
    adapter = model.build()
    assert adapter.drops and not dataclasses.replace(model, dropout=0.0).build().drops
    weights = forward.random_weights(adapter)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)

    @jax.jit
    def drawn(seed):
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(2))
        where = dataclasses.replace(forward.context(tokens), keys_B=keys)
        return forward.logits_from(adapter, weights, jnp.asarray(tokens), where)

    with tiny.quick():
        once, again, other = (np.asarray(drawn(seed)) for seed in (0, 0, 1))
        plain = forward.logits(dataclasses.replace(model, dropout=0.0).build(), weights, tokens)
        evaluated = forward.logits(adapter, weights, tokens)
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.1
    np.testing.assert_array_equal(evaluated, plain)


def test_the_layout_of_weights(recipe):
    spec = recipe_file.from_file(str(recipe)).recipe.model.build().spec()
    weights = dict(spec.items())
    axes = {name: param.axes for name, param in weights.items()}
    assert axes["layers/0/up/kernel"] == ("embed", "mlp")
    assert axes["layers/0/attention/query/kernel"] == ("sharded/16", "whole/2", "whole/8")
    assert axes["tokens/embedding"] == ("sharded/320", "whole/16")
    assert axes["layers/0/attention/query/bias"] == ("whole/2", "whole/8")
    assert axes["norm/scale"] == ("whole/16",)
    assert {name for name, param in weights.items() if not param.decay} == {
        name for name in weights if name.split("/")[-1] in ("bias", "scale")
    }


class Stacked(nnx.Module):
    """Three layers in one weight, their dim named or not."""

    def __init__(self, vocab, metadata, rngs):
        self.table = nnx.Embed(vocab, 6, rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap(transform_metadata=metadata)
        def layers(rngs):
            named = nnx.with_partitioning(nnx.initializers.ones_init(), ("embed",))
            return nnx.RMSNorm(6, scale_init=named, rngs=rngs), Factor(rngs)

        self.norm, self.factor = layers(rngs)

    def __call__(self, tokens, positions, segments):
        return self.table.attend(self.table(tokens))


class Factor(nnx.Module):
    def __init__(self, rngs):
        self.vector = nnx.Param(jnp.ones(6), out_sharding=("embed",))


class Other(nnx.Module):
    """What is asked of it goes wrong."""

    def __init__(self, wrong, rngs):
        self.wrong = wrong
        self.table = nnx.Param(jnp.ones((320, 6), jnp.int32 if wrong == "integer" else jnp.float32))
        if wrong == "state":
            self.norm = nnx.BatchNorm(6, rngs=rngs)
        if wrong == "clash":
            self.a = nnx.Param(jnp.ones((8, 4)), out_sharding=("embed", "mlp"))
            self.b = nnx.Param(jnp.ones((8, 8)), out_sharding=("embed", "mlp"))
        if wrong == "names":
            self.a = nnx.Param(jnp.ones((8, 4)), out_sharding=("embed", ("x", "y")))
        if wrong == "rule":
            self.a = nnx.Param(jnp.ones((8, 4)), out_sharding=("embed", "model"))
        if wrong == "made":
            raise KeyError("width")

    def __call__(self, tokens, positions, segments):
        if self.wrong == "called":
            raise IndexError(f"row {tokens.shape}\nand more")
        if self.wrong == "tuple":
            return tokens, positions
        table = self.table[:300] if self.wrong == "vocab" else self.table[...]
        return self.table[tokens] @ table.T


@dataclasses.dataclass(frozen=True)
class Kinds(NnxModel):
    vocab: int = 320
    wrong: str = ""

    def module(self, rngs):
        if self.wrong.startswith("stacked"):
            return Stacked(self.vocab, {nnx.PARTITION_NAME: "layers"}, rngs)
        return Other(self.wrong, rngs)


def test_a_dim_of_layers_makes_no_matrix_of_a_vector():
    weights = dict(Kinds(wrong="stacked").build().spec().items())
    assert weights["factor/vector"].axes == ("layers", "embed") and not weights["factor/vector"].decay
    assert weights["norm/scale"].axes == ("layers", "embed") and not weights["norm/scale"].decay
    assert weights["table/embedding"].decay


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("made", "the module of Kinds cannot be made; got KeyError: 'width'"),
        ("called", r"cannot be called; expected module\(.*\[1, 8\] each; got IndexError: row \(1, 8\)$"),
        ("vocab", r"returns no logits; expected floats of \[1, 8, 320\].*got float32 \[1, 8, 300\]; fix"),
        ("tuple", "returns no logits; expected floats .* got tuple"),
        ("integer", "Kinds: table; expected a floating weight; got int32"),
        ("state", "Kinds: norm/mean is a BatchStat, which is not trained"),
        ("clash", "Kinds: b: the axis 'mlp' has two sizes; expected 4; got 8"),
        ("names", "Kinds: a: names of dims; expected 2 strings or None"),
        ("rule", "no rule says where the dim 'model' goes; .*fix: mesh.rules {'model': 'none'}"),
    ],
)
def test_refused(wrong, said):
    with pytest.raises(InputError) as refused:
        model = Kinds(wrong=wrong).build()
        model.check(8)
        stepping.place(Mesh(), 8).check(model.spec())
    assert re.search(said, str(refused.value)), refused.value
    assert "\n" not in str(refused.value)


def test_a_rule_of_ones_own_lays_a_named_dim_out():
    layout = stepping.place(Mesh(fsdp=(4,), tensor=2, rules={"model": "tensor"}), 8)
    layout.check(Kinds(wrong="rule").build().spec())
    assert layout.dim("model") == ("tensor",)
    assert layout.dim("sharded/6") == ("fsdp",) and layout.dim("whole/6") == ()
