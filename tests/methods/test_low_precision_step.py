"""Low precision in the train step: which products, on meshes, under remat, and what it does to a loss."""

import argparse
import inspect
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from mosaicjax.errors import InputError
from mosaicjax.layers.attention import QkNorm
from mosaicjax.layers.block import Block, StreamScales
from mosaicjax.layers.inits import Kaiming
from mosaicjax.layers.linear import PLAIN
from mosaicjax.layers.mlp import Glu
from mosaicjax.losses import CrossEntropy
from mosaicjax.mesh import Mesh
from mosaicjax.methods.low_precision import HEAD, LowPrecision, Quantised, chosen
from mosaicjax.models import mixtral, mpt
from mosaicjax.models.brought import NnxModel
from mosaicjax.models.decoder import Remat
from mosaicjax.program import Phase
from mosaicjax.spec import Dtypes
from mosaicjax.step import Step, digest
from tests import stepping, tiny
from tests.models import forward

# All dims differ, so that a product is known by its shapes.
MODEL = mpt.Config(layers=2, embed=24, heads=2, kv_heads=1, head_dim=16, mlp=40, vocab=64, ffn=Glu())
PHASE = Phase(seq=8, batch=8, microbatch=8)
LAYER = "stacks/0/0/layer"
MESHES = {
    "compiler": Mesh(data=2, fsdp=(2,), tensor=2),
    "explicit": Mesh(fsdp=(2, 2), tensor=2, gather="explicit"),
}
WIDE = replace(MODEL, heads=4, kv_heads=2)


def made(method=None, model=MODEL, phase=PHASE, **options):
    plain = stepping.program(model.build(), phase, **options)
    return plain if method is None else method(plain)


def gradients(method, mesh=None, devices=1, model=MODEL, phase=PHASE, **options):
    layout = stepping.alone() if mesh is None else stepping.place(mesh, devices)
    step = Step(made(method, model, phase, **options), layout, seed=0)
    batch = stepping.rows(phase, model.vocab)
    with tiny.quick():
        grads, objective, _ = stepping.gradients(step, forward.random_weights(model.build()), batch)
    return np.concatenate([leaf.astype(np.float64).ravel() for leaf in jax.tree.leaves(grads)]), objective


def apart(one, other):
    return np.linalg.norm(one - other) / np.linalg.norm(other)


def int8_products(method):
    """Shapes of operands of the products of integers in lowered gradients, and how often each is there."""
    step = Step(made(method), stepping.alone(), seed=0)
    weights, batch = step.abstract_state().trainable, step.abstract_batch()
    text = jax.jit(step.gradients).lower(weights, {}, {}, batch, jax.random.key(0)).as_text()
    found = re.findall(r"dot_general.*: \(tensor<(\d+)x(\d+)xi8>, tensor<(\d+)x(\d+)xi8>\)", text)
    return Counter(tuple(map(int, each)) for each in found)


ROWS = 8 * 8
QUERY, KEY, OUT, UP, DOWN, LOGITS = (24, 32), (24, 16), (32, 24), (24, 40), (40, 24), (24, 64)


@pytest.mark.parametrize(
    ("only", "backward", "shapes"),
    [
        (("stacks/*",), "all", [QUERY, KEY, KEY, OUT, UP, UP, DOWN]),
        pytest.param(("stacks/*/mlp/*",), "inputs", [UP, UP, DOWN], marks=pytest.mark.slow),
        (("*/attention/out", "head"), "compute", [OUT, LOGITS]),
    ],
)
def test_patterns_choose_products(only, backward, shapes):
    expected = Counter((ROWS, inner, inner, outer) for inner, outer in shapes)
    if backward != "compute":
        expected += Counter((ROWS, outer, inner, outer) for inner, outer in shapes)
    if backward == "all":
        expected += Counter((ROWS, inner, ROWS, outer) for inner, outer in shapes)
    assert int8_products(LowPrecision(backward=backward, only=only)) == expected


@pytest.mark.parametrize(
    ("mesh", "devices"), [(Mesh(fsdp=(1,)), 1), pytest.param(MESHES["explicit"], 8, marks=pytest.mark.slow)]
)
def test_the_hook_itself_changes_no_program(mesh, devices):
    """Weights marked with the product that they have anyway: the same StableHLO."""
    program = made(model=WIDE)
    decoder = program.loss.decoder
    marked = Quantised(decoder, PLAIN, frozenset(chosen(decoder, ("stacks/*",))))
    layout = stepping.place(mesh, devices)
    one, other = (
        digest(Step(each, layout, seed=0).lower())
        for each in (program, replace(program, loss=replace(program.loss, decoder=marked)))
    )
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_have_the_gradient_of_one(name, capfd):
    """But for entries that the last bit of a sum rounds to the neighbouring integer."""
    expected, total = gradients(LowPrecision(), model=WIDE)
    got, objective = gradients(LowPrecision(), MESHES[name], 8, model=WIDE)
    assert "rematerialization" not in capfd.readouterr().err
    assert objective == pytest.approx(total, rel=1e-4)
    assert apart(got, expected) < 3e-3
    # That is much nearer than products which are not rounded.
    assert apart(gradients(None, model=WIDE)[0], expected) > 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", pytest.param("fp8", marks=pytest.mark.soak)])
def test_remat_microbatches_and_chunks_leave_the_gradient_as_it_is(dtype):
    method = LowPrecision(dtype, only=("stacks/*", HEAD))
    expected, total = gradients(method)
    for changes in (
        {"model": replace(MODEL, remat=Remat.FULL)},
        {"model": replace(MODEL, remat=Remat.DOTS), "phase": replace(PHASE, microbatch=3)},
        {"loss": CrossEntropy(chunk=4)},
    ):
        got, objective = gradients(method, **changes)
        assert objective == pytest.approx(total, rel=1e-4)
        assert apart(got, expected) < (3e-3 if dtype == "int8" else 1e-2), changes


def losses(method, steps, model, seq):
    """Of each step, on the bytes of a module of the standard library."""
    text = np.frombuffer(inspect.getsource(argparse).encode(), np.uint8)
    phase = Phase(seq=seq, batch=8, microbatch=8)
    step = Step(made(method, model, phase, dtypes=Dtypes(compute="bfloat16")), stepping.alone(), seed=0)
    compiled, state, found = step.lower().compile(), step.init(), []
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = text[rng.integers(0, len(text) - seq - 1, 8)[:, None] + np.arange(seq + 1)].astype(np.int32)
        batch = {
            "tokens": rows[:, :-1],
            "targets": rows[:, 1:],
            "weights": np.ones((8, seq), np.float32),
            "row": np.arange(8, dtype=np.int32),
        }
        state, _, metrics = compiled(state, {}, stepping.put(step, batch), stepping.signals(step))
        found.append(float(metrics["loss"]))
    return np.array(found)


WAYS = [LowPrecision(), LowPrecision(backward="all"), LowPrecision("fp8", backward="all")]


@pytest.mark.slow
@pytest.mark.soak
def test_a_loss_on_real_text_stays_within_a_percent():
    model = mpt.Config(layers=2, embed=48, heads=2, mlp=96, vocab=256)
    expected = losses(None, 60, model, seq=64)
    assert expected[-10:].mean() < 0.75 * expected[0]
    for method in WAYS:
        got = losses(method, 60, model, seq=64)
        assert got[-10:].mean() == pytest.approx(expected[-10:].mean(), rel=1e-2), method
        # It is another run, all the same.
        assert (got[1:] != expected[1:]).all()


def test_names_that_nothing_has_and_experts_are_refused():
    decoder = MODEL.build()
    assert chosen(decoder, ("head", "*/mlp/down")) == [f"{LAYER}/mlp/down", HEAD]
    with pytest.raises(InputError, match=r"no product is called 'stacks/\*/norm'; expected some of stacks/"):
        LowPrecision(only=("stacks/*", "stacks/*/norm"))(made())
    with pytest.raises(InputError, match="expected patterns of some products; got none"):
        LowPrecision(only=())(made())
    sparse = mixtral.Config(layers=2, embed=16, heads=2, kv_heads=1, mlp=32, vocab=64, experts=2)
    with pytest.raises(InputError, match=r"does not reach experts' products; got stacks/0/0/layer/mlp/"):
        LowPrecision()(made(model=sparse))
    named = chosen(sparse.build(), ("stacks/*/attention/*",))
    assert named == [f"{LAYER}/attention/{name}" for name in ("key", "out", "query", "value")]


def test_products_are_chosen_whatever_their_weights_start_at():
    """Every matrix of a layer, those that start at zero too, and no bias, norm or number beside."""
    config = replace(
        MODEL,
        init=Kaiming(zero_residual=True),
        bias=True,
        qk_norm=QkNorm(),
        value_tables=1,
        block=Block(scales=StreamScales()),
    )
    parts = (
        "attention/key",
        "attention/out",
        "attention/query",
        "attention/value",
        "mlp/down",
        "mlp/gate",
        "mlp/up",
    )
    assert chosen(config.build(), ("stacks/*",)) == [f"{LAYER}/{part}" for part in parts]


def test_knobs_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="LowPrecision.dtype; expected int8 or fp8; got int4"):
        LowPrecision("int4")(made())
    with pytest.raises(
        InputError, match="LowPrecision.backward; expected compute or inputs or all; got int8"
    ):
        LowPrecision(backward="int8")(made())


def test_programs_that_it_does_not_know_are_refused():
    program = made()
    module = replace(program.loss, decoder=NnxModel())
    with pytest.raises(InputError, match="LowPrecision of a module of one's own"):
        LowPrecision()(replace(program, loss=module))
    with pytest.raises(
        InputError, match="brings a loss of its own; got LowPrecision; fix: list LowPrecision"
    ):
        LowPrecision()(replace(made(), loss=lambda *_: None))


def test_a_missing_package_is_said_in_one_line(tmp_path):
    # None in sys.modules is how Python itself marks a module that cannot be imported.
    script = """
import sys
sys.modules["qwix"] = None
from mosaicjax import cli
sys.exit(cli.main(sys.argv[1:]))
"""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from mosaicjax.data.mixture import TokenStore\n"
        "from mosaicjax.methods.low_precision import LowPrecision\n"
        "from mosaicjax.models import mpt\n"
        "from mosaicjax.recipe import Recipe\n"
        "model = mpt.Config(layers=1, embed=8, heads=1, mlp=8, vocab=32)\n"
        "recipe = Recipe(model=model, data=TokenStore('none'), methods=(LowPrecision(),))\n"
    )
    words = ["plan", str(recipe), "--topology", "cpu:1"]
    run = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    said = [line for line in run.stderr.splitlines() if line.startswith("mosaicjax: ")]
    assert (run.returncode, said) == (
        2,
        ["mosaicjax: LowPrecision needs qwix; fix: pip install 'mosaicjax[quant]'"],
    )
