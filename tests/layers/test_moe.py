"""Mixtures of experts against a naive loop over the experts: layer, losses, meshes, and what counts them."""

import re
from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.kernels.grouped import Grouped
from mosaicjax.layers.attention import Attention
from mosaicjax.layers.block import Block, ParallelBlock
from mosaicjax.layers.inits import Kaiming
from mosaicjax.layers.mlp import Activation, Glu
from mosaicjax.layers.moe import Moe
from mosaicjax.layers.norm import LayerNorm
from mosaicjax.layers.position import Alibi, Position
from mosaicjax.mesh import Mesh
from mosaicjax.models import flops, mpt
from mosaicjax.models.decode import decode_step, prefill
from mosaicjax.models.decoder import Decoder, Remat, Stack
from mosaicjax.program import Phase
from mosaicjax.recipe_file import converter
from mosaicjax.show import weights_table
from mosaicjax.spec import Dtypes, Spec
from mosaicjax.step import Step
from mosaicjax.train import one_by_one
from tests import stepping, tiny
from tests.models import forward

FLOAT64 = Dtypes("float64", "float64", "float64")


def naive(moe, weights, x_BLD):
    """Every expert works on every token; what a token did not choose is multiplied by nothing."""

    def bias(name):
        return weights[f"{name}_bias"][expert][None] if moe.bias else 0.0

    x = x_BLD.reshape(-1, x_BLD.shape[-1])
    logits = x @ weights["router"]
    shares = jnp.exp(logits - jax.scipy.special.logsumexp(logits, axis=1)[:, None])
    order = jnp.argsort(-shares, axis=1)
    kept = jnp.zeros(shares.shape, bool)
    for place in range(moe.top_k):
        kept |= jnp.arange(shares.shape[1])[None] == order[:, place, None]
    parts = jnp.where(kept, shares, 0.0)
    if moe.renormalise:
        parts = parts / parts.sum(axis=1)[:, None]
    out = jnp.zeros_like(x)
    for expert in range(shares.shape[1]):
        up = x @ weights["up"][expert] + bias("up")
        if moe.gated:
            gate = x @ weights["gate"][expert] + bias("gate")
            hidden = gate / (1 + jnp.exp(-gate)) * up
        else:
            hidden = up / (1 + jnp.exp(-up))
        out += parts[:, expert, None] * (hidden @ weights["down"][expert] + bias("down"))
    return out.reshape(x_BLD.shape)


@dataclass(frozen=True)
class Naive(Moe):
    """The loop in a layer's place."""

    def routed(self, weights, x_BLD, context):
        return naive(self, weights, x_BLD), None


def drawn(moe, experts, rows, skew, seed, dtype):
    """Weights, inputs and a gradient; `skew` draws all tokens to the last expert."""
    rng = np.random.default_rng(seed)
    dims = {"embed": 6, "mlp": 5, "experts": experts}
    spec = Spec(moe.params(Kaiming(), 1), dims)
    weights = spec.map(lambda param: rng.standard_normal(param.shape(dims)).astype(dtype))
    weights["router"][0] = 0
    weights["router"][0, -1] = skew
    x_BLD, grad_BLD = rng.standard_normal((2, *rows, 6)).astype(dtype)
    x_BLD[..., 0] = 1
    return weights, x_BLD, grad_BLD


@cache
def both(moe, dtypes):
    """The layer and the loop, each with its gradients, compiled once a kind and shape."""
    where = forward.context(np.zeros((1, 1), int), dtypes=dtypes)

    def with_gradients(function):
        def run(weights, x_BLD, grad_BLD):
            out, back = jax.vjp(function, weights, x_BLD)
            return out, back(grad_BLD)

        return jax.jit(run)

    return with_gradients(lambda weights, x: moe.apply(weights, x, where)), with_gradients(
        lambda weights, x: naive(moe, weights, x)
    )


def assert_is_the_loop(moe, experts, rows, skew, seed, dtypes=FLOAT64, tolerance=1e-10):
    with jax.enable_x64(dtypes is FLOAT64), tiny.quick():
        case = drawn(moe, experts, rows, skew, seed, dtypes.param)
        got, expected = (run(*case) for run in both(moe, dtypes))
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * largest)
        return got[1][0]


KINDS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans())


@pytest.mark.slow
@settings(max_examples=6)
@given(
    KINDS.filter(lambda kind: kind[0] <= kind[1]),
    st.sampled_from([(1, 1), (2, 7)]),
    st.sampled_from([0.0, 3.0, 50.0]),
    st.integers(0, 999),
)
@example((1, 3, True, True, False), (2, 7), 100.0, 0)
def test_layer_and_gradients_are_the_loops(kind, rows, skew, seed):
    top_k, experts, gated, renormalise, bias = kind
    moe = Moe(top_k=top_k, gated=gated, renormalise=renormalise, bias=bias)
    grads = assert_is_the_loop(moe, experts, rows, skew, seed)
    if skew >= 50 and top_k == 1:
        # One expert has everything, the others see no gradient and drop nothing.
        assert all(not np.any(np.asarray(grads[name])[:-1]) for name in ("up", "down"))
        assert np.all(np.any(np.asarray(grads["up"])[-1] != 0))


@pytest.mark.slow
def test_the_tpu_kernel_gives_the_same_layer():
    moe = Moe(grouped=Grouped.MEGABLOX_INTERPRETED, bias=True)
    for skew in (0.0, 50.0):
        assert_is_the_loop(moe, 3, (2, 7), skew, seed=3, dtypes=Dtypes(), tolerance=1e-5)


def test_the_router_is_float32_where_all_else_is_bfloat16():
    dtypes = Dtypes(compute="bfloat16")
    config = replace(SMALL, layers=1)
    step = Step(stepping.program(config.build(), PHASE, dtypes=dtypes), stepping.alone(), seed=0)
    text = step.lower().as_text()
    products = re.findall(r"dot_general.*: \((tensor<\S+), (tensor<\S+)\) -> (tensor<\S+)", text)
    routers = [types for types in products if any(re.search(r"<(16x4|8x8x4|4x16)xf32>", t) for t in types)]
    assert len(routers) >= 3, "forward, and both gradients"
    assert all("f32" in each for types in routers for each in types)
    assert any("bf16" in each for types in products for each in types)


SMALL = mpt.Config(
    layers=2, embed=16, heads=4, mlp=32, vocab=64, experts=4, ffn=Moe(aux_loss=0.1, z_loss=0.01), bias=True
)
PHASE = Phase(8, 8, 8)


def router_only(config, seed=0):
    """A model of one layer whose attention adds nothing, so that its router reads the normed embeddings."""
    decoder = replace(config, layers=1, position=Position(), norm=LayerNorm()).build()
    weights = forward.random_weights(decoder, seed)
    layer = weights["stacks"][0][0]["layer"]
    for name in ("out", "out_bias"):
        layer["attention"][name] *= 0
    return decoder, weights


def losses_by_hand(decoder, weights, batch, microbatch, top_k):
    """Balance loss, z-loss and loads, each the mean by weight over the microbatches, in float64."""
    layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[0], weights["stacks"][0][0]["layer"])
    x = np.asarray(weights["embed"]["tokens"], np.float64)[batch["tokens"]]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + decoder.norm.eps)
    x = x * layer["mlp_norm"]["scale"] + layer["mlp_norm"]["bias"]
    logits = x @ layer["mlp"]["router"]
    experts = logits.shape[-1]
    balance, z_loss, load, total = 0.0, 0.0, np.zeros(experts), 0.0
    for first in range(0, len(x), microbatch):
        rows = range(first, min(first + microbatch, len(x)))
        taken, share, square, tokens = np.zeros(experts), np.zeros(experts), 0.0, 0
        for row in rows:
            for at in range(x.shape[1]):
                if batch["segments"][row, at] == 0 or not batch["weights"][row].any():
                    continue
                exp = np.exp(logits[row, at])
                taken[np.argsort(-exp)[:top_k]] += 1
                share += exp / exp.sum()
                square += np.log(exp.sum()) ** 2
                tokens += 1
        weight, tokens = batch["weights"][list(rows)].sum(), max(tokens, 1)
        balance += weight * experts * (taken / tokens) @ (share / tokens)
        z_loss += weight * square / tokens
        load += weight * taken / (top_k * tokens)
        total += weight
    return balance / total, z_loss / total, load / total


def padded_rows(phase, vocab):
    """A batch whose rows end in padding, one of them without any weight."""
    batch = stepping.rows(phase, vocab, number=3, packed=True)
    padding = np.arange(phase.seq)[None] >= np.random.default_rng(2).integers(4, 9, (phase.batch, 1))
    batch["segments"] = np.where(padding, 0, batch["segments"])
    batch["weights"] = np.where(padding, 0, batch["weights"]).astype(np.float32)
    batch["weights"][4] = 0
    return batch


@pytest.mark.parametrize("microbatch", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_and_loads_are_those_by_hand(microbatch):
    decoder, weights = router_only(SMALL)
    phase = Phase(8, 16, microbatch)
    batch = padded_rows(phase, SMALL.vocab)
    # Rows of microbatch 3 end in two rows that fill up the last one.
    step = Step(stepping.program(decoder, phase, packed=True), stepping.alone(), seed=0)
    with tiny.quick():
        compiled = step.lower().compile()
    _, _, metrics = compiled(step.start(weights), {}, stepping.put(step, batch), stepping.signals(step))
    balance, z_loss, load = losses_by_hand(decoder, weights, batch, microbatch, top_k=2)
    assert float(metrics["balance_loss"]) == pytest.approx(balance, rel=1e-5)
    assert float(metrics["router_z_loss"]) == pytest.approx(z_loss, rel=1e-5)
    np.testing.assert_allclose(metrics["expert_load/0"], load, atol=1e-6)
    logged = one_by_one(jax.device_get(metrics))
    assert logged["expert_load/0.3"] == pytest.approx(load[3], abs=1e-6)
    assert sum(logged[f"expert_load/0.{expert}"] for expert in range(4)) == pytest.approx(1)


@pytest.mark.slow
def test_balance_is_the_number_of_experts_a_token_takes():
    decoder, weights = router_only(replace(SMALL, ffn=Moe(top_k=3)))
    layer = weights["stacks"][0][0]["layer"]
    layer["mlp"]["router"] *= 1e-6
    batch = padded_rows(PHASE, SMALL.vocab)
    step = Step(stepping.program(decoder, PHASE, packed=True), stepping.alone(), seed=0)
    with tiny.quick():
        compiled = step.lower().compile()
    _, _, metrics = compiled(step.start(weights), {}, stepping.put(step, batch), stepping.signals(step))
    assert float(metrics["balance_loss"]) == pytest.approx(3, rel=1e-4)
    assert float(metrics["router_z_loss"]) == pytest.approx(np.log(4) ** 2, rel=1e-4)


def gradients(config, layout, phase, batch, weights, packed=True):
    step = Step(stepping.program(config.build(), phase, packed=packed), layout, seed=0)
    with tiny.quick():
        return stepping.gradients(step, weights, batch)


@pytest.mark.slow
def test_losses_are_in_the_objective_and_its_gradient():
    # With the losses less without them, against differences of the formulas in float64.
    phase, aux, z_loss = Phase(8, 16, 8), 0.3, 0.2
    plain = replace(SMALL, layers=1, position=Position(), norm=LayerNorm(), ffn=Moe())
    decoder, weights = router_only(plain)
    batch = padded_rows(phase, SMALL.vocab)
    without, nll, weight = gradients(plain, stepping.alone(), phase, batch, weights)
    held = replace(plain, ffn=Moe(aux_loss=aux, z_loss=z_loss))
    with_them, objective, _ = gradients(held, stepping.alone(), phase, batch, weights)
    balance, square, _ = losses_by_hand(decoder, weights, batch, 8, top_k=2)
    assert (objective - nll) / weight == pytest.approx(aux * balance + z_loss * square, rel=1e-4)

    def nudged(by):
        def change(path, leaf):
            name = jax.tree_util.keystr(path)
            return leaf + by * direction if name.endswith("['router']") else leaf

        return jax.tree_util.tree_map_with_path(change, weights64)

    weights64 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights)
    direction = np.random.default_rng(0).standard_normal((1, 16, 4))
    sides = [losses_by_hand(decoder, nudged(by), batch, 8, top_k=2) for by in (1e-6, -1e-6)]
    slope = [(sides[0][i] - sides[1][i]) / 2e-6 for i in (0, 1)]
    router = [tree["stacks"][0][0]["layer"]["mlp"]["router"] for tree in (with_them, without)]
    got = np.sum((router[0] - router[1]) * direction) / weight
    assert got == pytest.approx(aux * slope[0] + z_loss * slope[1], rel=1e-3)


MESHES = {
    "data": Mesh(data=2, fsdp=(2,), tensor=2),
    "fsdp": Mesh(fsdp=(8,)),
    "torus": Mesh(fsdp=(2, 2), tensor=2),
}


@cache
def on_one_device(packed):
    batch = padded_rows(Phase(8, 16, 8), SMALL.vocab) if packed else stepping.rows(Phase(8, 16, 8), 64)
    weights = forward.random_weights(SMALL.build())
    return batch, weights, gradients(SMALL, stepping.alone(), Phase(8, 16, 8), batch, weights, packed)


def assert_gradients_agree(config, mesh, packed=True):
    batch, weights, (expected, objective, weight) = on_one_device(packed)
    got, total, whole = gradients(config, stepping.place(mesh, 8), Phase(8, 16, 8), batch, weights, packed)
    assert total == pytest.approx(objective, rel=1e-5) and whole == weight
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(expected)))
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        # A bias of keys has no gradient but rounding errors.
        bound = 1e-5 * max(np.linalg.norm(theirs), 0.01 * norm)
        assert np.linalg.norm(ours - theirs) < bound, jax.tree_util.keystr(path)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "gather"),
    [
        pytest.param("data", "explicit", marks=pytest.mark.soak),
        pytest.param("data", "compiler", marks=SLOW),
        pytest.param("torus", "compiler", marks=SLOW),
        pytest.param("fsdp", "explicit", marks=SLOW),
    ],
)
def test_gradients_over_a_mesh_are_those_of_one_device(name, gather):
    assert_gradients_agree(SMALL, replace(MESHES[name], gather=gather))


EXPLICIT = replace(MESHES["data"], gather="explicit")


@pytest.mark.slow
def test_the_tpu_kernel_over_a_mesh():
    ffn = replace(SMALL.ffn, grouped=Grouped.MEGABLOX_INTERPRETED)
    assert_gradients_agree(replace(SMALL, ffn=ffn), EXPLICIT)


@pytest.mark.slow
def test_mlp_whole_and_experts_split_by_rule():
    mesh = replace(EXPLICIT, rules={"mlp": "none", "experts": "tensor"})
    assert_gradients_agree(SMALL, mesh, packed=False)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [Remat.FULL, Remat.DOTS])
def test_remat_changes_nothing(remat):
    assert_gradients_agree(replace(SMALL, remat=remat), EXPLICIT, packed=False)


@pytest.mark.slow
@pytest.mark.soak
def test_training_over_meshes_is_training_on_one_device(capfd):
    def path(mesh, devices):
        step = Step(stepping.program(SMALL.build(), Phase(8, 16, 8)), stepping.place(mesh, devices), seed=0)
        with tiny.quick():
            return stepping.train(step, SMALL.vocab, 10)

    expected, metrics, _ = path(Mesh(fsdp=(1,)), 1)
    got, others, _ = path(EXPLICIT, 8)
    assert np.abs(got / expected - 1).max() < 1e-5
    for name in ("balance_loss", "router_z_loss", "expert_load/0", "expert_load/1"):
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-4)
    # A copy of an activation to every device is something that XLA announces only on stderr.
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.slow
def test_what_moves_between_devices(tmp_path):
    # Experts whole along embed and half along mlp, cast before they move, the router wide; of the tokens only
    # the residual stream, whose rows tensor shards split between them, and that in the compute dtype.
    config = replace(SMALL, bias=False)
    made = stepping.program(config.build(), PHASE, dtypes=Dtypes(compute="bfloat16"))
    layout = stepping.place(EXPLICIT, 8)
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    step = Step(made, layout, seed=0)
    with tiny.quick():
        step.lower().compile(compiler_options=options | {"xla_dump_hlo_module_re": "call"})
    (after,) = tmp_path.glob("*after_spmd-partitioning*.txt")
    text = after.read_text()
    moved = {
        kind: set(re.findall(rf"= (\w+\[[\d,]*\])\S* {kind}\(", text))
        for kind in ("all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    }
    experts = {"bf16[4,16,16]", "f32[16,4]"}
    attention = {"bf16[16]", "bf16[16,2,4]", "bf16[2,4,16]", "bf16[32,16]"}
    assert moved["all-gather"] == experts | attention | {"bf16[2,8,16]"}
    assert {"f32[4,8,16]", "f32[4,16,8]", "f32[8,4]"} <= moved["reduce-scatter"]
    assert moved["all-to-all"] == moved["collective-permute"] == set()


def mixed(moe):
    """A dense layer first, then layers with and without experts in turn, and a parallel one."""
    blocks = (Block(Attention(Alibi()), moe), Block(Attention(Alibi()), Glu(Activation.SILU)))
    stacks = (
        Stack((Block(Attention(Alibi())),), 1),
        Stack(blocks, 2),
        Stack((ParallelBlock(Attention(Alibi()), moe, shared_norm=True),), 1),
    )
    return Decoder(replace(SMALL, layers=1).dims(), stacks, LayerNorm())


@pytest.mark.slow
def test_a_model_with_experts_in_some_layers():
    weights = forward.random_weights(mixed(Moe()))
    tokens = np.random.default_rng(1).integers(0, SMALL.vocab, (2, 9))
    with tiny.quick():
        got, expected = (forward.logits(mixed(kind), weights, tokens) for kind in (Moe(), Naive()))
        step = Step(stepping.program(mixed(Moe()), PHASE), stepping.alone(), seed=0)
        metrics = jax.eval_shape(step, *_arguments(step))[2]
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    assert sorted(name for name in metrics if name.startswith("expert")) == [
        "expert_load/1",
        "expert_load/3",
        "expert_load/5",
    ]


def _arguments(step):
    return step.abstract_state(), step.abstract_frozen(), step.abstract_batch(), step.abstract_signals()


@pytest.mark.slow
def test_generation_with_a_cache_is_recomputing():
    decoder = replace(SMALL, embed=16, bias=False).build()
    weights, layout, lengths = forward.random_weights(decoder), forward.one_device(), [3, 6, 1]
    tokens = np.random.default_rng(4).integers(0, 64, (3, 6)).astype(np.int32)
    with tiny.quick():
        start = jax.jit(lambda weights, *rows: prefill(decoder, weights, *rows, 9, layout, Dtypes()))
        step = jax.jit(lambda *given: decode_step(decoder, *given, layout, Dtypes()))
        logits, caches = start(weights, tokens, np.array(lengths, np.int32))
        written = [list(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
        for _ in range(3):
            for i, row in enumerate(written):
                whole = np.array([row + [0] * (9 - len(row))])
                expected = forward.logits(decoder, weights, whole)[0, len(row) - 1]
                np.testing.assert_allclose(logits[i], expected, atol=1e-4)
                row.append(int(expected.argmax()))
            logits, caches = step(weights, np.array([row[-1] for row in written], np.int32), caches)


def test_flops_and_parameters_count_the_experts_that_a_token_takes():
    config = mpt.Config(layers=3, embed=24, heads=2, mlp=40, vocab=64, experts=6, ffn=Moe(top_k=2), bias=True)
    decoder = config.build()
    expert, attention = 3 * 24 * 40, 4 * 24 * 24
    products = 3 * (attention + 24 * 6 + 2 * expert) + 64 * 24
    assert flops.per_token(decoder, 8).full == 6 * products + 3 * 3 * 4 * 24 * 8
    spare = 3 * 4 * (expert + 2 * 40 + 24)
    assert flops.active(decoder) == decoder.spec().count() - spare
    assert (
        flops.active(mpt.Config(layers=2, embed=16, heads=2, mlp=32, vocab=64).build())
        == 2 * 2 * (16 + 2 * 16 * 16 + 16 * 32) + 16 + 64 * 16
    )


def test_experts_have_axes_and_rules_of_their_own():
    step = Step(
        stepping.program(replace(SMALL, bias=False).build(), PHASE), stepping.place(MESHES["data"], 8), 0
    )
    cells = {line.split()[0]: re.split(r"\s{2,}", line)[1:4] for line in weights_table(step)}
    name = "stacks/0/0/layer/mlp"
    assert cells[f"{name}/router"] == ["layers embed experts", "2x16x4", "-, fsdp, -"]
    assert cells[f"{name}/gate"] == ["layers experts embed mlp", "2x4x16x32", "-, -, fsdp, tensor"]
    assert cells[f"{name}/up"] == cells[f"{name}/gate"]
    assert cells[f"{name}/down"] == ["layers experts mlp embed", "2x4x32x16", "-, -, tensor, fsdp"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(SMALL, ffn=Moe(top_k=5)), "top_k; expected 1 to the 4 experts; got 5"),
        (replace(SMALL, ffn=Moe(top_k=0)), "top_k; expected 1 to the 4 experts; got 0"),
        (replace(SMALL, ffn=Moe(aux_loss=-1.0)), "aux_loss of the router; expected 0 or more; got -1.0"),
        (replace(SMALL, ffn=Moe(z_loss=-1.0)), "z_loss of the router; expected 0 or more; got -1.0"),
        (replace(SMALL, experts=0), "a Moe layer in a model without experts"),
        (replace(SMALL, ffn=Glu()), "experts in a model without them; got 4"),
    ],
)
def test_choices_that_cannot_be(config, words):
    with pytest.raises(InputError, match=re.escape(words)):
        config.build().check(8)


def test_megablox_off_tpu_is_refused_and_not_replaced():
    config = replace(SMALL, ffn=Moe(grouped=Grouped.MEGABLOX))
    step = Step(stepping.program(config.build(), PHASE), stepping.alone(), seed=0)
    with pytest.raises(InputError, match="grouped=MEGABLOX is a TPU kernel; expected TPU devices; got cpu"):
        step.lower()


def test_experts_go_through_json():
    config = replace(SMALL, ffn=Moe(Activation.GELU, gated=False, top_k=3, grouped=Grouped.MEGABLOX))
    convert = converter()
    assert convert.structure(convert.unstructure(config), mpt.Config) == config
