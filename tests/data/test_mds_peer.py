"""Shards that mosaicml-streaming itself wrote, read by us sample by sample.

It pins an older numpy, so it runs by a Python of its own, named in MOSAICJAX_STREAMING_PYTHON.
"""

import os
import pickle
import subprocess

import numpy as np
import pytest

from mosaicjax.data.documents import open_sources
from mosaicjax.data.mds import Mds
from mosaicjax.errors import InputError

PYTHON = os.environ.get("MOSAICJAX_STREAMING_PYTHON", "")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        not PYTHON, reason="MOSAICJAX_STREAMING_PYTHON names no Python with mosaicml-streaming"
    ),
]

COLUMNS = {
    "text": "str",
    "meta": "json",
    "raw": "bytes",
    "count": "int",
    "byte": "uint8",
    "half": "float16",
    "score": "float64",
    "big": "str_int",
    "decimal": "str_decimal",
    "any": "ndarray",
    "ids": "ndarray:uint16",
    "fixed": "ndarray:int32:2,3",
}

WRITE = """
import pickle, sys
import torch
for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
from streaming import MDSWriter
path, out, compression, hashes, limit = sys.argv[1:]
columns, samples = pickle.load(open(path, "rb"))
options = {"compression": compression or None, "hashes": hashes.split(",") if hashes else None}
with MDSWriter(out=out, columns=columns, size_limit=int(limit), **options) as writer:
    for sample in samples:
        writer.write(sample)
"""


def written(folder, columns, samples, compression="", hashes="", limit=4_000):
    """A folder of shards by the package."""
    path = folder / "samples.pkl"
    path.write_bytes(pickle.dumps((columns, samples)))
    out = folder / "shards"
    command = [PYTHON, "-c", WRITE, path, out, compression, hashes, limit]
    # Its imports must not find ours.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(word) for word in command], check=True, env=environment, cwd=folder)
    return out


def samples(count):
    from decimal import Decimal

    rng = np.random.default_rng(count)
    return [
        {
            "text": "größe 日本 " * int(rng.integers(0, 9)) + str(n),
            "meta": {"n": n, "tags": ["a", None, 1.5]},
            "raw": rng.bytes(int(rng.integers(0, 60))),
            "count": int(rng.integers(-(2**62), 2**62)),
            "byte": np.uint8(rng.integers(0, 256)),
            "half": np.float16(rng.normal()),
            "score": np.float64(rng.normal()),
            "big": 10**30 + n,
            "decimal": Decimal("1.10") + n,
            "any": rng.normal(size=(2, int(rng.integers(1, 5)))).astype(np.float32),
            "ids": rng.integers(0, 2**16, int(rng.integers(1, 300))).astype(np.uint16),
            "fixed": rng.integers(-9, 9, (2, 3)).astype(np.int32),
        }
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("compression", "hashes"),
    [
        ("", ""),
        ("zstd", "sha1"),
        ("zstd:7", "sha256,xxh64"),
        ("gz", "md5"),
        ("bz2", ""),
        ("br:3", ""),
        ("snappy", ""),
    ],
)
def test_every_sample_that_the_package_wrote(tmp_path, compression, hashes):
    expected = samples(60)
    out = written(tmp_path, COLUMNS, expected, compression, hashes)
    assert len(list(out.glob("shard.*"))) > 3
    got = list(Mds(str(out)).samples())
    assert len(got) == 60
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, np.ndarray):
                assert one[name].dtype == value.dtype and one[name].shape == value.shape
                assert (one[name] == value).all()
            else:
                assert one[name] == value, name
    assert [each.text for each in open_sources([out])] == [each["text"] for each in expected]


def test_a_pickled_column_is_refused(tmp_path):
    out = written(tmp_path, {"text": "str", "what": "pkl"}, [{"text": "a", "what": {1, 2}}])
    with pytest.raises(InputError, match="column 'what' is pickled"):
        list(Mds(str(out)).samples())
