from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.generate import Generator, Sampling
from mosaicjax.harness.until import Until, write_until
from mosaicjax.mesh import Mesh
from mosaicjax.spec import Dtypes
from tests.scripted import REACH, SEPARATOR, byte_tokenizer, scripted

SCRIPT = " Grüße, 世界! 🙂 The END is near. ENDE".encode()
GREEDY = Sampling(max_tokens=60, temperature=0.0)


def naive(tokens, stop, leading_space):
    """Token by token: how many are taken, and the text that lm-eval leaves of them."""
    taken = []
    for token in tokens:
        taken.append(token)
        data = bytes(t for t in taken if t != SEPARATOR)
        text = data[1:] if leading_space and data.startswith(b" ") else data
        if token == SEPARATOR or any(term.encode() in text for term in stop):
            break
    left = text.decode(errors="replace")
    for term in stop:
        left = left.split(term)[0]
    return len(taken), left


TEXTS = st.text(" abé", max_size=20)


@given(TEXTS, st.lists(st.text(" abé", min_size=1, max_size=4), max_size=3), st.booleans(), st.booleans())
def test_text_ends_where_a_naive_reader_ends_it(text, stop, ended, leading_space):
    tokens = [*text.encode(), *([SEPARATOR] if ended else [])]
    if not tokens:
        return
    until = Until(byte_tokenizer(leading_space), stop)
    for token in tokens:
        if until.finish is None:
            until.add(token)
    count, left = naive(tokens, stop, leading_space)
    assert (len(until.tokens), until.text) == (count, left)


@pytest.fixture(scope="module")
def generator():
    layout = Mesh(fsdp=(1,)).build(jax.devices()[:1])
    decoder, weights = scripted(SCRIPT, layout)
    return Generator(decoder, weights, layout, Dtypes(), byte_tokenizer())


@pytest.mark.parametrize("rows", [2, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("stop", "end"),
    [([], len(SCRIPT)), (["END"], SCRIPT.index(b"END")), (["ENDE", " is"], SCRIPT.index(b" is"))],
)
def test_each_prompt_goes_on_from_its_own_end(generator, rows, stop, end):
    # The model writes its script by position alone: a prompt of n tokens is followed by its byte n - 1.
    lengths = [3, 1, 18, 7, 2]
    prompts = [[65] * length for length in lengths]
    heard = []
    written = write_until(generator, prompts, stop, GREEDY, length=REACH, rows=rows, done=heard.append)
    expected = [SCRIPT[length - 1 : end].decode(errors="replace") for length in lengths]
    assert [until.text for until in written] == expected
    assert {until.finish for until in written} == {"stop" if stop else "separator"}
    assert sum(heard) == 5


def test_a_long_prompt_loses_tokens_at_its_left(generator):
    (cut,) = write_until(generator, [[65] * 70], [], replace(GREEDY, max_tokens=75), length=REACH, rows=2)
    # 5 tokens are left of it.
    assert cut.text == SCRIPT[4:].decode(errors="replace")
    (ended,) = write_until(generator, [[65]], ["zz"], replace(GREEDY, max_tokens=4), length=REACH, rows=2)
    assert (ended.text, ended.finish) == (SCRIPT[:4].decode(errors="replace"), "length")


@pytest.mark.slow
def test_drawn_text_does_not_depend_on_the_batch(generator):
    flat = jax.tree.map(lambda leaf: np.zeros_like(leaf), generator.weights)
    drawing = Generator(generator.decoder, flat, generator.layout, Dtypes(), generator.tokenizer)
    drawn = Sampling(max_tokens=12, temperature=1.0, seed=9)
    prompts = [[65] * length for length in (2, 9, 2, 5)]
    first = write_until(drawing, prompts, [], drawn, length=REACH, rows=4)
    second = write_until(drawing, prompts, [], drawn, length=REACH, rows=1)
    assert [until.tokens for until in first] == [until.tokens for until in second]
    assert first[0].tokens != first[2].tokens


def test_settings_that_leave_no_room_are_refused(generator):
    refusal = f"max_gen_toks leaves no room for a prompt; expected fewer than the {REACH} tokens"
    with pytest.raises(InputError, match=refusal):
        write_until(generator, [[65]], [], replace(GREEDY, max_tokens=REACH), length=REACH, rows=1)
    with pytest.raises(InputError, match="--batch"):
        write_until(generator, [[65]], [], GREEDY, length=REACH, rows=0)
