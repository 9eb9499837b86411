"""The order of rows against whole lists, and what it promises at sizes that no list would hold."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.data.mixture import By, Domain, Mixture, TokenStore
from mosaicjax.data.order import MOST, Mix, Order, floor_sum, order_seed
from mosaicjax.data.rows import PLACE_TOKENS
from mosaicjax.errors import InputError
from tests.data.naive_order import naive_domains, naive_order

SEQS = st.sampled_from([1, 7, 128, 2_048, 3_000, 100_000])


@given(
    rows=st.integers(1, 1_500), seq=SEQS, seed=st.integers(0, 99), window=st.integers(1, 200), data=st.data()
)
def test_an_epoch_is_that_of_whole_lists(rows, seq, seed, window, data):
    order = Order(rows, PLACE_TOKENS // seq, order_seed(seed), window)
    epoch = data.draw(st.integers(0, 3))
    found = order.find(np.arange(epoch * rows, (epoch + 1) * rows))[1].tolist()
    assert found == naive_order(rows, seq, seed, epoch, window=window)
    assert sorted(found) == list(range(rows))


@given(seq=SEQS, seed=st.integers(0, 99), data=st.data())
def test_far_away_samples_of_30_million_rows_are_each_one_row_of_its_place(seq, seed, data):
    rows = 30_000_000
    order = Order(rows, PLACE_TOKENS // seq, order_seed(seed))
    first = data.draw(st.integers(0, 10**12))
    places, found = order.find(np.arange(first, first + 300))
    for place, row in zip(places.tolist(), found.tolist(), strict=True):
        assert order.first_row(place) <= row < order.first_row(place + 1)
    assert order.first_row(order.places) == rows
    # 300 neighbours in the order come from full windows of places each
    assert max(Counter(places.tolist()).values()) <= 6
    assert len(set(places.tolist())) >= 64


def test_epochs_seeds_and_domains_have_orders_of_their_own():
    orders = {
        tuple(Order(500, 512, order_seed(seed, domain)).find(np.arange(epoch * 500, (epoch + 1) * 500))[1])
        for seed in range(4)
        for domain in ("", "web", "code")
        for epoch in range(4)
    }
    assert len(orders) == 48


@given(weights=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99), data=st.data())
def test_domains_are_those_of_a_list(weights, seed, data):
    mix = Mix(weights, seed)
    expected = naive_domains(weights, seed, 500)
    first = data.draw(st.integers(0, 400))
    assert mix.domains(first, 100).tolist() == expected[first : first + 100]
    counted = Counter(expected[:first])
    assert mix.counts(first).tolist() == [counted[domain] for domain in range(len(weights))]


@given(
    shares=st.lists(st.floats(1e-3, 1.0).map(lambda share: round(share, 4)), min_size=2, max_size=50),
    seed=st.integers(0, 2**32),
    first=st.integers(0, 10**12),
)
def test_shares_hold_over_any_ten_thousand_samples(shares, seed, first):
    mixture = Mixture(tuple(Domain(str(i), "", share) for i, share in enumerate(shares)))
    mix = Mix(mixture.weights([1] * len(shares)), seed)
    got = np.bincount(mix.domains(first, 10_000), minlength=len(shares))
    assert (got == mix.counts(first + 10_000) - mix.counts(first)).all()
    asked = 10_000 * np.array(shares) / sum(shares)
    assert np.abs(got - asked).max() < 5
    # Every `total` samples have exactly their weight of each.
    assert (mix.counts(first + mix.total) - mix.counts(first) == mix.weights).all()


def test_shares_as_written_are_exact():
    def of(*amounts, by=By.SHARE, rows=(1_000, 10)):
        return Mixture(tuple(Domain(str(i), "", amount) for i, amount in enumerate(amounts)), by).weights(
            rows
        )

    assert of(0.1, 0.7) == (1, 7)
    assert of(60.0, 40.0) == (3, 2)
    assert of(1.5, 2.0, by=By.EPOCHS) == (1_500, 20)
    assert of(30.0, 70.0, by=By.ROWS) == (30, 70)
    # Finer than the shuffle counts: nearly.
    weights = of(0.123456789012, 0.3333333333333333)
    assert sum(weights) == MOST
    assert abs(weights[0] / MOST - 0.123456789012 / 0.4567901223453333) < 1e-9
    with pytest.raises(InputError, match="the domain 1 would never come"):
        of(1.0, 0.01, by=By.EPOCHS)


def test_mixtures_that_cannot_be():
    web = Domain("web", "a", 1.0)
    for domains, text in (
        ((), "without domains"),
        ((web, Domain("web", "b", 1.0)), "a name of its own"),
        (
            (web, Domain("code", "b", 0.0)),
            "the amount of the domain code; expected a number of share above 0",
        ),
        ((web, Domain("code", "b", float("inf"))), "the amount of the domain code"),
    ):
        with pytest.raises(InputError, match=text):
            Mixture(domains).stores()
    assert Mixture((web,)).stores() == {"web": "a"}
    assert TokenStore("nowhere").stores() == {"": "nowhere"}
    with pytest.raises(InputError, match="too many rows"):
        Order(2**32, 1, 0)


@given(st.integers(0, 60), st.integers(1, 50), st.integers(0, 120), st.integers(0, 120))
def test_floor_sum(count, divisor, step, offset):
    assert floor_sum(count, divisor, step, offset) == sum(
        (step * i + offset) // divisor for i in range(count)
    )
