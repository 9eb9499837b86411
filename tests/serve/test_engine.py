"""The engine beside the Generator, which writes one list of prompts from beginning to end."""

from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaicjax.errors import InputError
from mosaicjax.generate import Generator, Sampling
from mosaicjax.mesh import Mesh
from mosaicjax.models import mpt
from mosaicjax.models.decode import Choice, sequence_keys
from mosaicjax.serve.engine import Engine, Sizes
from mosaicjax.serve.request import Wishes
from mosaicjax.serve.sampler import Penalties, bent, draw
from mosaicjax.spec import Dtypes
from tests.models.test_decode import drawn_weights
from tests.scripted import SEPARATOR, byte_tokenizer

DTYPES = Dtypes()
SMALL = Sizes(rows=4, chunk=8, page=4, pages=60, longest=48)
TOKENIZER = byte_tokenizer()


class Model:
    def __init__(self):
        config = mpt.Config(layers=2, embed=32, heads=4, kv_heads=2, mlp=48, vocab=260)
        self.layout = Mesh(fsdp=(1,)).build(jax.devices()[:1])
        self.decoder = config.build()
        self.weights = drawn_weights(self.decoder, self.layout)

    def engine(self, sizes=SMALL):
        return Engine(self.decoder, self.weights, self.layout, DTYPES, TOKENIZER, sizes)


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.fixture(scope="module")
def engine(model):
    """One for all tests that leave it idle, so that it is compiled once."""
    return model.engine()


class Heard:
    """All news of a request."""

    def __init__(self):
        self.pieces = []

    def __call__(self, piece):
        assert not self.pieces or self.pieces[-1].finish is None, "news after the end"
        self.pieces.append(piece)

    @property
    def tokens(self):
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def text(self):
        return "".join(piece.text for piece in self.pieces)

    @property
    def told(self):
        return [told for piece in self.pieces for told in piece.told]

    @property
    def finish(self):
        return self.pieces[-1].finish if self.pieces else None


def run(engine, asked, seed=0):
    """Requests that come at random turns, until all have ended; what each was told."""
    rng = np.random.default_rng(seed)
    heard, left = [Heard() for _ in asked], list(range(len(asked)))
    turns = 0
    while left or not engine.idle:
        while left and (engine.idle or rng.random() < 0.4):
            number = left.pop(0)
            prompt, wishes = asked[number]
            engine.submit(prompt, wishes, heard[number])
        engine.turn()
        turns += 1
        assert turns < 2_000
    assert engine.pages.held == 0 and engine.waiting == engine.running == 0
    return heard


def wishes(**knobs):
    of_sampling = {each.name for each in fields(Sampling)}
    sampling = {name: value for name, value in knobs.items() if name in of_sampling}
    others = {name: value for name, value in knobs.items() if name not in of_sampling}
    return Wishes(Sampling(**({"temperature": 0.0, "max_tokens": 9} | sampling)), **others)


def drawn_requests(count, seed, **knobs):
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(0, 256, rng.integers(1, 30)).tolist(),
            wishes(max_tokens=int(rng.integers(1, 16)), **knobs),
        )
        for _ in range(count)
    ]


def test_texts_are_the_generators(model, engine):
    prompts = [f"prompt {number} " * (1 + number % 3) for number in range(7)]
    sampling = Sampling(max_tokens=12, temperature=0.0)
    writer = Generator(model.decoder, model.weights, model.layout, DTYPES, TOKENIZER)
    expected = writer.generate(prompts, sampling, lambda number, text: None)
    ids = TOKENIZER.encode_batch(prompts)
    heard = run(engine, [([*TOKENIZER.before, *each], Wishes(sampling)) for each in ids])
    for one, done in zip(heard, expected, strict=True):
        assert (one.tokens, one.text, one.finish) == (list(done.tokens), done.text, done.finish)


def test_drawn_texts_are_the_generators_whatever_the_neighbours(model, engine):
    """The Generator numbers prompts, as `choice` does completions of one."""
    prompts = ["one and the same prompt"] * 3
    sampling = Sampling(max_tokens=14, temperature=0.9, top_k=40, top_p=0.95, seed=11)
    writer = Generator(model.decoder, model.weights, model.layout, DTYPES, TOKENIZER)
    expected = writer.generate(prompts, sampling, lambda number, text: None)
    ids = [*TOKENIZER.before, *TOKENIZER.encode_batch(prompts)[0]]
    others = [engine.submit(*each, Heard()) for each in drawn_requests(5, seed=4, temperature=1.0)]
    heard = [Heard() for _ in prompts]
    for number, one in enumerate(heard):
        engine.submit(ids, Wishes(sampling), one, choice=number)
    while not engine.idle:
        engine.turn()
    assert [one.tokens for one in heard] == [list(done.tokens) for done in expected]
    assert len({tuple(one.tokens) for one in heard}) == 3 and len(others) == 5


def test_alone_and_among_others_to_the_last_bit(model, engine):
    """Tokens and log-probabilities, greedy and drawn, with and without penalties."""
    asked = [
        *drawn_requests(12, seed=1, logprobs=3),
        *drawn_requests(8, seed=2, temperature=0.8, logprobs=2),
        *drawn_requests(6, seed=3, repetition=1.3, presence=0.5, frequency=0.2, bias={65: 4.0}, logprobs=1),
    ]
    alone = [run(engine, [each])[0] for each in asked]
    order = np.random.default_rng(9).permutation(len(asked))
    together = run(engine, [asked[number] for number in order], seed=5)
    for number, one in zip(order, together, strict=True):
        assert one.tokens == alone[number].tokens and one.finish == alone[number].finish
        assert one.told == alone[number].told


def test_programs_are_compiled_by_the_warm_up_alone(model):
    engine = model.engine(replace(SMALL, rows=2))
    engine.warm_up()
    before = engine.programs
    run(engine, drawn_requests(4, seed=6, presence=1.0, logprobs=0, temperature=0.5))
    assert engine.programs == before == 3


def test_too_few_pages_put_the_youngest_back_and_change_nothing(model, engine):
    asked = [(prompt, wishes(max_tokens=16, logprobs=0)) for prompt, _ in drawn_requests(8, seed=7)]
    expected = run(engine, asked, seed=1)
    tight = model.engine(replace(SMALL, pages=14))
    found = run(tight, asked, seed=1)
    assert tight.counts.put_back > 0
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens and one.text == other.text
        np.testing.assert_allclose(
            [told.logprob for told in one.told], [told.logprob for told in other.told], atol=1e-5
        )


def test_a_shared_prefix_is_read_once(model, engine):
    prompt = list(range(40, 70))
    first = run(engine, [(prompt, wishes())])[0]
    before = replace(engine.counts)
    second, third = run(engine, [(prompt, wishes()), ([*prompt[:20], 1, 2, 3], wishes())])
    assert second.tokens == first.tokens
    # Whole pages of 4 but for the last token: 28 of 30, and 20 of 23.
    assert engine.counts.shared_tokens - before.shared_tokens == 28 + 20
    fresh = run(model.engine(), [([*prompt[:20], 1, 2, 3], wishes())])[0]
    assert third.tokens == fresh.tokens


def test_a_newcomer_writes_within_two_turns_of_its_prompt_and_stalls_nobody(engine):
    old = Heard()
    engine.submit([1, 2, 3], wishes(max_tokens=40), old)
    engine.turn()
    new = Heard()
    engine.submit(list(range(24)), wishes(max_tokens=5), new)
    written = len(old.tokens)
    # Three chunks of eight tokens: a turn each, in which the other goes on.
    for turn in range(1, 4):
        engine.turn()
        assert len(old.tokens) == written + turn
    assert len(new.tokens) >= 1
    engine.turn()
    assert len(new.tokens) >= 2
    while not engine.idle:
        engine.turn()
    assert (len(old.tokens), len(new.tokens)) == (40, 5) or "separator" in (old.finish, new.finish)


def test_cancelled_requests_leave_at_once(engine):
    heard = [Heard() for _ in range(6)]
    requests = [engine.submit([number, 7, 9], wishes(max_tokens=30), heard[number]) for number in range(6)]
    engine.turn()
    for number in (0, 5):
        engine.cancel(requests[number])
    engine.turn()
    assert heard[0].finish == heard[5].finish == "cancelled"
    held = engine.pages.held
    while not engine.idle:
        engine.turn()
    assert held > 0 and engine.pages.held == 0
    assert {one.finish for one in heard[1:5]} <= {"length", "separator"}


def test_stop_strings_and_the_end_of_the_document(engine):
    prompt = [5, 9, 77]
    (plain,) = run(engine, [(prompt, wishes(max_tokens=12, past_end=True))])
    data = bytes(token for token in plain.tokens if token < 256).decode("utf-8", "replace")
    assert plain.finish == "length" and len(plain.tokens) == 12
    stop = data[3:5]
    (stopped,) = run(engine, [(prompt, wishes(max_tokens=12, past_end=True, stop=(stop,)))])
    assert stopped.text == data[: data.find(stop)] and stopped.finish == "stop"
    forced = wishes(max_tokens=12, bias={SEPARATOR: 100.0})
    (ended,) = run(engine, [(prompt, forced)])
    assert (ended.finish, ended.tokens, ended.text) == ("separator", [SEPARATOR], "")


def test_refusals(engine):
    for prompt, asked, what in [
        ([], wishes(), "a prompt's tokens; expected 1 to 39"),
        ([1] * 40, wishes(), "expected 1 to 39, 48 less max_tokens 9; got 40"),
        ([4_000], wishes(), "a prompt's tokens; expected ids below"),
        ([1], wishes(min_p=1.5), "min_p; expected 0 to 1; got 1.5"),
        ([1], wishes(repetition=0.0), "repetition_penalty; expected above 0; got 0.0"),
        ([1], wishes(presence=3.0), "presence_penalty; expected -2 to 2; got 3.0"),
        ([1], wishes(logprobs=21), "logprobs; expected 0 to 20; got 21"),
        ([1], wishes(bias={1: 101.0}), "logit_bias; expected -100 to 100"),
        ([1], wishes(temperature=-1.0), "temperature"),
    ]:
        with pytest.raises(InputError, match=what):
            engine.submit(prompt, asked, Heard())
    for sizes, what in [
        (replace(SMALL, chunk=6), "serve's chunk; expected a multiple of 4, a page; got 6"),
        (replace(SMALL, pages=11), "serve's pages; expected 12 or more"),
        (replace(SMALL, rows=0), "serve's rows; expected 1 or more; got 0"),
    ]:
        with pytest.raises(InputError, match=what):
            sizes.check()
    assert engine.idle


def test_penalties_and_logprobs_are_their_definitions():
    rng = np.random.default_rng(12)
    B, V, known = 5, 40, 37
    logits = rng.normal(0, 2, (B, V)).astype(np.float32)
    seen = rng.integers(0, 3, (B, V)).astype(np.int32)
    written = np.minimum(seen, rng.integers(0, 3, (B, V))).astype(np.int32)
    bias = rng.normal(0, 1, (B, V)).astype(np.float32)
    repetition, presence, frequency = (rng.uniform(low, 2, B).astype(np.float32) for low in (0.5, -2, -2))
    any_ = np.array([True, True, False, True, True])
    penalties = Penalties(*map(jnp.asarray, (seen, written, bias, repetition, presence, frequency, any_)))
    expected = logits.astype(np.float64)
    for b, v in np.ndindex(B, V):
        if not any_[b]:
            continue
        x = float(logits[b, v])
        if seen[b, v]:
            x = x / repetition[b] if x > 0 else x * repetition[b]
        x -= presence[b] * (written[b, v] > 0) + frequency[b] * written[b, v]
        expected[b, v] = x + bias[b, v]
    np.testing.assert_allclose(bent(jnp.asarray(logits), penalties), expected, rtol=1e-5, atol=1e-5)
    greedy = Choice(sequence_keys(0, range(B)), jnp.zeros(B), jnp.zeros(B, jnp.int32), jnp.ones(B))
    positions = jnp.arange(B, dtype=jnp.int32)
    drawn = draw(jnp.asarray(logits), positions, greedy, penalties, jnp.ones(B, bool), known)
    assert np.asarray(drawn.tokens_B).tolist() == expected[:, :known].argmax(1).tolist()
    exact = logits[:, :known].astype(np.float64)
    exact = exact - np.log(np.exp(exact).sum(1, keepdims=True))
    picked = exact[np.arange(B), np.asarray(drawn.tokens_B)]
    np.testing.assert_allclose(drawn.logprob_B, picked, atol=1e-5)
    order = np.argsort(-exact, axis=1)[:, :20]
    np.testing.assert_array_equal(drawn.likeliest_BN, order)
    np.testing.assert_allclose(drawn.logprobs_BN, np.take_along_axis(exact, order, 1), atol=1e-5)


def test_min_p_keeps_what_is_likely_enough():
    """Over many draws exactly the tokens come that are at least so likely, as a share of the likeliest."""
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.15, 0.1, 0.05]]))
    for share, kept in ((0.0, 5), (0.2, 4), (0.3, 3), (0.5, 2), (0.9, 1)):
        B = 400
        ones = jnp.ones(B)
        choice = Choice(sequence_keys(3, range(B)), ones, jnp.zeros(B, jnp.int32), ones, ones * share)
        penalties = Penalties.none(B, 5)
        many = jnp.broadcast_to(logits, (B, 5))
        drawn = draw(many, jnp.zeros(B, jnp.int32), choice, penalties, jnp.zeros(B, bool), 5)
        assert sorted(set(np.asarray(drawn.tokens_B).tolist())) == list(range(kept)), share


@pytest.mark.slow
def test_fewer_rows_computed_change_nothing_but_rounding(model, engine):
    """Programs of one, two and four rows take turns, as requests come and go."""
    asked = [(prompt, replace(each, logprobs=0)) for prompt, each in drawn_requests(14, seed=8)]
    asked += drawn_requests(6, seed=9, temperature=0.7, repetition=1.2, logprobs=0)
    narrow = model.engine(replace(SMALL, widths=(2, 1)))
    narrow.warm_up()
    programs = narrow.programs
    found, expected = run(narrow, asked, seed=3), run(engine, asked, seed=4)
    assert narrow.programs == programs == 5
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.text, one.finish) == (other.tokens, other.text, other.finish)
        told = ([each.logprob for each in heard.told] for heard in (one, other))
        np.testing.assert_allclose(*told, atol=1e-5)


def test_prompts_are_read_while_more_wait_for_them_than_for_a_token(engine):
    """Of four that come at once two are read in the first turn: then as many write as read."""
    heard = [Heard() for _ in range(4)]
    for number, one in enumerate(heard):
        engine.submit([number, 7, 9], wishes(max_tokens=30, past_end=True), one)
    written = []
    for _ in range(3):
        engine.turn()
        written.append([len(one.tokens) for one in heard])
    assert written == [[2, 2, 0, 0], [3, 3, 2, 0], [4, 4, 3, 2]]
    while not engine.idle:
        engine.turn()
