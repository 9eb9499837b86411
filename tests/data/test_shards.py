import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.data.arrays import create_array
from mosaicjax.data.manifest import Counts
from mosaicjax.data.shards import Shard, Table, write_shard
from mosaicjax.data.store import Split


def make_table(lengths):
    tokens = np.array(lengths, np.int64)
    start = np.array([1 + sum(lengths[:i]) + i for i in range(len(lengths))], np.int64)
    number = np.arange(len(lengths))
    return Table(part=number % 2, offset=number * 100, start=start, tokens=tokens, bytes=tokens, fim=tokens)


@given(lengths=st.lists(st.integers(0, 4), max_size=8), data=st.data())
def test_overlapping_documents(lengths, data):
    table = make_table(lengths)
    total = sum(lengths) + len(lengths) + 1
    assert table.counts == Counts(len(lengths), total, sum(lengths))
    first = data.draw(st.integers(0, total - 1))
    last = data.draw(st.integers(first + 1, total))
    expected = [
        number
        for number in range(len(lengths))
        # Its tokens, and the separator after them.
        if lengths[number]
        and set(range(table.start[number], table.start[number] + lengths[number] + 1))
        & set(range(first, last))
    ]
    assert (table.overlapping(first, last).offset // 100).tolist() == expected


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=8), size=st.integers(1, 12))
def test_shards_join_to_the_whole(lengths, size, tmp_path_factory):
    """Shards of any size, cut in any place of a document, hold what the definition says."""
    folder = tmp_path_factory.mktemp("shards")
    table = make_table(lengths)
    spills = [np.full(900, 99, np.uint16) for _ in range(2)]
    expected = [7]
    for number, length in enumerate(lengths):
        document = [100 * number + 10 + place for place in range(length)]
        spills[number % 2][number * 100 : number * 100 + length] = document
        expected += [*document, 7]
    paths = (folder / "0.tokens", folder / "1.tokens")
    for path, spill in zip(paths, spills, strict=True):
        spill.tofile(path)
    total = len(expected)
    create_array(folder / "tokens", dtype="uint16", shape=(total,), shard=size, chunk=size)
    for number in range(-(-total // size)):
        first, last = number * size, min((number + 1) * size, total)
        rows = table.overlapping(first, last)
        shard = Shard(
            folder / "tokens", number, first, last, 7, "uint16", rows, paths, folder / "record.json"
        )
        write_shard(shard)
    split = Split(folder, table.counts, size)
    assert split.tokens(0, total).tolist() == expected
