"""Packed rows against documents taken one by one."""

import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.data.build import build
from mosaicjax.data.disk_cache import DiskCache, Place
from mosaicjax.data.manifest import Layout
from mosaicjax.data.packing import REGION_TOKENS, Packing, best_fit, pieces_of
from mosaicjax.data.rows import Packed
from mosaicjax.data.store import Store
from mosaicjax.data.stream import Drawn, Stream


@given(lengths=st.lists(st.integers(1, 20), max_size=60), seq=st.integers(20, 30))
def test_best_fit_is_that_of_a_search_over_all_rows(lengths, seq):
    rows = best_fit(np.array(lengths, np.int64), seq)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    expected, room = [], []
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [row for row in range(len(room)) if room[row] >= lengths[piece]]
        if not fits:
            expected.append([])
            room.append(seq)
            fits = [len(room) - 1]
        best = min(fits, key=lambda row: (room[row], row))
        expected[best].append(piece)
        room[best] -= lengths[piece]
    assert rows == expected


@given(documents=st.lists(st.integers(0, 50), max_size=20), seq=st.integers(1, 30))
def test_pieces_are_the_documents_cut(documents, seq):
    spans, at = [], 1
    for length in documents:
        spans.append((at, at + length))
        at += length + 1
    expected = []
    for first, last in spans:
        inputs = list(range(first - 1, last))
        expected += [[inputs[i], len(inputs[i : i + seq])] for i in range(0, len(inputs), seq)]
    assert pieces_of(np.array(spans, np.int64).reshape(-1, 2), seq).tolist() == expected


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer, write_rows):
    """A store of documents of very different lengths."""
    rng = np.random.default_rng(4)
    words = "alpha beta gamma delta epsilon zeta eta theta".split()
    texts = [
        " ".join(rng.choice(words, size)) + f" {i}"
        for i, size in enumerate(rng.geometric(1 / 60, 900).tolist() + [3_000, 5_000])
    ]
    folder = tmp_path_factory.mktemp("packing")
    source = write_rows(folder / "rows.jsonl", texts)
    layout = Layout(shard_tokens=2**17)
    build(
        [source],
        folder / "store",
        tokenizer=tokenizer,
        held_out=0.05,
        workers=1,
        layout=layout,
        progress=False,
    )
    return Store.open(folder / "store")


@pytest.mark.slow
@settings(max_examples=15)
@given(
    seq=st.sampled_from([33, 128, 200]),
    region=st.sampled_from([3_000, REGION_TOKENS]),
    seed=st.integers(0, 9),
)
def test_an_epoch_of_packed_rows_is_every_document_once(made, seq, region, seed):
    split = made.split("train")
    separator = made.manifest.tokenizer.separator
    found = Packing.of(split, seq, region=region)
    assert len(found.documents) > 5 or region == REGION_TOKENS
    stream = Stream(
        [Drawn("", Packed(found), 1)], separator=separator, seq=seq, batch=16, seed=seed, isolate=True
    )
    pieces = Counter()
    filled = 0
    left = len(found)
    for step in range(-(-len(found) // 16)):
        batch = stream.rows(step, range(min(16, left)))
        left -= 16
        for i in range(len(batch["tokens"])):
            row = {name: array[i] for name, array in batch.items()}
            segments = row["segments"]
            assert (np.diff(segments[segments > 0]) >= 0).all()
            assert ((row["weights"] == 1.0) == (segments > 0)).all()
            assert (row["tokens"][segments == 0] == separator).all()
            filled += int((segments > 0).sum())
            for segment in range(1, segments.max() + 1):
                mine = segments == segment
                assert row["positions"][mine].tolist() == list(range(mine.sum()))
                pieces[*row["tokens"][mine].tolist(), int(row["targets"][mine][-1])] += 1
                assert (row["targets"][mine][:-1] == row["tokens"][mine][1:]).all()
    expected = Counter()
    for first, last in split.spans().tolist():
        whole = split.tokens(first - 1, last + 1).tolist()
        expected.update(tuple(whole[i : i + seq + 1]) for i in range(0, len(whole) - 1, seq))
    assert pieces == expected
    assert found.waste == pytest.approx(1 - filled / (len(found) * seq), abs=1e-12)


def test_any_rows_are_those_of_the_whole(made):
    found = Packing.of(made.split("train"), 128)
    whole = [row.tolist() for row in found.pieces(0, len(found))]
    for first, last in ((0, 1), (5, 40), (len(found) - 3, len(found))):
        assert [row.tolist() for row in found.pieces(first, last)] == whole[first:last]


@pytest.mark.parametrize(
    ("corpus", "file", "field"),
    [
        ("sotu", "sotu.jsonl.xz", "text"),
        ("dolly-hhrlhf-1k", "train.jsonl", "response"),
        ("classic-books", "books.jsonl.xz", "text"),
    ],
)
def test_little_is_left_empty_on_real_text(shared_data, tmp_path, corpus, file, field):
    """Addresses of some thousand tokens, answers of some dozen, whole books: under 3% of rows of 2,048."""
    source, tokenizer = shared_data(corpus) / file, shared_data("gpt2-tokenizer")
    build([source], tmp_path / "store", tokenizer=tokenizer, field=field, held_out=0.0, progress=False)
    found = Packing.of(Store.open(tmp_path / "store").split("train"), 2_048)
    assert 0.0 <= found.waste < 0.03


def test_what_was_kept_of_a_packing_is_the_packing(made, tmp_path):
    cache, split = DiskCache(Place(tmp_path, 10**6)), made.split("train")
    for seq in (64, 128):
        first, again = (Packing.kept(split, seq, cache, "some/store") for _ in range(2))
        fresh = Packing.of(split, seq)
        for found in (first, again):
            assert found.documents.tolist() == fresh.documents.tolist()
            assert found.rows.tolist() == fresh.rows.tolist() and found.waste == fresh.waste
    kept = [path for path in (tmp_path / "blocks" / "some" / "store").rglob("*") if path.is_file()]
    assert sorted(path.name for path in kept) == ["128", "64"]
    # A documents' table that cannot be read is not needed any more.
    shutil.copytree(made.path, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "train" / "documents")
    split = Store(tmp_path / "copy", made.manifest).split("train")
    assert (
        Packing.kept(split, 64, cache, "some/store").rows.tolist()
        == Packing.of(made.split("train"), 64).rows.tolist()
    )
