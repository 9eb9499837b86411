"""Special tokens added to a tokenizer: ids beside the tokenizers library's, and conversations with them."""

import json

import pytest

from mosaicjax.data.build import build
from mosaicjax.data.chat import Chat
from mosaicjax.data.special_tokens import add_special_tokens
from mosaicjax.data.store import Store
from mosaicjax.data.tokenizer import load_tokenizer
from mosaicjax.errors import InputError
from tests import tiny

CHATML = ("<|im_start|>", "<|im_end|>")
TEXTS = ("<|im_start|>user\nwalks<|im_end|>", "the quiet  market", "<|endoftext|>", "größe 🙂")


def assert_as_the_library(folder, made, size):
    """Text by the library, once with special tokens in it and once without."""
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert (theirs.get_vocab_size(), made.size) == (size, size)
    assert all(theirs.token_to_id(token) == made.special[token] for token in CHATML)
    start, end = (made.special[token] for token in CHATML)
    assert theirs.encode(TEXTS[0], add_special_tokens=False).ids == [start, *made.encode("user\nwalks"), end]
    theirs.encode_special_tokens = True
    for text in TEXTS:
        assert made.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert made.decode(made.encode(text)) == text
    assert made.pieces[start] == made.pieces[end] == b""


def test_all_other_ids_stay(tiny_store, tmp_path):
    source = tiny_store.parent / "tokenizer"
    before = load_tokenizer(source)
    made = add_special_tokens(source, tmp_path / "out", CHATML)
    assert [made.special[token] for token in CHATML] == [before.size, before.size + 1]
    assert made.pieces[: before.size] == before.pieces
    assert (made.separator, made.separator_token) == (before.separator, before.separator_token)
    assert_as_the_library(tmp_path / "out", made, before.size + 2)


@pytest.mark.parametrize("name", ["gpt2-tokenizer", "gpt-neox-20b-tokenizer"])
def test_tokenizers_of_others(shared_data, tmp_path, name):
    before = load_tokenizer(shared_data(name))
    made = add_special_tokens(shared_data(name), tmp_path, CHATML)
    assert made.size == before.size + 2
    assert made.encode("  größe\n\n12345") == before.encode("  größe\n\n12345")
    assert_as_the_library(tmp_path, made, before.size + 2)


def test_a_piece_of_the_vocabulary_keeps_its_id(tiny_store, tmp_path):
    source = tiny_store.parent / "tokenizer"
    settings = json.loads((source / "tokenizer.json").read_text())
    settings["model"]["vocab"]["<|im_start|>"] = len(settings["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    before = load_tokenizer(tmp_path)
    made = add_special_tokens(tmp_path, tmp_path / "out", CHATML)
    assert [made.special[token] for token in CHATML] == [before.size - 1, before.size]


def test_conversations_of_chatml_are_single_tokens(tiny_store, tmp_path, capsys):
    source = tiny_store.parent / "tokenizer"
    with pytest.raises(InputError, match="needs special tokens that the tokenizer lacks"):
        Chat.of("chatml", load_tokenizer(source))
    options = [word for token in CHATML for word in ("--special", token)]
    assert tiny.run("data", "add-tokens", source, "--out", tmp_path / "tokenizer", *options) == 0
    made = load_tokenizer(tmp_path / "tokenizer")
    start, end = (made.special[token] for token in CHATML)
    assert f"{made.size:,} ids; <|im_start|> {start}, <|im_end|> {end}" in capsys.readouterr().out
    rows = [{"prompt": f"the river {i} <|im_end|>", "response": f"walks {i}"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = dict(tokenizer=made, held_out=0.0, workers=1, progress=False)
    build([tmp_path / "rows.jsonl"], tmp_path / "store", chat=Chat.of("chatml", made), **common)
    split = Store.open(tmp_path / "store").split("train")
    ids = split.tokens(0, len(split)).tolist()
    # A start and an end for each of two turns of 20 rows; what a row's own text says stays text.
    assert (ids.count(start), ids.count(end)) == (40, 40)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((), "special tokens to add; expected names, each once; got none"),
        (("<a>", "<a>"), "special tokens to add; expected names, each once; got <a> <a>"),
        (("<|endoftext|>",), "has the special token <|endoftext|> already"),
    ],
)
def test_names_that_cannot_be(tiny_store, tmp_path, tokens, message):
    with pytest.raises(InputError) as refused:
        add_special_tokens(tiny_store.parent / "tokenizer", tmp_path, tokens)
    assert message in str(refused.value)


def test_sources_that_cannot_be(tiny_store, shared_data, tmp_path):
    source = tiny_store.parent / "tokenizer"
    with pytest.raises(InputError, match="holds the tokenizer that is added to"):
        add_special_tokens(source, source, CHATML)
    pytest.importorskip("sentencepiece")
    with pytest.raises(InputError, match="is a SentencePiece model, which takes no more tokens"):
        add_special_tokens(shared_data("mistral-v1-spm"), tmp_path, CHATML)
