"""Width transfer: factors by hand, and training against factors in the forward pass."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaicjax import recipe_file
from mosaicjax.errors import InputError
from mosaicjax.layers.attention import QkNorm
from mosaicjax.layers.inits import InitRule
from mosaicjax.layers.mlp import Glu
from mosaicjax.layers.moe import Moe
from mosaicjax.layers.norm import RmsNorm
from mosaicjax.layers.position import Rotary
from mosaicjax.mesh import Mesh, shardings
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.methods.width_transfer import Factor, Sizes, WidthTransfer, factors, with_rates
from mosaicjax.models import gpt2, gptj, mpt
from mosaicjax.optim import AdamW, Cosine, Lion
from mosaicjax.program import Phase
from mosaicjax.recipe import Recipe
from mosaicjax.spec import Dtypes, Param, Spec
from mosaicjax.step import Step, digest
from tests import stepping, tiny

BASE = Sizes(embed=16, heads=2, mlp=32)
PHASE = Phase(seq=16, batch=8, microbatch=8)
FLOAT64 = Dtypes("float64", "float64", "float64")
ROOT = math.sqrt


def wide(**knobs):
    """Four times the base's width, in heads of its size; a hidden layer of eight times its own."""
    sizes = {"layers": 2, "embed": 64, "heads": 8, "mlp": 256, "vocab": 48}
    return mpt.Config(**(sizes | knobs)).build()


def by_kind(decoder, base=BASE):
    """Factors by the last parts of the names: layers are alike."""
    found = {}
    for name, factor in factors(decoder.spec(), base.dims()).items():
        assert found.setdefault(name.split("/layer/")[-1], factor) == factor
    return found


ALIKE = Factor(1.0, 1.0)
# 64 inputs for the base's 16; 256 of the hidden layer for 32.
FROM_STREAM, FROM_HIDDEN = Factor(0.5, 0.25), Factor(ROOT(1 / 8), 1 / 8)


def test_factors_by_hand():
    assert by_kind(wide(kv_heads=4), Sizes(16, 2, 32, kv_heads=1)) == {
        "embed/tokens": ALIKE,
        "norm/scale": Factor(0.25, 0.25),
        "attention_norm/scale": ALIKE,
        "mlp_norm/scale": ALIKE,
        "attention/query": FROM_STREAM,
        "attention/key": FROM_STREAM,
        "attention/value": FROM_STREAM,
        "attention/out": FROM_STREAM,
        "mlp/up": FROM_STREAM,
        "mlp/down": FROM_HIDDEN,
    }


def test_factors_of_biases_positions_and_heads_by_hand():
    sizes = {"layers": 1, "embed": 64, "heads": 8, "mlp": 256, "vocab": 48}
    found = by_kind(gpt2.Config(**sizes).build())
    alike = ("embed/positions", "attention/query_bias", "attention/out_bias", "mlp/up_bias", "mlp/down_bias")
    assert {found[name] for name in alike} == {ALIKE}
    assert found["norm/bias"] == found["norm/scale"] == Factor(0.25, 0.25)
    # One norm in each layer, of the last norm's name.
    found = factors(gptj.Config(**sizes).build().spec(), BASE.dims())
    assert found["head"] == found["head_bias"] == found["stacks/0/0/layer/norm/scale"] == ALIKE
    assert found["norm/bias"] == found["norm/scale"] == Factor(0.25, 0.25)


def test_factors_of_experts_by_hand():
    found = by_kind(wide(ffn=Moe(), experts=4))
    # A router has as many outputs at any width: its sums are of 4 times the terms, all alike after a step.
    assert found["mlp/router"] == Factor(0.25, 0.25)
    assert found["mlp/gate"] == found["mlp/up"] == FROM_STREAM and found["mlp/down"] == FROM_HIDDEN


def test_factors_of_longer_heads_by_hand():
    # Two heads of 32 for two of 8: scores are to be divided by 32 / sqrt(8), not by sqrt(32).
    long = {"heads": 2, "embed": 64}
    found = by_kind(wide(**long, bias=True))
    assert found["attention/query"] == Factor(0.5 * 0.5, 0.25 * 0.5)
    assert found["attention/query_bias"] == Factor(0.5, 0.5)
    assert found["attention/key"] == FROM_STREAM and found["attention/out"] == FROM_STREAM
    normed = by_kind(wide(**long, bias=True, qk_norm=QkNorm(per_head=True)))
    assert normed["attention/query"] == FROM_STREAM and normed["attention/query_bias"] == ALIKE
    assert normed["attention/query_norm/scale"] == Factor(0.5, 0.5)
    assert normed["attention/key_norm/scale"] == ALIKE


def transferred(decoder, base=BASE, **options):
    return WidthTransfer(base)(stepping.program(decoder, PHASE, **options))


def drawn(spec, names):
    """A draw of each of some weights, all from one key."""
    params, key = dict(spec.items()), jax.random.key(0)
    return {
        name: np.asarray(params[name].init.draw(key, params[name].shape(spec.dims), spec.dims))
        for name in names
    }


@pytest.mark.parametrize("init", [InitRule(), mpt.Config().init])
def test_weights_start_as_wide_as_the_base_says(init):
    ratios = {
        "embed/tokens": 1.0,
        "stacks/0/0/layer/mlp/down": ROOT(1 / 32),
    }
    program = transferred(wide(embed=256, heads=32, mlp=1_024, vocab=512, init=init))
    base = drawn(wide(embed=16, heads=2, mlp=32, vocab=512, init=init).spec(), ratios)
    for name, array in drawn(program.trainable, ratios).items():
        # The base's own sample is of a thousand entries.
        assert array.std() == pytest.approx(ratios[name] * base[name].std(), rel=0.1), name
    (scale,) = drawn(program.trainable, ("norm/scale",)).values()
    assert (scale == 1 / 16).all()


def test_rates_by_hand_and_decay_as_documented():
    rng = np.random.default_rng(0)
    spec = Spec(
        {"a": Param(("embed", "mlp"), None), "b": Param(("embed",), None, decay=False)},
        {"embed": 5, "mlp": 3},
    )
    for kind, moment in ((AdamW, "adam"), (Lion, "lion")):
        optimizer = kind(lr=Cosine(peak=0.1, warmup=3), b1=0.8, b2=0.9, weight_decay=0.02)
        rate = optimizer.lr.build(5)
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            weights = {
                "a": jnp.asarray(rng.standard_normal((5, 3))),
                "b": jnp.asarray(rng.standard_normal(5)),
            }
            transform = with_rates(optimizer.build(spec, 5), {"a": 0.3, "b": 0.7})
            state, update = transform.init(weights), jax.jit(transform.update)
            expected = {name: np.asarray(weight) for name, weight in weights.items()}
            mean = {name: np.zeros_like(weight) for name, weight in expected.items()}
            square = {name: np.zeros_like(weight) for name, weight in expected.items()}
            for t in range(5):
                grads = {name: rng.standard_normal(weight.shape) for name, weight in expected.items()}
                updates, state = update(grads, state, weights)
                weights = optax.apply_updates(weights, updates)
                lr = float(rate(t))
                for name, share, decay in (("a", 0.3, 0.02), ("b", 0.7, 0.0)):
                    grad = grads[name]
                    if moment == "adam":
                        mean[name] = 0.8 * mean[name] + 0.2 * grad
                        square[name] = 0.9 * square[name] + 0.1 * grad**2
                        root = np.sqrt(square[name] / (1 - 0.9 ** (t + 1))) + 1e-8
                        step = mean[name] / (1 - 0.8 ** (t + 1)) / root
                    else:
                        step = np.sign(0.8 * mean[name] + 0.2 * grad)
                        mean[name] = 0.9 * mean[name] + 0.1 * grad
                    expected[name] = expected[name] * (1 - decay * lr / 0.1) - share * lr * step
                    # optax keeps the first moment in float32.
                    np.testing.assert_allclose(weights[name], expected[name], rtol=1e-6)


# Table 8 of the paper for Adam, written out: what a weight's learning rate is multiplied by.
TABLE_8 = dict.fromkeys(("query", "key", "value", "out", "up", "gate"), 1 / 4) | {"down": 1 / 8}


class HandAdam:
    """AdamW in numpy, with a rate for every weight and decay as ours documents it."""

    def __init__(self, weights, names, decayed, optimizer):
        self.weights, self.optimizer = weights, optimizer
        self.shares = [TABLE_8.get(name.split("/")[-1], 1.0) for name in names]
        self.decays = [optimizer.weight_decay * float(each) for each in decayed]
        self.mean = [np.zeros(weight.shape) for weight in weights]
        self.square = [np.zeros(weight.shape) for weight in weights]

    def step(self, t, grads):
        b1, b2, peak = self.optimizer.b1, self.optimizer.b2, self.optimizer.lr.peak
        lr = float(self.optimizer.lr.build(30)(t))
        for i, grad in enumerate(map(np.asarray, grads)):
            self.mean[i] = b1 * self.mean[i] + (1 - b1) * grad
            self.square[i] = b2 * self.square[i] + (1 - b2) * grad**2
            root = np.sqrt(self.square[i] / (1 - b2 ** (t + 1))) + self.optimizer.eps
            step = self.mean[i] / (1 - b1 ** (t + 1)) / root
            self.weights[i] = self.weights[i] * (1 - self.decays[i] * lr / peak) - self.shares[i] * lr * step


@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param({"tied": True}, marks=pytest.mark.slow),
        pytest.param(
            {"tied": False, "ffn": Glu(), "bias": True, "position": Rotary(), "norm": RmsNorm()},
            marks=pytest.mark.slow,
        ),
        pytest.param({"tied": False, "qk_norm": QkNorm(per_head=True)}, marks=pytest.mark.slow),
    ],
    ids=["tied", "untied", "qk_norm"],
)
def test_training_is_that_of_factors_in_the_forward_pass(knobs):
    """Scores over head_dim and logits over width by the model's own knobs, rates by the paper's table."""
    sizes = {"layers": 1, "embed": 64, "heads": 2, "mlp": 256, "vocab": 48} | knobs
    ours = mpt.Config(**sizes).build()
    theirs = mpt.Config(**sizes, logit_scale=16 / 64, softmax_scale=ROOT(8) / 32).build()
    optimizer = AdamW(lr=Cosine(peak=1e-2, warmup=2), eps=1e-30, weight_decay=0.01)
    # What holds a factor in ours does not in theirs.
    held = {"norm/scale": 4.0, "norm/bias": 4.0}
    queries = ("query_norm/scale", "query_norm/bias") if "qk_norm" in knobs else ("query", "query_bias")
    held |= {f"stacks/0/0/layer/attention/{name}": 2.0 for name in queries}
    layout = stepping.alone()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), tiny.quick():
        program = transferred(ours, dtypes=FLOAT64, optimizer=optimizer)
        other = stepping.program(theirs, PHASE, dtypes=FLOAT64)
        names, params = zip(*program.trainable.items(), strict=True)
        places = shardings(program.trainable, layout)
        weights = program.trainable.init(jax.random.key(0), "float64", places)
        flat, tree = jax.tree.flatten(weights)
        by_hand = HandAdam(
            [np.asarray(leaf) * held.get(name, 1.0) for leaf, name in zip(flat, names, strict=True)],
            names,
            [param.decay for param in params],
            optimizer,
        )
        state = program.optimizer.init(weights)

        def loss_of(program):
            def loss(weights, batch):
                total, weight, *_ = program.loss(weights, {}, {}, batch, jax.random.key(0), layout)
                return total / weight

            return jax.value_and_grad(loss)

        @jax.jit
        def step(weights, state, batch):
            loss, grads = loss_of(program)(weights, batch)
            updates, state = program.optimizer.update(grads, state, weights)
            return loss, optax.apply_updates(weights, updates), state

        explicit = jax.jit(loss_of(other))
        path = []
        for t in range(5):
            batch = {name: jnp.asarray(value) for name, value in stepping.rows(PHASE, 48, t).items()}
            loss, weights, state = step(weights, state, batch)
            expected, grads = explicit(jax.tree.unflatten(tree, by_hand.weights), batch)
            by_hand.step(t, jax.tree.leaves(grads))
            path.append((float(loss), float(expected)))
        got, expected = np.array(path).T
    # optax keeps the first moment in float32.
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert np.ptp(got) > 0.05, "nothing moved"


def test_at_the_base_it_is_plain_training_bit_for_bit():
    decoder = wide(embed=16, heads=2, mlp=32)
    plain = stepping.program(decoder, PHASE)
    program = WidthTransfer(BASE)(plain)
    assert program.applied == ("WidthTransfer",)
    layout = stepping.alone()
    steps = [Step(each, layout, 3) for each in (plain, program)]
    assert digest(steps[0].lower()) == digest(steps[1].lower())
    assert program.trainable == plain.trainable
    assert digest(steps[0].lower()) != digest(Step(transferred(wide()), layout, 3).lower())


@pytest.mark.slow
def test_training_is_the_same_on_any_mesh():
    program = ClipGradients()(transferred(wide()))
    with tiny.quick():
        path = [
            stepping.train(Step(program, stepping.place(mesh, count), 3), 48, 3)[0]
            for mesh, count in (
                (Mesh(fsdp=(1,)), 1),
                (Mesh(data=2, fsdp=(2,), tensor=2), 8),
                (Mesh(fsdp=(4,), gather="explicit"), 4),
            )
        ]
    np.testing.assert_allclose(path[1], path[0], rtol=2e-5)
    np.testing.assert_allclose(path[2], path[0], rtol=2e-5)


def with_optimizer(transform):
    program = stepping.program(wide(), PHASE)
    return type(program)(**(vars(program) | {"optimizer": transform}))


@pytest.mark.parametrize(
    "transform",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.sgd(0.1),
        optax.contrib.muon(0.1),
        optax.chain(optax.trace(0.9), optax.scale_by_adam()),
    ],
)
def test_other_optimizers_are_refused(transform):
    with pytest.raises(InputError, match="how this optimizer's rate goes with width is not known"):
        WidthTransfer(BASE)(with_optimizer(transform))


@pytest.mark.parametrize("transform", [optax.adamw(0.1), optax.lion(0.1)])
def test_adam_and_lion_are_taken_clipped_or_not(transform):
    for each in (transform, optax.chain(optax.clip_by_global_norm(1.0), transform)):
        assert WidthTransfer(BASE)(with_optimizer(each)).applied == ("WidthTransfer",)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        (
            {"clip_qkv": 1.0},
            "attention has a clip_qkv of its own; expected 0; got 1.0; fix: a base of the same",
        ),
        ({"softmax_scale": 0.1}, "attention has a scale of its own"),
    ],
)
def test_scores_that_no_factor_of_queries_scales(knobs, words):
    with pytest.raises(InputError, match=words):
        transferred(wide(heads=2, **knobs))
    assert transferred(wide(**knobs)).applied == ("WidthTransfer",)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"odd": Param(("embed", "sideways"), None)}, "odd has the axis 'sideways', whose part in width"),
        (
            {"odd": Param(("embed", "mlp", "heads"), None)},
            r"odd is no matrix or vector; got \('embed'",
        ),
        ({"odd": Param(("embed", "embed"), None)}, "odd is no matrix or vector"),
        ({"norm": {"scale": Param(("embed",), InitRule().matrix(()))}}, "norm/scale starts at other than 1"),
        (
            {"norm": {}},
            "a model whose last norm has a scale; expected embed/tokens and norm/scale; fix: list it",
        ),
        ({"stacks": {}}, None),
    ],
)
def test_weights_whose_part_is_not_known(tree, words):
    spec = wide().spec()
    spec = Spec({**spec.tree, **tree}, {**spec.dims, "sideways": 3})
    if words is None:
        assert factors(spec, BASE.dims())
        with pytest.raises(InputError, match="there are no queries to scale; expected head_dim 4; got 8"):
            factors(spec, Sizes(16, 4, 32).dims())
        return
    with pytest.raises(InputError, match=words):
        factors(spec, BASE.dims())


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (Sizes(0, 1, 1), "WidthTransfer.base; expected sizes of 1 or more"),
        (Sizes(16, 2, 32, head_dim=-1), "WidthTransfer.base; expected sizes of 1 or more"),
        (Sizes(16, 3, 32), "WidthTransfer.base: heads must divide embed; expected a divisor of 16; got 3"),
    ],
)
def test_bases_that_cannot_be(base, words):
    with pytest.raises(InputError, match=words):
        transferred(wide(), base)


def test_a_recipe_holds_it_and_overrides_reach_it(tiny_store):
    from mosaicjax.data.mixture import TokenStore

    recipe = Recipe(mpt.Config(), TokenStore(str(tiny_store)), methods=(WidthTransfer(BASE), ClipGradients()))
    assert recipe_file.from_json(recipe_file.to_json(recipe)) == recipe
    changed = recipe_file.override(recipe, ["--methods.0.base.embed", "32"], "x")
    assert changed.methods[0].base == Sizes(32, 2, 32)


RECIPE = "from mosaicjax.methods.width_transfer import Sizes, WidthTransfer\n"


@pytest.mark.slow
@pytest.mark.soak
def test_a_run_stops_and_goes_on_with_it(tiny_store, tmp_path, capsys):
    methods = "(WidthTransfer(base=Sizes(embed=16, heads=1, mlp=16)), ClipGradients(norm=1.0))"
    recipe = tiny.write_recipe(tmp_path / "wide.py", tiny_store, before=RECIPE, methods=methods)
    tiny.train(recipe, tmp_path / "whole")
    tiny.train(recipe, tmp_path / "parts")
    part = tiny.copy_run(tmp_path / "parts", tmp_path / "part", until=3)
    tiny.train(part, part)
    assert tiny.rows(part) == tiny.rows(tmp_path / "whole")
    plain = tiny.write_recipe(tmp_path / "plain.py", tiny_store)
    tiny.train(plain, tmp_path / "plain")
    assert tiny.losses(tmp_path / "plain")[-1] != tiny.losses(part)[-1]
    # What is evaluated, without the method, is what was trained with it.
    held_out = tiny.metrics(part, "eval")[-1]["bits_per_byte"]
    assert tiny.run("evaluate", part) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  model")]
    assert float(line.split(" bits, ")[1].split(" ")[0]) == pytest.approx(held_out, abs=1e-4)
