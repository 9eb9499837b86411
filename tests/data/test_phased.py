"""Phases of data: what comes after a change goes on where what came before it stood."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.data.mixture import TokenStore
from mosaicjax.data.phased import Phased, begin_of, taken_before
from mosaicjax.data.rows import Contiguous
from mosaicjax.data.stream import Drawn, Stream
from mosaicjax.models import mpt
from mosaicjax.recipe import Later, Recipe

SEQ = 4


@pytest.fixture(scope="module")
def domains(tmp_path_factory, write_split):
    """Two domains of 25 and 15 rows, so that epochs end within phases; tokens tell where they are from."""
    folder = tmp_path_factory.mktemp("domains")
    return {
        "a": Contiguous(write_split(folder / "a", np.arange(101)), SEQ),
        "b": Contiguous(write_split(folder / "b", 2_000 + np.arange(61)), SEQ),
    }


def stream_of(domains, weights, batch, skips=(), **more):
    drawn = [Drawn(name, domains[name], weight) for name, weight in weights.items() if weight]
    return Stream(drawn, separator=0, seq=SEQ, batch=batch, seed=5, skips=skips, **more)


PHASES = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(0, 3), st.integers(0, 3)).filter(
        lambda phase: phase[2] + phase[3] > 0
    ),
    min_size=1,
    max_size=4,
)


@given(phases=PHASES, skips=st.sets(st.integers(0, 40), max_size=6), data=st.data())
def test_domains_go_on_where_they_stood(domains, phases, skips, data):
    """Phases of (data steps, batch, shares): samples of a domain come in its own order throughout."""
    skips, streams, begin = tuple(sorted(skips)), [], 0
    for steps, batch, of_a, of_b in phases:
        weights = {"a": of_a, "b": of_b}
        taken = {name: taken_before(name, rows, begin, streams) for name, rows in domains.items()}
        streams.append(stream_of(domains, weights, batch, skips, first_step=begin, taken=taken))
        begin += steps
    phased = Phased(streams)
    # Naively: every data step in turn, each domain's next sample by a stream of that domain alone.
    alone = {name: stream_of(domains, {name: 1}, 1) for name in domains}
    expected, counts = [], Counter()
    for number, (steps, batch, of_a, of_b) in enumerate(phases):
        mixed = stream_of(domains, {"a": of_a, "b": of_b}, batch)
        for step in range(steps):
            names = [mixed.drawn[which].name for which in mixed.rows(step, range(batch))["domain"]]
            rows = []
            for name in names:
                rows.append(alone[name].rows(counts[name], [0])["tokens"][0].tolist())
                counts[name] += 1
            expected.append((number, rows))
    kept = [each for step, each in enumerate(expected) if step not in skips]
    for step in data.draw(st.permutations(range(len(kept)))):
        number, rows = kept[step]
        assert phased.phase(step) == number and phased.stream(step) is phased.streams[number]
        chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=3))
        assert phased.rows(step, chosen)["tokens"].tolist() == [rows[row] for row in chosen]
    without = phased.skipping(())
    assert [without.phase(step) for step in range(len(expected))] == [number for number, _ in expected]


def test_rows_of_another_length_go_on_at_the_same_share_of_the_epoch(domains):
    before = stream_of(domains, {"a": 1}, 8)
    longer = Contiguous(domains["a"].split, 2 * SEQ)
    assert (len(domains["a"]), len(longer)) == (25, 12)
    # 40 rows are an epoch and 15 of 25 rows: 12 rows, and of the next 12 the first 7.
    assert taken_before("a", longer, 5, [before]) == 12 + 7
    assert taken_before("a", domains["a"], 5, [before]) == 40
    assert taken_before("b", domains["b"], 5, [before]) == 0


@given(
    begins=st.sets(st.integers(1, 60), max_size=4),
    skips=st.sets(st.integers(0, 70), max_size=8),
    steps=st.integers(1, 50),
)
def test_steps_and_tokens_of_phases(begins, skips, steps):
    shapes = [(8 + number, 2 * (number + 1)) for number in range(len(begins) + 1)]
    recipe = Recipe(
        mpt.Config(layers=1, embed=8, heads=1, mlp=8, vocab=16),
        TokenStore("nowhere"),
        seq=shapes[0][0],
        batch=shapes[0][1],
        steps=steps,
        skips=tuple(sorted(skips)),
        phases=tuple(
            Later(step, seq=seq, batch=batch)
            for step, (seq, batch) in zip(sorted(begins), shapes[1:], strict=True)
        ),
    )
    counts, data_step, taken = Counter(), 0, 0
    while taken < steps:
        if data_step not in skips:
            counts[sum(begin <= data_step for begin in begins)] += 1
            taken += 1
        data_step += 1
    found = recipe.in_phases
    assert [steps for _, steps in found] == [counts[number] for number in range(len(shapes))]
    assert [(phase.seq, phase.batch) for phase, _ in found] == shapes
    assert recipe.tokens == sum(seq * batch * counts[n] for n, (seq, batch) in enumerate(shapes))
    for begin in begins:
        left_out = sum(skip < begin for skip in skips)
        assert begin_of(begin, sorted(skips)) == begin - left_out
