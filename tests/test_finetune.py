"""Fine-tuning on instructions that people wrote makes held-out responses likelier, with adapters too."""

import pytest

from mosaicjax.data.build import build
from mosaicjax.data.chat import Chat
from mosaicjax.data.tokenizer import load_tokenizer, train_tokenizer
from tests import tiny

RECIPE = """
from mosaicjax.data.mixture import Rows, TokenStore
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.methods.lora import LoRA
from mosaicjax.models import mpt
from mosaicjax.optim import AdamW, Cosine
from mosaicjax.recipe import Eval, Recipe, Save
from mosaicjax.spec import Dtypes

recipe = Recipe(
    model=mpt.Config(layers=2, embed=64, heads=2, mlp=256, vocab=640),
    data=TokenStore({store!r}, isolate={isolate}, rows={rows}),
    seq=128, batch=8, steps={steps}, seed=3, init_from={base!r},
    optimizer=AdamW(lr=Cosine(peak={rate}, warmup=5, final=0.1)),
    methods={methods},
    dtypes=Dtypes(), eval=Eval(every=0), save=Save(every=0),
)
"""
PRETRAINED = dict(isolate=False, rows="Rows.CONCATENATED", base="", methods="()")
TUNED = dict(isolate=True, rows="Rows.BEST_FIT")
METHODS = {"full": ("()", 2e-3), "lora": ("(LoRA(rank=8, alpha=16.0),)", 2e-2)}


@pytest.mark.slow
def test_held_out_responses_get_likelier(shared_data, tmp_path):
    books = shared_data("tinyshakespeare")
    rows = shared_data("dolly-hhrlhf-1k") / "train.jsonl"
    train_tokenizer([books], tmp_path / "tokenizer", vocab=600, held_out=0.05, include=("*.txt",))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    common = dict(tokenizer=tokenizer, workers=1, progress=False)
    build([books], tmp_path / "books", held_out=0.05, include=("*.txt",), **common)
    chat = Chat.of("plain", tokenizer)
    build([rows], tmp_path / "rows", held_out=0.1, chat=chat, **common)

    def train(name, **given):
        (tmp_path / f"{name}.py").write_text(RECIPE.format(**given))
        tiny.train(tmp_path / f"{name}.py", tmp_path / name)
        return [row["loss"] for row in tiny.metrics(tmp_path / name, "eval")]

    train("base", store=str(tmp_path / "books"), steps=40, rate=5e-3, **PRETRAINED)
    base = str(tmp_path / "base")
    found = {
        name: train(
            name, store=str(tmp_path / "rows"), steps=30, rate=rate, methods=methods, base=base, **TUNED
        )
        for name, (methods, rate) in METHODS.items()
    }
    for before, after in found.values():
        assert after < before - 0.15
    assert found["lora"][0] == pytest.approx(found["full"][0], rel=1e-5)
