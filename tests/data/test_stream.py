import os
import threading
from collections import Counter

import numpy as np
import pytest
from grain.experimental import index_shuffle
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.data.arrays import CHUNK_TOKENS
from mosaicjax.data.stream import HeldOut, Prefetch, Stream, TokenStore, order_seed
from mosaicjax.errors import InputError

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


def naive_order(rows, seed, epoch):
    """Grain's permutation of one epoch."""
    shuffled = (order_seed(seed) + epoch) % 2**32
    return [index_shuffle(row, max_index=rows - 1, seed=shuffled, rounds=4) for row in range(rows)]


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
    stream = Stream(
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
    order = [row for epoch in range(epochs) for row in naive_order(per_epoch, seed, epoch)]
    batches = [order[step * batch : (step + 1) * batch] for step in range(steps) if step not in skips]
    # any step first, any rows of it, some of them twice
    for step in data.draw(st.permutations(range(len(batches)))):
        rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
        expected = [naive_row(tokens, batches[step][row] * seq, seq, seq, isolate) for row in rows]
        assert as_lists(stream.rows(step, rows)) == transposed(expected)


@given(
    rows=st.integers(1, 300), batch=st.integers(1, 50), seed=st.integers(0, 2**32), epochs=st.integers(1, 3)
)
def test_every_epoch_has_each_row_once(make_split, rows, batch, seed, epochs):
    split = make_split(np.arange(301))
    stream = Stream(split, separator=SEPARATOR, seq=300 // rows, batch=batch, seed=seed)
    per_epoch = stream.rows_per_epoch
    assert per_epoch == 300 // (300 // rows)
    steps = -(-epochs * per_epoch // batch)
    firsts = np.concatenate([stream.rows(step, range(batch))["tokens"][:, 0] for step in range(steps)])
    for epoch in range(epochs):
        of_epoch = firsts[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(of_epoch) == [row * stream.seq for row in range(per_epoch)]


def test_seeds_and_epochs_have_orders_of_their_own(make_split):
    def order(seed, epoch):
        stream = Stream(make_split(np.arange(301)), separator=SEPARATOR, seq=1, batch=300, seed=seed)
        return tuple(stream.rows(epoch, range(300))["tokens"][:, 0])

    orders = {order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert tuple(range(300)) not in orders


def test_a_batch_comes_from_many_places(make_split):
    """The rows of a batch lie as far apart as those of a fair draw: in the mean a third of the whole."""
    stream = Stream(make_split(np.arange(4_097)), separator=1, seq=1, batch=64, seed=3)
    gaps = [np.abs(np.diff(stream.rows(step, range(64))["tokens"][:, 0])).mean() for step in range(20)]
    assert abs(np.mean(gaps) / 4_096 - 1 / 3) < 0.03


def test_isolation_by_hand(make_split):
    split = make_split([7, 11, 12, 7, 21, 7, 31, 32, 33, 7])
    (row,) = [
        {name: array[0].tolist() for name, array in stream.rows(0, [0]).items()}
        for stream in [Stream(split, separator=7, seq=9, batch=1, seed=0, isolate=True)]
    ]
    assert row == {
        "tokens": [7, 11, 12, 7, 21, 7, 31, 32, 33],
        "targets": [11, 12, 7, 21, 7, 31, 32, 33, 7],
        "weights": [1.0] * 9,
        "segments": [1, 1, 1, 2, 2, 3, 3, 3, 3],
        "positions": [0, 1, 2, 0, 1, 0, 1, 2, 3],
    }


@given(text=tokens_and_seq(), isolate=st.booleans(), data=st.data())
def test_held_out_has_every_target_once(make_split, text, isolate, data):
    tokens, seq = text
    held_out = HeldOut(make_split(tokens), separator=SEPARATOR, seq=seq, isolate=isolate)
    rows = range(len(held_out))
    batch = held_out.rows(rows)
    weighed = batch["weights"] == 1.0
    assert batch["targets"][weighed].tolist() == tokens[1:]
    assert batch["tokens"][weighed].tolist() == tokens[:-1]
    assert ((batch["segments"] == 0) == ~weighed).all()
    assert batch["weights"].sum() == len(tokens) - 1
    lengths = [min(seq, len(tokens) - 1 - row * seq) for row in rows]
    some = data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=5))
    expected = [naive_row(tokens, row * seq, lengths[row], seq, isolate) for row in some]
    assert as_lists(held_out.rows(some)) == transposed(expected)


def test_types_and_shapes(make_split):
    split = make_split(np.arange(301))
    for batch in (
        Stream(split, separator=1, seq=8, batch=4, seed=0).rows(5, [2, 0, 3]),
        HeldOut(split, separator=1, seq=8).rows([0, 37, 1]),
    ):
        kinds = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
        integers = dict.fromkeys(("tokens", "targets", "segments", "positions"), ("int32", (3, 8)))
        assert kinds == integers | {"weights": ("float32", (3, 8))}
        assert all(array.flags.writeable and array.flags.c_contiguous for array in batch.values())


def test_streams_that_cannot_be(make_split):
    split = make_split([7, 1, 2, 3])
    options = {"separator": 7, "batch": 2, "seed": 0}
    assert Stream(split, seq=3, **options).rows_per_epoch == 1
    with pytest.raises(InputError, match="shorter than one row; expected at least 5 tokens; got 4"):
        Stream(split, seq=4, **options)
    for skips in [(2, 1), (1, 1), (-1,)]:
        with pytest.raises(InputError, match="skipped steps are out of order"):
            Stream(split, seq=3, skips=skips, **options)
    with pytest.raises(InputError, match="holds no documents"):
        HeldOut(make_split([7], documents=0), separator=7, seq=3)


def test_damage_is_named_by_the_stream(write_split, tmp_path):
    split = write_split(tmp_path, np.arange(CHUNK_TOKENS + 1) % 100)
    path = tmp_path / "tokens" / "c" / "0"
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"shard {path} is damaged"):
        Stream(split, separator=1, seq=100, batch=3, seed=0).rows(0, [0, 1, 2])


def test_token_store_is_a_name():
    assert TokenStore("nowhere") == TokenStore(path="nowhere", isolate=False)
    assert not os.path.exists("nowhere")


@settings(max_examples=20)
@given(start=st.integers(0, 1_000), count=st.integers(0, 30), ahead=st.integers(1, 5))
def test_prefetch_reads_each_step_once_and_in_order(start, count, ahead):
    read = []

    def square(step):
        read.append(step)
        return step**2

    with Prefetch(square, start, ahead=ahead) as prefetch:
        steps = range(start, start + count)
        assert [prefetch.get(step) for step in steps] == [step**2 for step in steps]
    assert read == list(range(start, start + len(read)))
    assert count <= len(read) <= count + ahead + 1


def test_prefetch_waits_for_room():
    allowed, reads = threading.Semaphore(0), Counter()

    def read(step):
        reads[step] += 1
        allowed.release()
        return step

    with Prefetch(read, 0, ahead=2) as prefetch:
        allowed.acquire()
        allowed.acquire()
        # a third read would release a third time
        assert not allowed.acquire(timeout=0.05)
        assert prefetch.get(0) == 0
        assert allowed.acquire(timeout=20)
    assert reads == {0: 1, 1: 1, 2: 1}


def test_prefetch_raises_at_the_step_it_belongs_to():
    read = []

    def fail(step):
        read.append(step)
        if step == 3:
            raise InputError("shard 3 is damaged")
        return step

    with Prefetch(fail, 1, ahead=5) as prefetch:
        assert [prefetch.get(1), prefetch.get(2)] == [1, 2]
        for _ in range(2):
            with pytest.raises(InputError, match="shard 3 is damaged"):
                prefetch.get(3)
    assert read == [1, 2, 3]


def test_prefetch_closes_while_full_and_while_reading():
    before = threading.active_count()
    full = Prefetch(lambda step: step, 0, ahead=1)
    assert full.get(0) == 0
    full.close()
    full.close()
    reading, go_on = threading.Event(), threading.Event()

    def slow(step):
        reading.set()
        assert go_on.wait(20)
        return step

    busy = Prefetch(slow, 0)
    assert reading.wait(20)
    closing = threading.Thread(target=busy.close)
    closing.start()
    go_on.set()
    closing.join(20)
    assert threading.active_count() == before
    with pytest.raises(AssertionError, match="expected step 1, got 5"):
        full.get(5)
