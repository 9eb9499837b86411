"""The train step: accumulation, meshes and gather forms against one device and against naive sums."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaicjax.errors import InputError
from mosaicjax.layers.attention import QkNorm
from mosaicjax.layers.position import Rotary
from mosaicjax.losses import CrossEntropy
from mosaicjax.mesh import Mesh
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.models import mpt
from mosaicjax.models.decoder import Remat
from mosaicjax.optim import AdamW
from mosaicjax.program import Phase
from mosaicjax.spec import Dtypes
from mosaicjax.step import Step
from tests import stepping
from tests.models import forward

SMALL = mpt.Config(layers=2, embed=16, heads=2, mlp=32, vocab=64)
RICH = mpt.Config(
    layers=2,
    embed=32,
    heads=4,
    kv_heads=2,
    mlp=64,
    vocab=96,
    position=Rotary(),
    windows=(0, 3),
    qk_norm=QkNorm(),
    bias=True,
    residual_dropout=0.1,
    embed_dropout=0.1,
)
BATCH = 16


def relative(got, expected):
    """Norm of the difference of two trees over the norm of the second."""
    flat = [
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (got, expected)
    ]
    return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])


def naive_gradients(decoder, weights, batch, dtypes, z_loss=0.0):
    """One row and then one target at a time: no batches, no chunks, no scan over microbatches."""

    def row_loss(weights, tokens, targets, mask):
        logits = forward.logits_from(decoder, weights, decoder.embed(weights, tokens, where), where)[0]
        shares = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(shares, targets[0][:, None], axis=-1)[:, 0]
        square = jnp.square(jax.nn.logsumexp(logits, axis=-1))
        return jnp.sum((z_loss * square - chosen) * mask[0])

    where = forward.context(batch["tokens"][:1], dtypes=dtypes)
    run = jax.jit(jax.value_and_grad(row_loss))
    total, grads = 0.0, jax.tree.map(np.zeros_like, weights)
    for row in range(len(batch["tokens"])):
        mask = batch["weights"][row : row + 1].astype(dtypes.param)
        loss, part = run(weights, batch["tokens"][row : row + 1], batch["targets"][row : row + 1], mask)
        total += float(loss)
        grads = jax.tree.map(lambda a, b: a + np.asarray(b), grads, part)
    return grads, total


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        pytest.param("float32", 1e-5, marks=pytest.mark.slow),
        pytest.param("float64", 1e-12, marks=pytest.mark.soak),
    ],
)
def test_gradient_is_the_same_whatever_the_microbatch(dtype, bound):
    with jax.enable_x64(dtype == "float64"):
        dtypes = Dtypes(dtype, dtype, dtype)
        decoder = SMALL.build()
        weights = forward.random_weights(decoder, dtypes=dtypes)
        optimizer = AdamW(momentum_dtype=dtype)
        batch = stepping.rows(Phase(8, BATCH, 1), SMALL.vocab)
        expected, total = naive_gradients(decoder, weights, batch, dtypes, z_loss=1e-3)
        for microbatch in (1, 3, 8, BATCH):
            made = stepping.program(
                decoder,
                Phase(8, BATCH, microbatch),
                loss=CrossEntropy(z_loss=1e-3),
                dtypes=dtypes,
                optimizer=optimizer,
            )
            step = Step(made, stepping.alone(), seed=0)
            got, objective, weight = stepping.gradients(step, weights, batch)
            assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(dtype)}
            assert relative(got, expected) < bound, microbatch
            assert objective == pytest.approx(total, rel=bound)
            assert weight == batch["weights"].sum()


@pytest.mark.parametrize("gather", ["compiler", "explicit"])
def test_gradient_over_a_mesh_is_the_naive_one(gather, capfd):
    decoder = SMALL.build()
    weights = forward.random_weights(decoder)
    batch = stepping.rows(Phase(8, BATCH, 1), SMALL.vocab)
    expected, total = naive_gradients(decoder, weights, batch, Dtypes())
    layout = stepping.place(Mesh(data=2, fsdp=(2,), tensor=2, gather=gather), 8)
    step = Step(stepping.program(decoder, Phase(8, BATCH, 12)), layout, seed=0)
    got, objective, weight = stepping.gradients(step, weights, batch)
    # A copy of an activation to every device is something that XLA announces only on stderr.
    assert "rematerialization" not in capfd.readouterr().err
    assert relative(got, expected) < 1e-5
    assert objective == pytest.approx(total, rel=1e-5)
    assert weight == batch["weights"].sum()


MESHES = {
    "torus": Mesh(fsdp=(2, 2), tensor=2),
    "fsdp": Mesh(fsdp=(8,)),
    "data": Mesh(data=2, fsdp=(2,), tensor=2),
}


def rich_step(mesh, devices, microbatch=8, packed=False, config=RICH):
    made = stepping.program(
        config.build(),
        Phase(16, 8, microbatch),
        loss=CrossEntropy(z_loss=1e-3, chunk=8),
        packed=packed,
        measure=True,
    )
    return Step(ClipGradients(0.5)(made), stepping.place(mesh, devices), seed=0, measure=True)


@pytest.fixture(scope="module")
def one_device_path():
    return stepping.train(rich_step(Mesh(fsdp=(1,)), 1), RICH.vocab, 20)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gather"),
    [
        # Each way and each mesh once, but for the soak.
        pytest.param(name, gather, marks=[pytest.mark.soak] * ((name == "torus") != (gather == "compiler")))
        for name in MESHES
        for gather in ("compiler", "explicit")
    ],
)
def test_meshes_agree_with_one_device(name, gather, one_device_path, capfd):
    mesh = replace(MESHES[name], gather=gather)
    path, metrics, _ = stepping.train(rich_step(mesh, 8), RICH.vocab, 20)
    assert np.abs(path / one_device_path - 1).max() < 1e-5
    assert "rematerialization" not in capfd.readouterr().err
    assert metrics["activation_rms"].shape == (1 + RICH.layers,)


@pytest.mark.slow
@pytest.mark.parametrize("gather", ["compiler", pytest.param("explicit", marks=pytest.mark.soak)])
def test_accumulation_over_a_mesh_agrees_with_one_device(gather, one_device_path):
    mesh = replace(MESHES["data"], gather=gather)
    path, _, _ = stepping.train(rich_step(mesh, 8, microbatch=4), RICH.vocab, 20)
    assert np.abs(path / one_device_path - 1).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("gather", [pytest.param("compiler", marks=pytest.mark.soak), "explicit"])
def test_packed_rows_over_a_mesh_agree_with_one_device(gather):
    alone, _, _ = stepping.train(rich_step(Mesh(fsdp=(1,)), 1, packed=True), RICH.vocab, 20, packed=True)
    mesh = replace(MESHES["torus"], gather=gather)
    path, _, _ = stepping.train(rich_step(mesh, 8, packed=True), RICH.vocab, 20, packed=True)
    assert np.abs(path / alone - 1).max() < 1e-5


@pytest.mark.slow
# Each policy's gradients: test_decoder.py.
@pytest.mark.parametrize("remat", [Remat.FULL, Remat.PRODUCTS])
def test_remat_changes_nothing_but_memory(remat, one_device_path):
    step = rich_step(Mesh(fsdp=(1,)), 1, config=replace(RICH, remat=remat))
    path, _, _ = stepping.train(step, RICH.vocab, 20)
    assert np.abs(path / one_device_path - 1).max() < 1e-5


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name != "torus" else name for name in MESHES]
)
def test_each_device_holds_its_share(name):
    config = mpt.Config(layers=2, embed=64, heads=4, mlp=256, vocab=512)
    step = Step(stepping.program(config.build(), Phase(8, 8, 8)), stepping.place(MESHES[name], 8), seed=0)
    state = step.init()
    whole = config.build().spec().nbytes("float32")
    for tree, copies in ((state.trainable, 1), (state.optimizer, 2)):
        for device in jax.devices():
            held = sum(
                shard.data.nbytes
                for leaf in jax.tree.leaves(tree)
                for shard in leaf.addressable_shards
                if shard.device == device
            )
            assert held == pytest.approx(copies * whole / step.layout.weight_shards, rel=0.05)


def collectives(step, folder):
    """What each kind of collective gives, as text, right after XLA's partitioner has made them."""
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    step.lower().compile(compiler_options=options | {"xla_dump_hlo_module_re": "call"})
    (after,) = folder.glob("*after_spmd-partitioning*.txt")
    kinds = ("all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    return {kind: set(re.findall(rf"= (\w+\[[\d,]*\])\S* {kind}\(", after.read_text())) for kind in kinds}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gather", "sums"), [("compiler", "reduce"), ("explicit", "reduce"), ("explicit", "compute")]
)
def test_what_moves_between_devices(gather, sums, tmp_path):
    # On fsdp 2 x tensor 2: weights whole along embed and half along heads, mlp and vocab, cast before they
    # move; their gradients summed in float32, or in bfloat16 where that is asked for. Of activations the
    # residual stream's rows, normed and cast, where heads and mlp read them.
    made = stepping.program(SMALL.build(), Phase(8, 8, 8), dtypes=Dtypes(compute="bfloat16"))
    mesh = Mesh(data=2, fsdp=(2,), tensor=2, gather=gather, sums=sums)
    moved = collectives(Step(made, stepping.place(mesh, 8), seed=0), tmp_path)
    norm, query, out, up, down, table = "[16]", "[16,1,8]", "[1,8,16]", "[16,16]", "[16,16]", "[32,16]"
    rows = "[2,8,16]"
    assert moved["all-gather"] == {f"bf16{shape}" for shape in (norm, query, out, up, down, table, rows)}
    assert moved["all-to-all"] == moved["collective-permute"] == set()
    if gather == "explicit":
        halves = ("[8]", "[8,1,8]", "[1,8,8]", "[8,16]", "[16,8]", "[32,8]")
        dtype = "f32" if sums == "reduce" else "bf16"
        assert moved["reduce-scatter"] == {f"{dtype}{shape}" for shape in halves}


@pytest.mark.parametrize("gather", ["compiler", "explicit"])
def test_gathered_weights_are_not_kept_for_the_backward_pass(gather):
    # Kept, they would be whole matrices of all 3 layers in one array: what fsdp is there to avoid.
    config = mpt.Config(layers=3, embed=32, heads=8, mlp=128, vocab=64)
    mesh = Mesh(fsdp=(8,), gather=gather)
    step = Step(stepping.program(config.build(), Phase(4, 8, 8)), stepping.place(mesh, 8), seed=0)
    text = step.lower().compile().as_text()
    assert "f32[3,4,128]" in text
    assert not re.findall(r"f32\[3,(?:32,128|128,32|32,8,4|8,4,32)\]", text)


@pytest.mark.slow
def test_moments_and_weights_are_overwritten_where_they_lie():
    # A copy of an argument of the step is a weight or a moment that something else still reads.
    config = mpt.Config(layers=3, embed=32, heads=8, mlp=128, vocab=64)
    step = Step(stepping.program(config.build(), Phase(4, 8, 8)), stepping.place(Mesh(fsdp=(1,)), 1), seed=0)
    text = step.lower().compile().as_text()
    assert re.findall(r"%state_optimizer\S*mu\S* = f32\[", text)
    assert not re.findall(r"= f32\[\d\S* copy\(\S*%state_", text)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_changes_nothing():
    decoder = SMALL.build()
    step = Step(stepping.program(decoder, Phase(8, 4, 4)), stepping.alone(), seed=0)
    compiled = step.lower().compile()
    batch = stepping.rows(step.program.phase, SMALL.vocab)

    def call(state, batch, **flags):
        before = jax.tree.map(np.asarray, state)
        after, halted, metrics = compiled(
            state, {}, stepping.put(step, batch), stepping.signals(step, **flags)
        )
        return before, after, bool(halted), metrics

    before, state, halted, metrics = call(step.init(), batch)
    assert (int(state.step), halted, bool(metrics["fine"]), int(metrics["stop"])) == (1, False, True, 0)
    assert relative(state.trainable, before.trainable) > 1e-4
    bad = batch | {"weights": np.where(batch["row"][:, None] == 1, np.inf, batch["weights"])}
    before, state, halted, metrics = call(state, bad)
    assert (int(state.step), halted, bool(metrics["fine"])) == (1, True, False)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state), before)
    before, state, halted, metrics = call(state, batch, halted=True, stop=2)
    assert (int(state.step), halted, bool(metrics["fine"]), int(metrics["stop"])) == (1, True, False, 2)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state), before)
    # Finite gradients, and a moment of the optimizer that takes the update past the largest float32.
    spoiled = optax.tree_utils.tree_set(
        state.optimizer, mu=jax.tree.map(lambda leaf: leaf * 0 + 1e35, state.trainable)
    )
    before, state, halted, metrics = call(state.replace(optimizer=spoiled), batch)
    assert np.isfinite(float(metrics["grad_norm"])) and (halted, bool(metrics["fine"])) == (True, False)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state), before)
    state = step.init()
    empty = batch | {"weights": np.zeros_like(batch["weights"])}
    _, state, halted, metrics = call(state, empty)
    assert (float(metrics["loss"]), float(metrics["grad_norm"]), float(metrics["tokens"])) == (0, 0, 0)


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        (
            Phase(8, 12, 8),
            "the batch does not divide over the mesh; expected a multiple of 8 rows (data 1 x fsdp 8)",
        ),
        (Phase(8, 16, 4), "the microbatch does not divide over the mesh; expected a multiple of 8 rows"),
        (Phase(8, 8, 16), "microbatch; expected 1 to the batch's 8 rows; got 16"),
        (Phase(8, 8, 0), "microbatch; expected 1 to the batch's 8 rows; got 0"),
    ],
)
def test_batches_that_do_not_fit_the_mesh(phase, words):
    with pytest.raises(InputError, match=re.escape(words)):
        Step(stepping.program(SMALL.build(), phase), stepping.place(Mesh(fsdp=(8,)), 8), seed=0)


def test_last_microbatch_is_the_rest():
    assert [Phase(1, 16, size).microbatches for size in (1, 3, 8, 16)] == [16, 6, 2, 1]
