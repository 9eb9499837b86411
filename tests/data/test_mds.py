import itertools
import json

import numpy as np
import pytest

from mosaicjax.data.build import build
from mosaicjax.data.documents import open_sources
from mosaicjax.data.mds import Mds
from mosaicjax.errors import InputError
from tests.data import mds_writer

COLUMNS = {
    "text": "str",
    "meta": "json",
    "raw": "bytes",
    "count": "int",
    "score": "float32",
    "big": "str_int",
    "any": "ndarray",
    "ids": "ndarray:uint16",
    "fixed": "ndarray:int32:2,3",
}


def samples(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "text": "é" * int(rng.integers(0, 9)) + str(n),
            "meta": {"n": n, "tags": ["a", None]},
            "raw": rng.bytes(int(rng.integers(0, 20))),
            "count": int(rng.integers(-(2**62), 2**62)),
            "score": float(np.float32(rng.normal())),
            "big": 10**30 + n,
            "any": rng.normal(size=(2, int(rng.integers(1, 5)))),
            "ids": rng.integers(0, 2**16, int(rng.integers(1, 300))).astype(np.uint16),
            "fixed": rng.integers(-9, 9, (2, 3)).astype(np.int32),
        }
        for n in range(count)
    ]


def same(one, other):
    if isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    return one == other


@pytest.mark.parametrize("compression", [None, "gz", "bz2"])
@pytest.mark.parametrize("per_shard", [3, 100])
def test_every_sample_of_every_encoding(tmp_path, compression, per_shard):
    expected = samples(10)
    mds_writer.write(tmp_path, COLUMNS, expected, per_shard, compression, hashes=("sha1", "blake2b"))
    found = Mds(str(tmp_path))
    assert len(found) == 10
    got = list(found.samples())
    assert len(got) == 10
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(same(one[name], other[name]) for name in other), other["count"]
    # Some columns alone.
    assert [each for each in found.samples(("big", "text"))] == [
        {"big": each["big"], "text": each["text"]} for each in expected
    ]


def test_a_folder_of_shards_is_a_source_of_documents(tmp_path):
    expected = samples(7)
    mds_writer.write(tmp_path, COLUMNS, expected, 4)
    documents = open_sources([tmp_path])
    assert [each.text for each in documents] == [each["text"] for each in expected if each["text"]]
    with pytest.raises(InputError, match=r"lacks the column 'body'; expected \['any', 'big', .*--field"):
        list(open_sources([tmp_path], field="body"))
    with pytest.raises(InputError, match="column 'count'; expected a string; got int"):
        list(open_sources([tmp_path], field="count"))


def test_an_index_of_something_else_is_no_index_of_shards(tmp_path):
    (tmp_path / "index.json").write_text('{"shards": 3}')
    (tmp_path / "a.txt").write_text("text")
    documents = open_sources([tmp_path], include=["*.txt"])
    assert [each.text for each in documents] == ["text"]


def test_damage_is_told_by_name(tmp_path):
    mds_writer.write(tmp_path, {"text": "str"}, [{"text": f"text {n}"} for n in range(20)], 8, "gz")
    index = json.loads((tmp_path / "index.json").read_text())

    def refused(line):
        with pytest.raises(InputError, match=line):
            list(Mds(str(tmp_path)).samples())

    shard = tmp_path / "shard.00001.mds.gz"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refused(r"shard\.00001\.mds\.gz is damaged; expected \d+ bytes; got \d+")
    shard.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    refused(r"shard\.00001\.mds\.gz is damaged; expected sha1 ")
    shard.unlink()
    refused(r"cannot read .*shard\.00001")
    shard.write_bytes(whole)
    index["shards"][1]["samples"] = 7
    (tmp_path / "index.json").write_text(json.dumps(index))
    refused(r"shard\.00001\.mds\.gz is damaged; expected 7 samples in \d+ bytes; got 8 samples")
    text = json.dumps(index)
    (tmp_path / "index.json").write_text(text[: len(text) // 2])
    refused(r"index\.json is damaged; expected an index of MDS shards; got JSONDecodeError")
    with pytest.raises(InputError, match=r"index\.json is damaged"):
        list(open_sources([tmp_path]))


@pytest.mark.parametrize(
    "encoding, line",
    [
        ("pkl", "index.json, column 'x' is pickled, and reading a pickle runs whatever code it holds"),
        ("jpeg:80", "column 'x' holds images; expected text or tokens; got jpeg:80"),
        ("tensor", "column 'x' has an unknown encoding"),
        ("ndarray:complex64", "column 'x' has an unknown encoding"),
    ],
)
def test_refused_encodings(tmp_path, encoding, line):
    mds_writer.write(tmp_path, {"x": "bytes"}, [{"x": b"1"}], 8)
    path = tmp_path / "index.json"
    path.write_text(path.read_text().replace('"bytes"]', f'"{encoding}"]'))
    with pytest.raises(InputError, match=line):
        Mds(str(tmp_path))


@pytest.mark.parametrize(
    "column, encoding", [("ids", "ndarray"), ("ids:int64", "bytes"), ("ids", "ndarray:int32")]
)
@pytest.mark.parametrize("together", [1, 7])
def test_tokens_are_stored_as_they_are(
    tmp_path, tokenizer, write_rows, data_digests, column, encoding, together
):
    """Those of texts, alone or several in a sample with separators between, give the store of the texts."""
    texts = [f"text {number} of {number % 7 * 'some '}words, größe" for number in range(40)]
    options = {"tokenizer": tokenizer, "held_out": 0.2, "workers": 1, "progress": False}
    build([write_rows(tmp_path / "rows.jsonl", texts)], tmp_path / "texts", **options)
    ids = [tokenizer.encode(text) for text in texts]
    samples = []
    for first in range(0, len(ids), together):
        joined = [tokenizer.separator]
        for each in ids[first : first + together]:
            joined += [*each, tokenizer.separator]
        value = np.array(joined, np.int64 if encoding == "bytes" else np.int32)
        samples.append({"ids": value.tobytes() if encoding == "bytes" else value})
    mds_writer.write(tmp_path / "mds", {"ids": encoding}, samples, 3)
    build([tmp_path / "mds"], tmp_path / "tokens", field=column, **options)
    assert data_digests(tmp_path / "tokens") == data_digests(tmp_path / "texts")


def test_tokens_that_cannot_be_are_refused(tmp_path, tokenizer):
    numbers = itertools.count()

    def refused(value, encoding, field="ids"):
        folder = tmp_path / "in" / str(next(numbers))
        mds_writer.write(folder, {"ids": encoding}, [{"ids": value}], 3)
        with pytest.raises(InputError) as said:
            options = {"workers": 1, "progress": False}
            build([folder], tmp_path / "out" / folder.name, tokenizer=tokenizer, field=field, **options)
        return str(said.value)

    big = np.array([3, 512, 4], np.int32)
    assert "tokens of another tokenizer; expected ids below 512" in refused(big, "ndarray")
    padded = np.array([5, 100, 7, -1], np.int32)
    assert "got -1" in refused(padded, "ndarray")
    assert "got -2" in refused(np.array([1, -2], np.int32), "ndarray")
    assert "holds no tokens; expected integers, [tokens]; got float64 [2]" in refused(np.ones(2), "ndarray")
    assert "holds bytes; expected text or tokens; fix: --field NAME:DTYPE" in refused(b"123", "bytes")
    assert "holds no tokens of int64" in refused(b"123", "bytes", "ids:int64")
