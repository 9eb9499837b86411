import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.data.tokenizer import Tokenizer, load_tokenizer
from mosaicjax.errors import InputError
from mosaicjax.harness.lm import generation
from mosaicjax.harness.text import Codec, first_token, windows


def pairs_tokenizer(before=()):
    """A token a byte, but one for each `ab` and each `  `, so that where a text is cut changes its ids."""

    def encode(text):
        ids, data = [], text.encode()
        while data:
            known = {b"ab": 256, b"  ": 257}.get(data[:2])
            ids.append(data[0] if known is None else known)
            data = data[1 if known is None else 2 :]
        return ids

    tokenizer = Tokenizer(
        encode=encode,
        encode_batch=lambda texts: [encode(text) for text in texts],
        encoder="pairs",
        pieces=[*(bytes([byte]) for byte in range(256)), b"ab", b"  ", b"", b""],
        separator=(259, "</s>"),
        leading_space=False,
        files=(),
        special={"<s>": 258, "</s>": 259},
    )
    tokenizer.before = before
    return tokenizer


B, A = 258, 256


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("xa", "by", ([B, *b"x"], None)),
        ("x", "aby", ([B, *b"x"], [A, *b"y"])),
        ("x ", "y", ([B, *b"x"], [*b" y"])),
        ("x \n ", " y", ([B, *b"x"], [*b" \n", 257, *b"y"])),
        ("", "y", ([B], [*b"y"])),
        ("", "<s>y", ([B], [*b"y"])),
        ("  ", "y", ([B], [257, *b"y"])),
        ("<s>x", "y", ([B, *b"x"], [*b"y"])),
        ("x</s>", "<s>", ([B, *b"x", 259], [B])),
    ],
)
def test_pairs_by_hand(context, continuation, expected):
    (pair,) = Codec(pairs_tokenizer(before=(B,))).pairs([(context, continuation)])
    if expected[1] is None:
        # The context alone is x, a: as lm-eval does, so many ids of the whole are left out.
        assert pair == ([B, *b"xa"], [*b"y"])
    else:
        assert pair == expected


def test_without_a_beginning_a_blank_context_is_the_separator():
    codec = Codec(pairs_tokenizer())
    assert codec.pairs([(" ", "y"), ("", "y")]) == [([259], [*b" y"]), ([259], [*b"y"])]
    with pytest.raises(InputError, match="nothing to score; .* got context 'x', continuation ''"):
        codec.pairs([("x", "")])


TEXTS = st.text("ab x<s>/", max_size=12)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6), st.sampled_from([(), (B,)]))
def test_encoding_many_is_encoding_each(requests, before):
    codec = Codec(pairs_tokenizer(before))
    for begin in (True, False):
        texts = [text for pair in requests for text in pair]
        assert codec.encode_all(texts, begin=begin) == [codec.encode(text, begin=begin) for text in texts]


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 20))
def test_windows_predict_each_token_once_with_all_the_context_there_is(ids, length):
    seen = []
    for context, continuation in windows(ids, -1, length):
        end = len(seen) + len(continuation)
        # Together they are the inputs up to the last prediction and as many as the model reads.
        whole = [-1, *ids][: end + 1]
        assert [*context, *continuation] == whole[-(min(length, end) + 1) :]
        assert len(context) >= 1
        seen += continuation
    assert seen == ids


def test_the_first_token(tmp_path, shared_data):
    folder = shared_data("tinystories-260k") / "hf"
    tokenizer = load_tokenizer(folder)
    # Its files name <s>, though training would put the separator before a text.
    tokenizer.before = ()
    assert first_token(tokenizer) == tokenizer.special["<s>"]
    tokenizer.before = (7,)
    assert first_token(tokenizer) == 7
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = {"bos_token": {"content": "<nowhere>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    broken = load_tokenizer(tmp_path)
    broken.before = ()
    with pytest.raises(InputError, match="bos_token is no special token"):
        first_token(broken)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    without = load_tokenizer(tmp_path)
    without.before = ()
    assert first_token(without) == without.separator


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (256, 0.0, [])),
        ({"until": "\n", "max_gen_toks": 9}, (9, 0.0, ["\n"])),
        ({"until": ["a", "b"], "max_tokens": 8, "max_new_tokens": 7}, (7, 0.0, ["a", "b"])),
        ({"do_sample": False, "temperature": 0.7}, (256, 0.0, [])),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 4, "num_beams": 1}, (256, 0.7, [])),
    ],
)
def test_settings_of_generation(settings, expected):
    sampling, stop = generation(settings, seed=3)
    assert (sampling.max_tokens, sampling.temperature, stop) == expected
    assert sampling.seed == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs: num_beams; expected one of until, .*; got 4"),
        ({"do_sample": True}, "do_sample without a temperature"),
        ({"max_gen_toks": 0}, "max_tokens; expected 1 or more; got 0"),
        ({"top_p": 2.0, "temperature": 1.0}, "top_p"),
    ],
)
def test_settings_of_generation_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        generation(settings, seed=0)
