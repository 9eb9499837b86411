"""Recipes read, changed, written and compared: what comes back is what went in."""

import dataclasses
import json
import string
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax import optim, recipe_file
from mosaicjax.data.mixture import By, Domain, Mixture, Rows, TokenStore
from mosaicjax.errors import InputError
from mosaicjax.hardware import Price
from mosaicjax.kernels.flash_attention import Implementation
from mosaicjax.layers.attention import Attention, QkNorm
from mosaicjax.layers.block import Block, StreamScales
from mosaicjax.layers.inits import InitRule, Kaiming
from mosaicjax.layers.mlp import Activation, Glu, Mlp
from mosaicjax.layers.norm import LayerNorm, Norm, RmsNorm
from mosaicjax.layers.position import (
    Alibi,
    DynamicScaling,
    Learned,
    LinearScaling,
    Llama3Scaling,
    Position,
    RopeScaling,
    Rotary,
)
from mosaicjax.layers.token_inputs import Bigram, Smear
from mosaicjax.losses import CrossEntropy
from mosaicjax.mesh import Mesh
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.methods.dpo import DPO
from mosaicjax.methods.ema import Ema
from mosaicjax.methods.sam import Sam
from mosaicjax.methods.swa import Swa
from mosaicjax.models import mpt
from mosaicjax.models.decoder import Remat
from mosaicjax.muon import Muon
from mosaicjax.polar import Jordan, PolarExpress
from mosaicjax.recipe import Eval, Later, Log, Recipe, Save, Tasks
from mosaicjax.schedule_free import ScheduleFree
from mosaicjax.spec import Dtypes
from mosaicjax.spikes import Ignore, RollBack, Stop
from tests import tiny

FLOATS = st.floats(allow_nan=False, width=64)
SIZES = st.integers(0, 10**12)
NAMES = st.text(string.printable + "äß→", max_size=8)
FORMATS = st.sampled_from(["float64", "float32", "bfloat16", "float16"])
MOMENTA = st.sampled_from(["float32", "bfloat16", "float64"])


def some(kind, **fields):
    """Instances with a draw for every field: by name where given, else by the type of its default."""
    by_type = {bool: st.booleans(), int: SIZES, float: FLOATS, str: NAMES}
    by_type[Implementation] = st.sampled_from(Implementation)
    drawn = {
        field.name: fields[field.name] if field.name in fields else by_type[type(field.default)]
        for field in dataclasses.fields(kind)
    }
    return st.builds(kind, **drawn)


SCALINGS = st.one_of(some(kind) for kind in (RopeScaling, LinearScaling, DynamicScaling, Llama3Scaling))
PAIRS = st.sampled_from(["halves", "adjacent"])
POSITIONS = st.one_of(
    some(Position), some(Learned), some(Alibi), some(Rotary, scaling=SCALINGS, pairs=PAIRS), st.just(Rotary())
)
NORMS = st.one_of(some(kind) for kind in (Norm, LayerNorm, RmsNorm))
SCHEDULES = st.one_of(
    some(kind)
    for kind in (optim.Schedule, optim.Constant, optim.Cosine, optim.Linear, optim.Wsd, optim.InverseSqrt)
)
OPTIMIZERS = st.one_of(
    some(optim.Optimizer, lr=SCHEDULES),
    some(optim.AdamW, lr=SCHEDULES, momentum_dtype=MOMENTA),
    some(optim.Lion, lr=SCHEDULES, momentum_dtype=MOMENTA),
    some(optim.Adopt, lr=SCHEDULES, momentum_dtype=MOMENTA),
    some(optim.Ademamix, lr=SCHEDULES),
    some(ScheduleFree, lr=SCHEDULES),
    some(
        Muon,
        lr=SCHEDULES,
        dtype=MOMENTA,
        polynomials=st.one_of(some(Jordan), some(PolarExpress)),
        others=some(optim.AdamW, lr=SCHEDULES, momentum_dtype=MOMENTA),
    ),
)
QK_NORMS = st.none() | some(QkNorm, norm=NORMS)
ATTENTIONS = some(Attention, position=POSITIONS, qk_norm=QK_NORMS, value_table=st.none() | SIZES)
MODELS = some(
    mpt.Config,
    attention=ATTENTIONS,
    block=some(
        Block,
        attention=ATTENTIONS,
        mlp=some(Mlp, activation=st.sampled_from(Activation)),
        norm=NORMS,
        scales=st.none() | some(StreamScales),
    ),
    inputs=st.lists(st.one_of(some(Smear), some(Bigram)), max_size=2).map(tuple),
    position=POSITIONS,
    norm=NORMS,
    ffn=st.one_of(some(kind, activation=st.sampled_from(Activation)) for kind in (Mlp, Glu)),
    qk_norm=QK_NORMS,
    windows=st.lists(SIZES, max_size=3).map(tuple),
    init=st.one_of(some(InitRule), some(Kaiming)),
    remat=st.sampled_from(Remat),
)
ROWS = st.sampled_from(Rows)
DOMAINS = st.lists(st.builds(Domain, NAMES, NAMES, FLOATS), max_size=3).map(tuple)
DATA = st.one_of(
    some(TokenStore, path=NAMES, rows=ROWS), some(Mixture, domains=DOMAINS, by=st.sampled_from(By), rows=ROWS)
)
RECIPES = some(
    Recipe,
    model=MODELS,
    data=DATA,
    optimizer=OPTIMIZERS,
    loss=some(CrossEntropy),
    methods=st.lists(st.one_of(map(some, (ClipGradients, DPO, Ema, Swa, Sam))), max_size=2).map(tuple),
    skips=st.lists(SIZES, max_size=3).map(tuple),
    on_spike=st.one_of(some(kind) for kind in (Ignore, Stop, RollBack)),
    mesh=some(
        Mesh,
        fsdp=st.lists(st.integers(-1, 99), max_size=3).map(tuple),
        gather=st.sampled_from(["compiler", "explicit"]),
        sums=st.sampled_from(["reduce", "compute"]),
        rules=st.dictionaries(NAMES, st.sampled_from(["fsdp", "tensor", "none"]), max_size=2),
    ),
    dtypes=st.builds(Dtypes, FORMATS, FORMATS, FORMATS),
    eval=some(Eval),
    save=some(Save),
    log=some(Log),
    tasks=some(Tasks, names=st.lists(NAMES, max_size=2).map(tuple)),
    phases=st.lists(
        st.builds(
            Later,
            SIZES,
            *[st.none() | SIZES] * 3,
            data=st.none() | DATA,
            model=st.none() | st.just(mpt.Config()),
        ),
        max_size=2,
    ).map(tuple),
    price=st.none() | st.builds(Price, st.floats(0, 1e9), NAMES, NAMES),
)


@given(RECIPES)
def test_json_gives_the_recipe_back(recipe):
    text = recipe_file.to_json(recipe)
    again = recipe_file.from_json(text)
    assert again == recipe
    assert repr(again) == repr(recipe), "types differ where values are equal"
    assert recipe_file.to_json(again) == text
    assert recipe_file.changes(recipe, again) == []


@given(RECIPES, RECIPES)
def test_changes_are_the_fields_that_differ(before, after):
    found = {change.name: (change.before, change.after) for change in recipe_file.changes(before, after)}
    for name in ("seed", "steps", "init_from", "batch"):
        old, new = getattr(before, name), getattr(after, name)
        assert found.get(name) == (None if old == new else (old, new))
    old, new = type(before.model.position), type(after.model.position)
    assert ("model.position.type" in found) == (old is not new)
    assert bool(found) == (before != after)


@pytest.fixture
def recipe(tiny_recipe):
    return recipe_file.load(str(tiny_recipe)).recipe


def changed(recipe, *options):
    return recipe_file.override(recipe, options, "test")


def test_overrides_of_numbers_tuples_enums_and_nested_parts(recipe):
    model = recipe.model
    position = dataclasses.replace(model.position, max_bias=4.0)
    for options, expected in {
        ("--steps", "9"): dataclasses.replace(recipe, steps=9),
        ("--steps=9",): dataclasses.replace(recipe, steps=9),
        ("--model.position.max-bias", "4"): dataclasses.replace(
            recipe, model=dataclasses.replace(model, position=position)
        ),
        ("--model.windows", "8", "0"): dataclasses.replace(
            recipe, model=dataclasses.replace(model, windows=(8, 0))
        ),
        ("--model.remat", "DOTS"): dataclasses.replace(
            recipe, model=dataclasses.replace(model, remat=Remat.DOTS)
        ),
        ("--model.ffn.activation", "SILU"): dataclasses.replace(
            recipe, model=dataclasses.replace(model, ffn=Mlp(Activation.SILU))
        ),
        ("--mesh.fsdp", "2", "-1", "--mesh.tensor", "2"): dataclasses.replace(
            recipe, mesh=Mesh(fsdp=(2, -1), tensor=2)
        ),
        ("--mesh.rules", "kv_heads", "none"): dataclasses.replace(
            recipe, mesh=Mesh(rules={"kv_heads": "none"})
        ),
        ("--methods.0.norm", "0.5"): dataclasses.replace(recipe, methods=(ClipGradients(0.5),)),
        ("--optimizer.lr.peak", "3e-4"): dataclasses.replace(
            recipe,
            optimizer=dataclasses.replace(
                recipe.optimizer, lr=dataclasses.replace(recipe.optimizer.lr, peak=3e-4)
            ),
        ),
        ("--log.norms", "True"): dataclasses.replace(recipe, log=Log(norms=True)),
        ("--log.tensorboard", "False"): dataclasses.replace(recipe, log=Log(tensorboard=False)),
        ("--dtypes.compute", "bfloat16"): dataclasses.replace(recipe, dtypes=Dtypes(compute="bfloat16")),
    }.items():
        assert changed(recipe, *options) == expected, options


def test_dashes_and_underscores_are_the_same(recipe):
    dashed = changed(recipe, "--model.position.max-bias", "4", "--optimizer.weight-decay", "0.5")
    lined = changed(recipe, "--model.position.max_bias", "4", "--optimizer.weight_decay", "0.5")
    assert dashed == lined != recipe


def test_flat_names_every_leaf(recipe):
    flat = recipe_file.flat(recipe)
    assert flat["methods.0.norm"] == 1.0
    assert flat["model.position.max_bias"] == 8.0
    assert flat["mesh.fsdp"] == (-1,)
    named = [name for name, _ in recipe_file.options(recipe)]
    assert "--model.position.max-bias" in named and "--methods.0.norm" in named
    assert "--price" not in named and "--model.qk-norm" not in named


@pytest.mark.slow
def test_every_option_that_is_listed_can_be_given(recipe):
    for name, value in recipe_file.options(recipe):
        given = [value.strip("'")] if value else []
        assert changed(recipe, name, *given) == recipe, name


OWN = '''
from dataclasses import dataclass

import jax.numpy as jnp

from mosaicjax.layers.position import Alibi
from mosaicjax.mesh import BATCH


@dataclass(frozen=True)
class Gentle(Alibi):
    """Half of ALiBi's slopes."""

    share: float = 0.5

    def slopes(self, heads):
        return self.share * super().slopes(heads)

'''


def write_own(path, store, share=0.5):
    model = f"mpt.Config(layers=2, embed=32, heads=2, mlp=64, vocab=320, position=Gentle(share={share}))"
    return tiny.write_recipe(path, store, before=OWN, model=model)


def test_own_classes_come_back_from_the_run_alone(tmp_path, tiny_store):
    loaded = recipe_file.load(str(write_own(tmp_path / "own.py", tiny_store)))
    recipe_file.save(str(tmp_path / "run"), loaded)
    (tmp_path / "own.py").unlink()
    again = recipe_file.load(str(tmp_path / "run"))
    assert again.recipe.model.position.share == 0.5
    assert type(again.recipe.model.position).__qualname__ == "Gentle"
    assert recipe_file.changes(loaded.recipe, again.recipe) == []
    assert (again.source, again.name) == (loaded.source, "run")
    other = recipe_file.load(str(write_own(tmp_path / "own.py", tiny_store, share=0.25)))
    assert [str(change) for change in recipe_file.changes(again.recipe, other.recipe)] == [
        "model.position.share: 0.5 -> 0.25"
    ]


def test_a_recipe_without_its_source_says_which_class_is_gone(tmp_path, tiny_store):
    loaded = recipe_file.load(str(write_own(tmp_path / "own.py", tiny_store)))
    recipe_file.save(str(tmp_path / "run"), loaded)
    (tmp_path / "run" / "recipe.py").unlink()
    with pytest.raises(InputError, match=r"names a class that is not there; got mosaicjax_recipe:Gentle"):
        recipe_file.load(str(tmp_path / "run"))


@dataclass(frozen=True)
class Change:
    options: tuple[str, ...]
    said: tuple[str, ...]


SAFE = [
    Change(("--steps", "9"), ("steps: 6 -> 9",)),
    Change(("--save.every", "2", "--eval.rows", "0"), ("eval.rows: 8 -> 0", "save.every: 3 -> 2")),
    Change(("--tasks.every", "5"), ("tasks.every: 0 -> 5",)),
    Change(("--optimizer.lr.peak", "1e-3"), ("optimizer.lr.peak: 0.002 -> 0.001",)),
    Change(("--optimizer.weight-decay", "0"), ("optimizer.weight_decay: 0.0001 -> 0.0",)),
    Change(("--mesh.fsdp", "2", "2"), ("mesh.fsdp: [-1] -> [2, 2]",)),
    Change(("--model.remat", "FULL"), ("model.remat: none -> full",)),
    Change(("--microbatch", "4", "--loss.chunk", "8"), ("microbatch: 0 -> 4", "loss.chunk: 0 -> 8")),
]
UNSAFE = [
    Change(("--seed", "4"), ("seed: 3 -> 4",)),
    Change(("--batch", "16"), ("batch: 8 -> 16",)),
    Change(("--seq", "16"), ("seq: 32 -> 16",)),
    Change(("--model.layers", "4"), ("model.layers: 2 -> 4",)),
    Change(("--optimizer.b1", "0.8"), ("optimizer.b1: 0.9 -> 0.8",)),
    Change(("--methods.0.norm", "2"), ("methods.0.norm: 1.0 -> 2.0",)),
    Change(("--data.isolate", "True"), ("data.isolate: False -> True",)),
    Change(("--loss.z-loss", "0.1"), ("loss.z_loss: 0.0 -> 0.1",)),
    Change(("--init-from", "x"), ("init_from: (empty) -> x",)),
    Change(("--dtypes.compute", "bfloat16"), ("dtypes.compute: float32 -> bfloat16",)),
]


@pytest.mark.parametrize("change", SAFE, ids=str)
def test_safe_changes_are_named(recipe, change):
    found = recipe_file.check_continues(recipe, changed(recipe, *change.options), "run")
    assert sorted(map(str, found)) == sorted(change.said)


@pytest.mark.parametrize("change", UNSAFE, ids=str)
def test_unsafe_changes_are_refused(recipe, change):
    after = changed(recipe, *change.options, "--steps", "7")
    with pytest.raises(InputError) as refusal:
        recipe_file.check_continues(recipe, after, "runs/a")
    assert str(refusal.value).startswith(f"runs/a was trained by another recipe ({change.said[0]});")
    assert "--init-from runs/a" in str(refusal.value)


def test_a_part_of_another_class_is_a_change_of_its_type(recipe):
    other = dataclasses.replace(recipe, optimizer=optim.Lion(), methods=())
    found = {change.name: change for change in recipe_file.changes(recipe, other)}
    assert (found["optimizer.type"].before, found["optimizer.type"].after) == (
        "mosaicjax.optim:AdamW",
        "mosaicjax.optim:Lion",
    )
    assert found["optimizer.eps"].after == "(none)"
    assert found["methods.0.norm"].before == 1.0 and found["methods.0.norm"].after == "(none)"
    assert not found["optimizer.type"].safe
    lr = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, lr=optim.Linear()))
    assert all(change.safe for change in recipe_file.changes(recipe, lr))


def test_json_is_what_a_person_can_read(recipe):
    contents = json.loads(recipe_file.to_json(recipe))
    assert contents["type"] == "mosaicjax.recipe:Recipe"
    assert contents["optimizer"]["lr"] == {
        "type": "mosaicjax.optim:Cosine",
        "peak": 2e-3,
        "warmup": 4,
        "final": 0.1,
        "over": 0,
        "floor": 0.0,
    }
    assert contents["model"]["remat"] == "none"


@pytest.mark.parametrize("word", ["", "float8"])
def test_json_with_a_word_that_is_no_choice_is_refused(recipe, word):
    values = json.loads(recipe_file.to_json(recipe))
    values["dtypes"]["compute"] = word
    with pytest.raises(InputError, match=r"recipe.json: Dtypes.compute; expected .*bfloat16"):
        recipe_file.from_json(json.dumps(values))
