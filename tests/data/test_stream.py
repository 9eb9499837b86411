import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.data.arrays import CHUNK_TOKENS
from mosaicjax.data.order import Order, order_seed
from mosaicjax.data.rows import PLACE_TOKENS, Contiguous
from mosaicjax.data.stream import Drawn, HeldOut, Stream
from mosaicjax.errors import InputError
from tests.data.naive_order import naive_domains, naive_order

SEPARATOR = 7


@pytest.fixture(scope="module")
def make_split(tmp_path_factory, write_split):
    """`make_split(tokens)`: a split of these tokens; the same one for the same tokens."""
    made = {}

    def make(tokens, documents=1):
        key = tuple(tokens)
        if key not in made:
            made[key] = write_split(tmp_path_factory.mktemp("split"), tokens, documents=documents)
        return made[key]

    return make


@st.composite
def tokens_and_seq(draw):
    tokens = draw(st.lists(st.sampled_from([SEPARATOR, 1, 2, 3]), min_size=2, max_size=40))
    return tokens, draw(st.integers(1, len(tokens) - 1))


def naive_row(tokens, start, length, seq, isolate):
    """One row from the definition, token by token; `length` of its `seq` places have a target."""
    row = {"tokens": [], "targets": [], "weights": [], "segments": [], "positions": []}
    segment, position = 1, 0
    for place in range(seq):
        inside = place < length
        token = tokens[start + place] if place <= length else SEPARATOR
        if isolate and token == SEPARATOR and place > 0:
            segment, position = segment + 1, 0
        row["tokens"].append(token)
        row["targets"].append(tokens[start + place + 1] if inside else SEPARATOR)
        row["weights"].append(1.0 if inside else 0.0)
        row["segments"].append(segment if inside else 0)
        row["positions"].append(position if inside else 0)
        position += 1
    return row


def alone(split, **options):
    """A stream of one domain."""
    return Stream([Drawn("", Contiguous(split, options["seq"]), 1)], **options)


def as_lists(batch):
    return {name: array.tolist() for name, array in batch.items()}


def transposed(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


@given(
    text=tokens_and_seq(),
    batch=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    skips=st.sets(st.integers(0, 8)),
    isolate=st.booleans(),
    data=st.data(),
)
def test_rows_are_those_of_a_naive_stream(make_split, text, batch, seed, skips, isolate, data):
    tokens, seq = text
    stream = alone(
        make_split(tokens),
        separator=SEPARATOR,
        seq=seq,
        batch=batch,
        seed=seed,
        skips=tuple(sorted(skips)),
        isolate=isolate,
    )
    per_epoch = (len(tokens) - 1) // seq
    steps = 12
    epochs = steps * batch // per_epoch + 1
    order = [row for epoch in range(epochs) for row in naive_order(per_epoch, seq, seed, epoch)]
    batches = [order[step * batch : (step + 1) * batch] for step in range(steps) if step not in skips]
    # any step first, any rows of it, some of them twice
    for step in data.draw(st.permutations(range(len(batches)))):
        rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
        expected = [naive_row(tokens, batches[step][row] * seq, seq, seq, isolate) for row in rows]
        got = as_lists(stream.rows(step, rows))
        assert set(got) == {"domain", "tokens", "targets", "weights", *(("segments", "positions") * isolate)}
        assert got == {name: (transposed(expected) | {"domain": [0] * len(rows)})[name] for name in got}


@given(
    rows=st.integers(1, 300), batch=st.integers(1, 50), seed=st.integers(0, 2**32), epochs=st.integers(1, 3)
)
def test_every_epoch_has_each_row_once(make_split, rows, batch, seed, epochs):
    split = make_split(np.arange(301))
    stream = alone(split, separator=SEPARATOR, seq=300 // rows, batch=batch, seed=seed)
    per_epoch = stream.rows_per_epoch
    assert per_epoch == 300 // (300 // rows)
    steps = -(-epochs * per_epoch // batch)
    firsts = np.concatenate([stream.rows(step, range(batch))["tokens"][:, 0] for step in range(steps)])
    for epoch in range(epochs):
        of_epoch = firsts[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(of_epoch) == [row * stream.seq for row in range(per_epoch)]


def test_seeds_and_epochs_have_orders_of_their_own(make_split):
    def order(seed, epoch):
        stream = alone(make_split(np.arange(301)), separator=SEPARATOR, seq=1, batch=300, seed=seed)
        return tuple(stream.rows(epoch, range(300))["tokens"][:, 0])

    orders = {order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert tuple(range(300)) not in orders


@given(
    rows=st.integers(64, 40_000),
    seq=st.sampled_from([7, 100, 128, 3_000]),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_a_batch_comes_from_at_least_64_places(rows, seq, seed, data):
    """Wherever a batch of 256 rows begins, in an epoch or over the end of one; fewer rows are all apart."""
    order = Order(rows, PLACE_TOKENS // seq, order_seed(seed))
    for batch in (256, 64):
        first = data.draw(st.integers(0, 3 * rows))
        places, _ = order.find(np.arange(first, first + batch))
        # at the seam of two windows a place may come twice
        assert len(set(places.tolist())) >= min(64, order.places) - (batch == 64) * 32


def test_chunks_of_a_batch(make_split):
    """A hand count on a store of 300 chunks: 960 rows of 2,048 come from 64 chunks or more."""
    order = Order(300 * 32, 32, order_seed(5))
    assert (order.places, order.rows_per_place) == (300, 32)
    for first in range(0, 3 * order.rows, 960):
        _, rows = order.find(np.arange(first, first + 960))
        assert len(set((rows // 32).tolist())) >= 64


@pytest.mark.parametrize(
    ("batch", "hosts"),
    [
        (960, (1, 2, 4, 5, 6, 8, 10, 12, 15, 20, 24, 30, 40)),
        (77, (1, 7, 11)),
        (129, (1, 3, 43)),
    ],
)
def test_a_global_batch_is_the_same_over_any_number_of_hosts(make_split, batch, hosts):
    """Each host is a stream of its own that reads its own rows alone, of steps in the middle of an epoch."""
    split = make_split(np.arange(40_000) % 60_000)
    rows_of = Contiguous(split, 8)

    def stream():
        drawn = [Drawn("a", rows_of, 3), Drawn("b", Contiguous(make_split(np.arange(9_001)), 8), 1)]
        return Stream(drawn, separator=SEPARATOR, seq=8, batch=batch, seed=11)

    for step in (3, 41):
        whole = stream().rows(step, range(batch))
        for count in hosts:
            each = batch // count
            parts = [stream().rows(step, range(host * each, (host + 1) * each)) for host in range(count)]
            for name, expected in whole.items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), expected)


def test_isolation_by_hand(make_split):
    split = make_split([7, 11, 12, 7, 21, 7, 31, 32, 33, 7])
    (row,) = [
        {name: array[0].tolist() for name, array in stream.rows(0, [0]).items()}
        for stream in [alone(split, separator=7, seq=9, batch=1, seed=0, isolate=True)]
    ]
    assert row == {
        "tokens": [7, 11, 12, 7, 21, 7, 31, 32, 33],
        "targets": [11, 12, 7, 21, 7, 31, 32, 33, 7],
        "weights": [1.0] * 9,
        "segments": [1, 1, 1, 2, 2, 3, 3, 3, 3],
        "positions": [0, 1, 2, 0, 1, 0, 1, 2, 3],
        "domain": 0,
    }


@given(text=tokens_and_seq(), isolate=st.booleans(), data=st.data())
def test_held_out_has_every_target_once(make_split, text, isolate, data):
    tokens, seq = text
    held_out = HeldOut({"": make_split(tokens)}, separator=SEPARATOR, seq=seq, isolate=isolate)
    rows = range(len(held_out))
    batch = held_out.rows(rows)
    weighed = batch["weights"] == 1.0
    assert batch["targets"][weighed].tolist() == tokens[1:]
    assert batch["tokens"][weighed].tolist() == tokens[:-1]
    assert not isolate or ((batch["segments"] == 0) == ~weighed).all()
    assert batch["weights"].sum() == len(tokens) - 1
    lengths = [min(seq, len(tokens) - 1 - row * seq) for row in rows]
    some = data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=5))
    expected = [naive_row(tokens, row * seq, lengths[row], seq, isolate) for row in some]
    names = expected[0] if isolate else ("tokens", "targets", "weights")
    got = as_lists(held_out.rows(some))
    assert {name: got[name] for name in names} == {name: transposed(expected)[name] for name in names}
    assert set(got) == {*names, "domain"} and got["domain"] == [0] * len(some)


@given(texts=st.lists(st.integers(2, 40), min_size=2, max_size=4), seq=st.integers(1, 9), data=st.data())
def test_held_out_rows_of_several_splits_follow_one_another(make_split, texts, seq, data):
    splits = [make_split(range(length)) for length in texts]
    together = HeldOut(dict(enumerate(splits)), separator=SEPARATOR, seq=seq)
    each = [HeldOut({"": split}, separator=SEPARATOR, seq=seq) for split in splits]
    numbered = [(domain, row) for domain, rows in enumerate(each) for row in range(len(rows))]
    assert len(together) == len(numbered)
    some = data.draw(st.lists(st.sampled_from(range(len(together))), min_size=1, max_size=6))
    got = as_lists(together.rows(some))
    for i, chosen in enumerate(some):
        domain, row = numbered[chosen]
        (expected,) = [each[domain].rows([row])]
        assert got["domain"][i] == domain
        for name in ("tokens", "targets", "weights"):
            assert got[name][i] == expected[name][0].tolist()


@given(
    texts=st.lists(st.tuples(st.integers(20, 60), st.integers(1, 7)), min_size=2, max_size=5),
    seq=st.integers(1, 5),
    batch=st.integers(1, 9),
    seed=st.integers(0, 99),
    skips=st.sets(st.integers(0, 5)),
    data=st.data(),
)
def test_rows_of_several_domains(make_split, texts, seq, batch, seed, skips, data):
    """Against whole lists: which domain each sample is of, and each domain's own endless order."""
    splits = [make_split(np.arange(length) + 100 * i) for i, (length, _) in enumerate(texts)]
    weights = [weight for _, weight in texts]
    rows_of = [Contiguous(split, seq) for split in splits]
    drawn = [Drawn(f"d{i}", *each) for i, each in enumerate(zip(rows_of, weights, strict=True))]
    stream = Stream(
        drawn, separator=SEPARATOR, seq=seq, batch=batch, seed=seed, skips=tuple(sorted(skips)), isolate=True
    )
    steps = 12
    domains = naive_domains(weights, seed, steps * batch)
    rows = []
    counts = [0] * len(texts)
    for domain in domains:
        per_epoch = (texts[domain][0] - 1) // seq
        epoch, number = divmod(counts[domain], per_epoch)
        window = -(-64 * weights[domain] // sum(weights))
        rows.append(naive_order(per_epoch, seq, seed, epoch, f"d{domain}", window)[number])
        counts[domain] += 1
    left = [step for step in range(steps) if step not in skips]
    for step in data.draw(st.permutations(range(len(left)))):
        chosen = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
        samples = [left[step] * batch + row for row in chosen]
        expected = []
        for sample in samples:
            tokens = [100 * domains[sample] + i for i in range(texts[domains[sample]][0])]
            expected.append(naive_row(tokens, rows[sample] * seq, seq, seq, True))
        wanted = transposed(expected) | {"domain": [domains[sample] for sample in samples]}
        assert as_lists(stream.rows(step, chosen)) == wanted


def test_types_and_shapes(make_split):
    split = make_split(np.arange(301))
    for batch in (
        alone(split, separator=1, seq=8, batch=4, seed=0, isolate=True).rows(5, [2, 0, 3]),
        HeldOut({"": split}, separator=1, seq=8, isolate=True).rows([0, 37, 1]),
    ):
        kinds = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
        integers = dict.fromkeys(("tokens", "targets", "segments", "positions"), ("int32", (3, 8)))
        assert kinds == integers | {"weights": ("float32", (3, 8)), "domain": ("int32", (3,))}


def test_streams_that_cannot_be(make_split):
    split = make_split([7, 1, 2, 3])
    options = {"separator": 7, "batch": 2, "seed": 0}
    assert alone(split, seq=3, **options).rows_per_epoch == 1
    with pytest.raises(InputError, match="shorter than one row; expected at least 5 tokens; got 4"):
        alone(split, seq=4, **options)
    for skips in [(2, 1), (1, 1), (-1,)]:
        with pytest.raises(InputError, match="skipped steps are out of order"):
            alone(split, seq=3, skips=skips, **options)
    with pytest.raises(InputError, match="holds no documents"):
        HeldOut({"": make_split([7], documents=0)}, separator=7, seq=3)


def test_damage_is_named_by_the_stream(write_split, tmp_path):
    split = write_split(tmp_path, np.arange(CHUNK_TOKENS + 1) % 100)
    path = tmp_path / "tokens" / "c" / "0"
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"shard {path} is damaged"):
        alone(split, separator=1, seq=100, batch=3, seed=0).rows(0, [0, 1, 2])
