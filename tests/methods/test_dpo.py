"""DPO beside the paper's formula: losses, gradients by any mesh and microbatch, and what it compares with."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.layers.moe import Moe
from mosaicjax.losses import CrossEntropy, nll
from mosaicjax.mesh import Mesh
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.methods.dpo import DPO, PairLoss, compared
from mosaicjax.methods.ema import Ema
from mosaicjax.methods.freeze import FreezeLayers
from mosaicjax.methods.lora import LoRA
from mosaicjax.methods.low_precision import LowPrecision
from mosaicjax.methods.sam import Sam
from mosaicjax.methods.selective import SelectiveBackprop
from mosaicjax.nonfinite import first_nonfinite
from mosaicjax.optim import AdamW, Constant
from mosaicjax.program import Phase
from mosaicjax.spec import Referenced, split
from mosaicjax.step import Step
from tests import stepping, tiny
from tests.methods import pairs, toy
from tests.methods.test_lora import effective, of_adapters, placed, random_adapters
from tests.models import forward

DECODER = pairs.SMALL.build()
BETA = 0.7


def with_gradient(logits, reference, batch, beta, smoothing):
    """The method's terms from logits of both models, and the summed loss's gradient by the first."""
    loss, targets = PairLoss(None, beta, smoothing), jnp.asarray(batch["targets"])

    def objective(logits):
        terms = loss.terms(nll(logits, targets)[0], nll(reference, targets)[0], batch)
        return jnp.sum(terms.objective), terms

    grad, terms = jax.grad(objective, has_aux=True)(logits)
    return terms, grad


COMPILED = jax.jit(with_gradient, static_argnames=("beta", "smoothing"))


@given(
    seed=st.integers(0, 10**6),
    beta=st.sampled_from([0.05, 0.5, 2.0]),
    smoothing=st.sampled_from([0.0, 0.3]),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_loss_and_gradient_from_logits_are_the_papers(seed, beta, smoothing, spread):
    batch, rng = pairs.rows(seed, count=3), np.random.default_rng(seed)
    # Rows may be empty; one pair at least there must be, to be compared.
    assume(batch["segments"].any())
    shape = (3, pairs.SEQ, pairs.VOCAB)
    logits, reference = ((spread * rng.standard_normal(shape)).astype(np.float32) for _ in range(2))
    expected, slope, worths = pairs.naive(logits, reference, batch, beta, smoothing)
    terms, grad = COMPILED(logits, reference, batch, beta=beta, smoothing=smoothing)
    assert float(terms.objective.sum()) == pytest.approx(expected, rel=2e-4, abs=1e-5)
    np.testing.assert_allclose(grad, slope, rtol=1e-3, atol=2e-5 * beta)
    assert float(terms.pairs.sum()) == len(worths)
    metrics = {name: float(value) for name, value in terms.metrics().items()}
    margins = worths[:, 0] - worths[:, 1]
    for name, values in (
        ("reward_chosen", worths[:, 0]),
        ("reward_rejected", worths[:, 1]),
        ("reward_margin", margins),
    ):
        assert metrics[name] == pytest.approx(values.sum(), rel=1e-3, abs=1e-3), name
    assert metrics["reward_accuracy"] == (margins > 0).sum()


def program(*methods, microbatch=pairs.ROWS, loss=stepping.PLAIN, decoder=DECODER, **options):
    """The program of pairs, with these methods."""
    phase = Phase(pairs.SEQ, pairs.ROWS, microbatch)
    made = stepping.program(decoder, phase, loss=loss, packed=True, **options)
    for method in methods:
        made = method(made)
    return made


def step_of(made, mesh=toy.ONE):
    return Step(made, stepping.place(mesh, 1 if mesh is toy.ONE else 8), seed=0)


def by_hand(weights, reference, batch, beta=BETA, smoothing=0.0):
    """Loss, gradient by the weights and what answers are worth, each answer alone in a row of its own.

    The gradient by the logits is the paper's, in numpy; through the model jax takes it. Means over pairs.
    """
    places = [(row, at) for row, *both in pairs.answers(batch) for at in both]
    longest = max(at.stop - at.start for _, at in places)
    tokens = np.zeros((len(places), longest), np.int32)
    for number, (row, at) in enumerate(places):
        tokens[number, : at.stop - at.start] = batch["tokens"][row, at]
    where = forward.context(tokens)

    def logits(weights):
        return forward.logits_from(
            DECODER, weights, DECODER.embed(weights, jnp.asarray(tokens), where), where
        )

    def in_rows(each):
        found = np.zeros((*batch["tokens"].shape, pairs.VOCAB))
        for number, (row, at) in enumerate(places):
            found[row, at] = each[number, : at.stop - at.start]
        return found

    with tiny.quick():
        mine, pull = jax.vjp(jax.jit(logits), weights)
        theirs = jax.jit(logits)(reference)
        loss, slope, worths = pairs.naive(in_rows(mine), in_rows(theirs), batch, beta, smoothing)
        each = np.zeros(mine.shape, np.float32)
        for number, (row, at) in enumerate(places):
            each[number, : at.stop - at.start] = slope[row, at]
        (grads,) = pull(jnp.asarray(each))
    return loss / len(worths), jax.tree.map(lambda g: np.asarray(g) / len(worths), grads), worths


def as_arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


FIRST = ("embed/*", "layer/0/*")


def with_first_of(reference, weights):
    """The reference with the embeddings and the first layer of other weights."""
    made = jax.tree.map(np.copy, reference)
    made["embed"] = weights["embed"]

    def first(mine, theirs):
        mine[0] = theirs[0]
        return mine

    made["stacks"] = jax.tree.map(first, made["stacks"], weights["stacks"])
    return made


def arguments(kind, made, step):
    """What the step takes of random weights; the weights and reference that it means; which gradients."""
    weights, reference = (forward.random_weights(DECODER, seed) for seed in (1, 2))
    if kind == "lora":
        adapters = random_adapters(made.trainable)
        given = placed(step, adapters, made.trainable), placed(step, weights, made.frozen)
        return given, effective(adapters, weights), weights, lambda grads: of_adapters(adapters, grads)
    if kind == "full":
        held = Referenced({}, placed(step, reference, made.trainable))
        return (placed(step, weights, made.trainable), held), weights, reference, lambda grads: grads
    mine, frozen = split(as_arrays(weights), made.trainable, made.frozen)
    theirs, _ = split(as_arrays(reference), made.trainable, made.frozen)
    held = Referenced(placed(step, frozen, made.frozen), placed(step, theirs, made.trainable))
    given = placed(step, mine, made.trainable), held

    def trained(grads):
        return jax.tree.map(np.asarray, split(as_arrays(grads), made.trainable, made.frozen)[0])

    return given, weights, with_first_of(reference, weights), trained


BEFORE = {"full": (), "lora": (LoRA(rank=2, alpha=4.0),), "freeze": (FreezeLayers(FIRST),)}


def check_gradients(kind, mesh, microbatch, chunk, smoothing=0.0, after=False):
    dpo = DPO(BETA, smoothing)
    methods = (dpo, *BEFORE[kind]) if after else (*BEFORE[kind], dpo)
    made = program(*methods, microbatch=microbatch, loss=CrossEntropy(chunk=chunk))
    step, batch = step_of(made, mesh), pairs.rows(4)
    given, weights, reference, own = arguments(kind, made, step)
    loss, expected, worths = by_hand(weights, reference, batch, smoothing=smoothing)
    with tiny.quick():
        grads, (objective, weight, sums, _) = jax.jit(step.gradients)(
            *given, {}, stepping.put(step, batch), jax.random.key(0)
        )
    assert float(weight) == len(worths) and float(sums["tokens"]) == batch["weights"].sum()
    assert float(objective) / len(worths) == pytest.approx(loss, rel=1e-4)
    margins = worths[:, 0] - worths[:, 1]
    assert float(sums["reward_margin"]) == pytest.approx(margins.sum(), rel=1e-3, abs=1e-3)
    assert float(sums["reward_accuracy"]) == (margins > 0).sum()
    means = jax.tree.map(lambda leaf: np.asarray(leaf) / len(worths), grads)
    toy.close(means, own(expected), rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "microbatch", "chunk", "smoothing"),
    [
        ("full", 3, 8, 0.2),
        ("lora", 8, 6, 0.0),
        pytest.param("full", 8, 0, 0.0, marks=pytest.mark.slow),
        pytest.param("freeze", 2, 0, 0.1, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_answers_taken_one_by_one(kind, microbatch, chunk, smoothing):
    check_gradients(kind, toy.ONE, microbatch, chunk, smoothing)


@pytest.mark.slow
def test_layers_may_be_frozen_after_it():
    check_gradients("freeze", toy.ONE, 8, 0, after=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BEFORE)
@pytest.mark.parametrize("mesh", [*toy.MESHES, "fsdp"])
@pytest.mark.parametrize(("microbatch", "chunk"), [(8, 0), pytest.param(4, 8, marks=pytest.mark.soak)])
def test_gradients_on_a_mesh(kind, mesh, microbatch, chunk):
    if mesh == "fsdp" and microbatch % 8:
        microbatch = 8
    check_gradients(kind, toy.MESHES.get(mesh, Mesh(fsdp=(-1,))), microbatch, chunk)


def run(made, steps, mesh=toy.ONE, number=0):
    """The same rows again and again: metrics by step, the first and last state, and what is beside them."""
    step = step_of(made, mesh)
    with tiny.quick():
        compiled, state, held = step.lower().compile(), step.init(), step.init_frozen()
        first = jax.tree.map(np.asarray, (state.trainable, held))
        metrics = []
        for _ in range(steps):
            batch = stepping.put(step, pairs.rows(number))
            state, _, measured = compiled(state, held, batch, stepping.signals(step))
            metrics.append({name: np.asarray(value) for name, value in measured.items()})
    return metrics, first, jax.tree.map(np.asarray, (state.trainable, held))


FAST = AdamW(lr=Constant(peak=3e-3), weight_decay=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_margins_grow_and_the_reference_stays(kind):
    metrics, (start, held), (end, still) = run(program(*BEFORE[kind], DPO(BETA), optimizer=FAST), 30)
    batch = pairs.rows(0)
    for each in metrics:
        assert each["tokens"] == batch["weights"].sum()
        assert each["reward_margin"] == pytest.approx(
            each["reward_chosen"] - each["reward_rejected"], abs=1e-4
        )
    # Nothing is told apart where the model is its own reference.
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(metrics[0]["reward_margin"]) < 1e-5
    assert metrics[-1]["reward_margin"] > 1.0 and metrics[-1]["reward_accuracy"] == 1.0
    assert metrics[-1]["loss"] < 0.5
    jax.tree.map(np.testing.assert_array_equal, held, still)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(end), strict=True))
    if kind == "full":
        jax.tree.map(np.testing.assert_array_equal, held.reference, start)
        assert held.frozen == {}
    else:
        assert not isinstance(held, Referenced) and compared(held) is held


def test_the_reference_is_an_argument():
    """Compiled once, the step compares with whatever it is given."""
    made = program(DPO(BETA))
    step, batch = step_of(made), pairs.rows(7)
    weights = forward.random_weights(DECODER, 1)
    with tiny.quick():
        compiled = step.lower().compile()
    for seed in (2, 3):
        reference = forward.random_weights(DECODER, seed)
        loss, _, _ = by_hand(weights, reference, batch)
        state = step.start(placed(step, weights, made.trainable))
        held = Referenced({}, placed(step, reference, made.trainable))
        _, _, metrics = compiled(state, held, stepping.put(step, batch), stepping.signals(step))
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4)
    optimizer = jax.tree.leaves(step.abstract_state().optimizer)
    count = sum(math.prod(leaf.shape) for leaf in optimizer if leaf.shape)
    assert count == 2 * made.trainable.count()


@pytest.mark.slow
def test_sam_looks_at_moved_weights():
    made = replace(program(DPO(BETA), Sam(rho=0.2)), optimizer=optax.sgd(0.5))
    step, batch = step_of(made), pairs.rows(3)
    weights, reference = (forward.random_weights(DECODER, seed) for seed in (1, 2))
    _, grads, _ = by_hand(weights, reference, batch)
    scale = 0.2 / math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    moved = jax.tree.map(lambda w, g: w + np.float32(scale) * g, weights, grads)
    _, grads, _ = by_hand(moved, reference, batch)
    with tiny.quick():
        held = Referenced({}, placed(step, reference, made.trainable))
        state = step.start(placed(step, weights, made.trainable))
        state, _, _ = step.lower().compile()(state, held, stepping.put(step, batch), stepping.signals(step))
    expected = jax.tree.map(lambda w, g: w - np.float32(0.5) * g, weights, grads)
    toy.close(jax.tree.map(np.asarray, state.trainable), expected, rtol=2e-3, atol=5e-5)


@pytest.mark.slow
def test_averages_and_rounded_products_beside_it():
    pytest.importorskip("qwix")
    made = program(LowPrecision(), DPO(BETA), Ema(decay=0.5), ClipGradients(1.0), optimizer=FAST)
    metrics, (start, held), (end, _) = run(made, 10)
    assert abs(metrics[0]["reward_margin"]) < 1e-5 and metrics[-1]["reward_margin"] > 0.1
    jax.tree.map(np.testing.assert_array_equal, held.reference, start)


@pytest.mark.slow
def test_measured_outputs_are_the_trained_models():
    batch = pairs.rows(0)
    (metrics, *_), *_ = run(program(DPO(BETA), measure=True), 1)
    plain = step_of(program(measure=True))
    with tiny.quick():
        compiled, state = plain.lower().compile(), plain.init()
        _, _, expected = compiled(state, {}, stepping.put(plain, batch), stepping.signals(plain))
    np.testing.assert_allclose(metrics["activation_rms"], expected["activation_rms"], rtol=1e-4)


@pytest.mark.slow
def test_a_nan_is_placed():
    made = program(DPO(BETA))
    step = step_of(made)
    weights = forward.random_weights(DECODER, 1)
    weights["stacks"][0][0]["layer"]["mlp"]["up"][1] = np.nan
    held = Referenced({}, placed(step, forward.random_weights(DECODER, 2), made.trainable))
    place = first_nonfinite(
        step,
        DECODER,
        placed(step, weights, made.trainable),
        held,
        stepping.put(step, pairs.rows(1)),
        jax.random.key(0),
    )
    assert place.startswith("layer 1")


EXPERTS = replace(pairs.SMALL, ffn=Moe(top_k=1), experts=2).build()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: program(DPO(beta=0.0)), "DPO; expected beta above 0, smoothing of 0 to below 0.5; got 0, 0"),
        (lambda: program(DPO(beta=math.inf)), "DPO; expected beta above 0"),
        (lambda: program(DPO(smoothing=0.5)), "DPO; expected beta above 0, smoothing of 0 to below 0.5"),
        (lambda: program(DPO(), DPO()), "the method DPO is listed twice"),
        (lambda: program(DPO(), LoRA(rank=2)), "LoRA after DPO, which compares adapters"),
        (lambda: program(SelectiveBackprop(), DPO()), "got SelectiveBackprop then DPO"),
        (lambda: program(DPO(), SelectiveBackprop()), "got DPO then SelectiveBackprop"),
        (lambda: program(DPO(), LowPrecision()), "LowPrecision after a method that brings a loss of its own"),
        (lambda: DPO()(toy.program()), "DPO of a loss of one's own"),
        (
            lambda: program(DPO(), loss=CrossEntropy(z_loss=0.1)),
            "loss.z_loss with DPO, whose loss is of pairs",
        ),
        (lambda: program(DPO(), loss=CrossEntropy(smoothing=0.1)), "loss.smoothing with DPO"),
        (lambda: program(DPO(), decoder=EXPERTS), "DPO of a model with experts"),
        (
            lambda: DPO()(stepping.program(DECODER, pairs.PHASE)),
            "DPO of documents that see each other; expected data.rows PAIRS",
        ),
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises(InputError) as refusal:
        make()
    assert message in str(refusal.value)
