"""Every recipe against what is published of it: parameters to the last weight, tokens, rates; and two steps.

A new file of recipes/ fails here until it is listed with its published count.
"""

import dataclasses
import json
import math
import random
import runpy
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaicjax import recipe_file
from mosaicjax.data.build import build
from mosaicjax.data.chat import Chat
from mosaicjax.data.tokenizer import load_tokenizer, train_tokenizer
from mosaicjax.show import described
from tests import jobs, tiny

FOLDER = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def mpt(layers, d, vocab, positions=0, biases=False):
    """QKV, output, up and down of 12 d^2 a layer; norms; tied table; by choice a bias a row and positions."""
    matrices, norms = layers * (3 * d * d + d * d + 4 * d * d + 4 * d * d), (2 * layers + 1) * d
    biased = layers * (3 * d + d + 4 * d + d) + norms if biases else 0
    return matrices + norms + biased + vocab * d + positions * d


def neox(layers, d, vocab):
    """As MPT with biases, an untied head without one beside."""
    return mpt(layers, d, vocab, biases=True) + vocab * d


def gptj(layers, d, vocab):
    """Attention without biases, one norm a layer, an MLP and a head with biases."""
    layer = 4 * d * d + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * d
    return layers * layer + 2 * d + vocab * d + (vocab * d + vocab)


def llama(layers, d, kv_width, mlp, vocab, experts=0):
    """Grouped queries, three matrices an MLP, of which a mixture has `experts` and a router."""
    feed = 3 * d * mlp
    feed = experts * feed + experts * d if experts else feed
    return layers * (2 * d * d + 2 * d * kv_width + feed + 2 * d) + d + 2 * vocab * d


@dataclasses.dataclass(frozen=True)
class Published:
    """What is known of a recipe's model without this package.

    `peer` is Transformers' configuration class and its arguments, where Transformers has the architecture.
    `rounded` is how far the published count is rounded (0: to the last weight), `tokens` the published
    number.
    """

    count: int
    source: str
    by_hand: int
    tokens: float
    rounded: int = 0
    peer: tuple[str, dict] | None = None


MPT_LIKE = {"attn_config": {"alibi": True}, "no_bias": True, "expansion_ratio": 4}

PUBLISHED = {
    "quickstart": Published(
        # Two tables, hashed pairs, layers, and norms of the stream, of queries and of keys.
        count=2 * 4_096 * 128 + 32_768 * 128 + 4 * 12 * 128**2 + 9 * 128 + 4 * 2 * 32,
        source="ours: published nowhere else",
        by_hand=2 * 4_096 * 128 + 32_768 * 128 + 4 * 12 * 128**2 + 9 * 128 + 4 * 2 * 32,
        tokens=1_536_000,
    ),
    "dial": Published(
        # nanochat's README gives 561M for depth 20: without the scales of norms, these are 560,988,160.
        count=12 * 12 * 768**2 + 2 * 65_536 * 768 + (2 * 12 + 1) * 768 + 12 * 2 * 128,
        source="nanochat's formulas: ours adds norms with scales",
        by_hand=12 * 12 * 768**2 + 2 * 65_536 * 768 + (2 * 12 + 1) * 768 + 12 * 2 * 128,
        tokens=12 * (12 * 12 * 768**2 + 65_536 * 768),
    ),
    "mpt_125m": Published(
        count=125_311_488,
        source="llm-foundry scripts/train/benchmarking/README.md, NumParams of 125m at 2,048 tokens",
        by_hand=mpt(12, 768, 50_368, positions=2_048, biases=True),
        tokens=2.5e9,
    ),
    "mpt_1b": Published(
        count=1_315_950_592,
        source="llm-foundry scripts/train/benchmarking/README.md, NumParams of 1b at 2,048 tokens",
        by_hand=mpt(24, 2_048, 50_368, positions=2_048, biases=True),
        tokens=26e9,
    ),
    "mpt_7b": Published(
        count=13_298_573_312 // 2,
        source="mosaicml/mpt-7b, total_size of pytorch_model.bin.index.json, two bytes a weight",
        by_hand=mpt(32, 4_096, 50_432),
        tokens=1e12,
        peer=("MptConfig", dict(n_layers=32, d_model=4_096, n_heads=32, vocab_size=50_432)),
    ),
    "mpt_30b": Published(
        count=29_950_000_000,
        rounded=10_000_000,
        source="model card of mosaicml/mpt-30b: 29.95B",
        by_hand=mpt(48, 7_168, 50_432),
        tokens=1e12,
        peer=("MptConfig", dict(n_layers=48, d_model=7_168, n_heads=64, vocab_size=50_432)),
    ),
    "replit_code_3b": Published(
        count=2_700_000_000,
        rounded=100_000_000,
        source="model card of replit/replit-code-v1-3b: 2.7B, where its config.json makes 2.6B",
        by_hand=mpt(32, 2_560, 32_768),
        tokens=525e9,
        peer=("MptConfig", dict(n_layers=32, d_model=2_560, n_heads=32, vocab_size=32_768)),
    ),
    "pythia_160m": Published(
        count=162_322_944,
        source="model card of EleutherAI/pythia-160m, total params",
        by_hand=neox(12, 768, 50_304),
        tokens=299_892_736_000,
        peer=(
            "GPTNeoXConfig",
            dict(num_hidden_layers=12, hidden_size=768, intermediate_size=3_072, vocab_size=50_304)
            | dict(num_attention_heads=12),
        ),
    ),
    "pythia_2_8b": Published(
        count=2_775_208_960,
        source="model card of EleutherAI/pythia-2.8b, total params",
        by_hand=neox(32, 2_560, 50_304),
        tokens=299_892_736_000,
        peer=(
            "GPTNeoXConfig",
            dict(num_hidden_layers=32, hidden_size=2_560, intermediate_size=10_240, vocab_size=50_304)
            | dict(num_attention_heads=32),
        ),
    ),
    "gptj_6b": Published(
        # mesh-transformer-jax counts eight copies of every norm (28 layers and the last) and of the MLP's
        # output bias, one a model shard, and eight biases of the embedding, which its exporter folds in.
        count=6_053_381_344 - 7 * (29 * 2 * 4_096) - 7 * (28 * 4_096) - 8 * 4_096,
        source="mesh-transformer-jax README.md, n_parameters, less the copies of 8 model shards",
        by_hand=gptj(28, 4_096, 50_400),
        tokens=402e9,
        peer=("GPTJConfig", dict(n_layer=28, n_embd=4_096, n_head=16, rotary_dim=64, vocab_size=50_400)),
    ),
    "llama3_8b": Published(
        count=8_030_261_248,
        source="safetensors total of meta-llama/Meta-Llama-3-8B",
        by_hand=llama(32, 4_096, 8 * 128, 14_336, 128_256),
        tokens=15e12,
        peer=(
            "LlamaConfig",
            dict(num_hidden_layers=32, hidden_size=4_096, intermediate_size=14_336, vocab_size=128_256)
            | dict(num_attention_heads=32, num_key_value_heads=8),
        ),
    ),
    "mixtral_8x7b": Published(
        count=93_405_585_408 // 2,
        source="mistralai/Mixtral-8x7B-v0.1, total_size of its safetensors index, two bytes a weight",
        by_hand=llama(32, 4_096, 8 * 128, 14_336, 32_000, experts=8),
        # None is published: the recipe assumes a trillion.
        tokens=1.05e12,
        peer=(
            "MixtralConfig",
            dict(num_hidden_layers=32, hidden_size=4_096, intermediate_size=14_336, vocab_size=32_000)
            | dict(num_attention_heads=32, num_key_value_heads=8, num_local_experts=8),
        ),
    ),
}


# Fine-tuned from the weights of another recipe's model.
STARTED_FROM = {
    "instruct": "quickstart",
    "preference": "quickstart",
    "dolly_gptj_6b": "gptj_6b",
    "dolly_pythia_2_8b": "pythia_2_8b",
    "mpt_7b_instruct": "mpt_7b",
}
PUBLISHED |= {name: dataclasses.replace(PUBLISHED[base], peer=None) for name, base in STARTED_FROM.items()}


def recipe_of(name):
    return recipe_file.load(str(FOLDER / f"{name}.py")).recipe


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_published_ones_to_the_last(name):
    assert name in PUBLISHED, f"list the published parameters of recipes/{name}.py, with their source"
    published = PUBLISHED[name]
    count = recipe_of(name).model.build().spec().count()
    assert count == published.by_hand
    assert abs(count - published.count) <= published.rounded, published.source


@pytest.mark.parametrize("name", NAMES)
def test_the_step_is_traced_at_full_size(name):
    recipe = recipe_of(name)
    step = described(recipe, math.gcd(32, recipe.microbatch or recipe.batch))
    arguments = step.abstract_frozen(), step.abstract_batch(), step.abstract_signals()
    state, halted, metrics = jax.eval_shape(step, step.abstract_state(), *arguments)
    assert halted.shape == metrics["loss"].shape == metrics["grad_norm"].shape == ()
    # In float32: weights in the recipe's param dtype before and after.
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype(recipe.dtypes.param)}
    shapes = [param.shape(step.program.trainable.dims) for _, param in step.program.trainable.items()]
    assert [leaf.shape for leaf in jax.tree.leaves(state.trainable)] == shapes


@pytest.mark.parametrize(("name", "base"), STARTED_FROM.items())
def test_fine_tuning_takes_the_weights_of_its_base(name, base):
    shapes, theirs = (
        {leaf: param.shape(spec.dims) for leaf, param in spec.items()}
        for spec in (recipe_of(each).model.build().spec() for each in (name, base))
    )
    assert shapes == theirs
    assert recipe_of(name).init_from


# Published steps: an epoch of Alpaca's 52,002 rows without 1,000, 64 a step; two of Dolly's 15,011 without
# 200 and of dolly_hhrlhf's 59,310, 48 a step. Rates of the first step, in the middle and at the end.
PUBLISHED_STEPS = {
    "dolly_gptj_6b": (51_002 / 64, (1e-5, 1e-5, 1e-5)),
    "dolly_pythia_2_8b": (2 * 14_811 / 48, (1e-7, 5e-6, 5e-6)),
    "mpt_7b_instruct": (2 * 59_310 / 48, (1e-7, 5e-6 * 0.51, 0.0)),
}


@pytest.mark.parametrize("name", PUBLISHED_STEPS)
def test_fine_tuning_steps_and_rates_are_the_published_ones(name):
    recipe, (steps, rates) = recipe_of(name), PUBLISHED_STEPS[name]
    assert recipe.steps == pytest.approx(steps, abs=1)
    rate = recipe.optimizer.lr.build(recipe.steps)
    found = [float(rate(step)) for step in (0, recipe.steps // 2, recipe.steps - 1)]
    assert found == pytest.approx(rates, rel=0.01, abs=1e-8)
    source = (FOLDER / f"{name}.py").read_text()
    assert f"{recipe.steps:,} steps x {recipe.batch:,} rows x {recipe.seq:,} tokens" in source


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STARTED_FROM])
def test_tokens_are_the_published_ones(name):
    recipe = recipe_of(name)
    tokens = recipe.steps * recipe.batch * recipe.seq
    assert tokens == pytest.approx(PUBLISHED[name].tokens, rel=0.01)
    source = (FOLDER / f"{name}.py").read_text()
    assert f"{recipe.steps:,} steps" in source and f"{recipe.batch:,} rows" in source
    assert f"{recipe.seq:,} tokens" in source or name == "quickstart"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "quickstart"])
def test_the_text_states_the_count(name):
    text = " ".join((FOLDER / f"{name}.py").read_text().split())
    assert f"{PUBLISHED[name].by_hand:,} parameters" in text


@pytest.mark.parametrize("name", NAMES)
def test_json_gives_it_back(name):
    recipe = recipe_of(name)
    assert recipe_file.from_json(recipe_file.to_json(recipe)) == recipe


def gpt_neox_rate(step, peak, floor, total, warmup):
    """Rate of GPT-NeoX v1.0's `AnnealingLR` after so many steps, in its own steps counted from 1."""
    if step <= warmup:
        return peak * step / warmup
    done = min(step, total - warmup) - warmup
    return max(peak / 2 * (math.cos(math.pi * done / total) + 1), floor)


@pytest.mark.parametrize(("name", "peak"), [("pythia_160m", 6e-4), ("pythia_2_8b", 1.6e-4)])
def test_pythias_rate_is_gpt_neoxs(name, peak):
    recipe = recipe_of(name)
    rate = recipe.optimizer.lr.build(recipe.steps)
    for step in (0, 700, 1_429, 1_430, 1_431, 40_000, 90_000, 110_000, 120_000, 141_000, 142_999):
        # Ours after the warm-up counts from its end, as theirs from the step before it.
        theirs = gpt_neox_rate(step + (step < 1_430), peak, peak / 10, 143_000, 1_430)
        assert float(rate(step)) == pytest.approx(theirs, rel=1e-5), step
    transform = recipe.optimizer.decay_share(recipe.optimizer.weight_decay)
    assert transform == pytest.approx(0.1)


def test_gptjs_rate_is_its_authors():
    recipe = recipe_of("gptj_6b")
    rate = recipe.optimizer.lr.build(recipe.steps)
    for step in (2_999, 3_000, 50_000, 153_000, 250_000, 303_000, 350_000, 383_499):
        fallen = np.clip(step - 3_000, 0, 300_000) / 300_000
        theirs = 1.2e-4 - (1.2e-4 - 1.2e-5) * (1 - math.cos(math.pi * fallen)) / 2
        assert float(rate(step)) == pytest.approx(theirs, rel=1e-5), step
    assert recipe.optimizer.decay_share(recipe.optimizer.weight_decay) == pytest.approx(0.1)


@pytest.mark.peer
@pytest.mark.parametrize("name", [name for name in NAMES if name in PUBLISHED and PUBLISHED[name].peer])
def test_transformers_counts_the_same(name):
    torch = pytest.importorskip("torch", reason="needs the peer library torch")
    transformers = pytest.importorskip("transformers", reason="needs the peer library transformers")
    kind, arguments = PUBLISHED[name].peer
    with torch.device("meta"):
        config = getattr(transformers, kind)(**arguments)
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert recipe_of(name).model.build().spec().count() == model.num_parameters()


SMALL = {"layers": 2, "embed": 64, "heads": 2}
LONGEST = 2_048


def small(model) -> list[object]:
    """Options that make a recipe's model narrow and shallow, and change nothing else of it."""
    sizes = SMALL | {"mlp": model.mlp * SMALL["embed"] // model.embed}
    fields = {field.name for field in dataclasses.fields(model)}
    if "kv_heads" in fields and model.kv_heads:
        sizes["kv_heads"] = 1
    if "head_dim" in fields and model.head_dim:
        sizes["head_dim"] = SMALL["embed"] // SMALL["heads"]
    return [word for name, size in sizes.items() for word in (f"--model.{name.replace('_', '-')}", size)]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A token store of short documents, none held out."""
    folder = tmp_path_factory.mktemp("recipes")
    documents = folder / "documents.jsonl"
    tiny.write_documents(documents, count=600)
    tokenizer = train_tokenizer([documents], folder / "tokenizer", vocab=tiny.VOCAB, held_out=0.0)
    build([documents], folder / "store", tokenizer=tokenizer, held_out=0.0, workers=1, progress=False)
    return folder / "store"


# Their loss is not of tokens.
OF_PAIRS = {"preference"}
# Those that another of their family stands for here.
STOOD_FOR = {
    *("mpt_125m", "mpt_7b", "mpt_30b", "mpt_7b_instruct", "replit_code_3b", "instruct"),
    *("pythia_2_8b", "dolly_pythia_2_8b", "dolly_gptj_6b"),
}


def train(name, out, options):
    done = subprocess.run(
        jobs.command("recipe_worker.py", FOLDER / f"{name}.py", out, *options),
        env=jobs.environment(1) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_two_steps_on_pairs(store, tmp_path):
    """The recipe on preference pairs, from weights drawn from the seed: what it compares with is itself."""
    rows, rng = tmp_path / "rows.jsonl", random.Random(5)
    words = [" ".join(rng.sample(tiny.WORDS, 4)) for _ in range(120)]
    pairs = zip(words[::3], words[1::3], words[2::3], strict=True)
    text = [json.dumps(dict(zip(("prompt", "chosen", "rejected"), pair, strict=True))) for pair in pairs]
    rows.write_text("\n".join(text), encoding="utf-8")
    tokenizer = load_tokenizer(store.parent / "tokenizer")
    chat = Chat.of("plain", tokenizer)
    build([rows], tmp_path / "pairs", tokenizer=tokenizer, chat=chat, held_out=0.0, workers=1, progress=False)
    recipe = recipe_of("preference")
    options = ["--steps", 2, "--batch", 1, "--init-from", "", "--data.path", tmp_path / "pairs"]
    options += ["--eval.every", 0, "--log.tensorboard", "False", *small(recipe.model)]
    train("preference", tmp_path / "run", options)
    first, second = tiny.metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["reward_margin"] == first["reward_accuracy"] == 0
    assert second["reward_margin"] != 0 and math.isfinite(second["loss"])
    assert first["grad_norm"] > 0 and 0 < first["tokens"] <= recipe.seq


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.soak] * (name in STOOD_FOR))
        for name in NAMES
        if name not in OF_PAIRS
    ],
)
def test_two_steps_of_a_narrow_and_shallow_one(name, store, tmp_path):
    """Vocabulary, norms, positions, init, experts, optimizer, methods, dtypes and loss are the recipe's.

    What gives way to two CPU cores beside width and depth: a batch is one row, on one device; rows are at
    most 2,048 tokens; nothing is held out; and the run ends with its last checkpoint, without a sample.
    """
    recipe, out = recipe_of(name), tmp_path / name
    options = ["--steps", 2, "--batch", 1, "--microbatch", 0, "--seq", min(recipe.seq, LONGEST)]
    options += ["--init-from", ""] if name in STARTED_FROM else []
    options += ["--data.path", store, "--eval.every", 0, "--log.tensorboard", "False", *small(recipe.model)]
    train(name, out, options)
    loaded = recipe_file.from_run(str(out)).recipe
    changed = {change.name for change in recipe_file.changes(recipe, loaded)}
    allowed = {"steps", "batch", "microbatch", "data.path", "eval.every", "log.tensorboard"}
    allowed |= {f"model.{size}" for size in ("layers", "embed", "heads", "kv_heads", "head_dim", "mlp")}
    allowed |= {"init_from"} if name in STARTED_FROM else set()
    assert changed <= allowed | ({"seq"} if recipe.seq > LONGEST else set())
    rows = tiny.metrics(out)
    assert [row["step"] for row in rows] == [1, 2]
    if name in STARTED_FROM:
        # Whole documents, which may leave room in a row.
        assert 0.8 * loaded.seq < rows[0]["tokens"] <= loaded.seq
    else:
        assert [row["tokens"] for row in rows] == [loaded.seq, 2 * loaded.seq]
    uniform = math.log(recipe.model.vocab)
    assert uniform - 0.5 < rows[0]["loss"] < uniform + 2.0
    assert rows[1]["loss"] < rows[0]["loss"] + 0.5
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    rate = recipe.optimizer.lr.build(2)
    assert [row["lr"] for row in rows] == pytest.approx([float(rate(0)), float(rate(1))])
    assert tiny.complete(out) == [2]


@pytest.mark.parametrize(
    ("depth", "embed", "heads", "steps", "batch"),
    # Worked by hand from the formulas: twelve tokens a parameter of layers and head, a power of two a step.
    [
        (4, 256, 2, 912, 128),
        (12, 768, 6, 3_096, 256),
        (20, 1_280, 10, 5_460, 512),
        (26, 1_664, 13, 11_134, 512),
    ],
)
def test_all_follows_from_the_depth(depth, embed, heads, steps, batch):
    recipe = runpy.run_path(str(FOLDER / "dial.py"))["from_depth"](depth)
    model = recipe.model
    assert (model.layers, model.embed, model.heads, model.mlp) == (depth, embed, heads, 4 * embed)
    assert (recipe.steps, recipe.batch) == (steps, batch)
    scale = math.sqrt(batch / 256)
    assert recipe.optimizer.lr.peak == pytest.approx(0.02 * scale)
    assert recipe.optimizer.others.lr.peak == pytest.approx(0.008 * scale * math.sqrt(768 / embed))
    # Batch / (rate x decay x tokens) is the same at every depth: 2^19 / (0.02 x 0.28 x 1,623,195,648) at 12.
    tokens = 12 * (12 * depth * embed**2 + 65_536 * embed)
    constant = batch * 2_048 / (recipe.optimizer.weight_decay * tokens)
    assert constant == pytest.approx(2**19 / (0.02 * 0.28 * 1_623_195_648))
    if depth == 20:
        assert round(model.build().spec().count() / 1e6) == 561
