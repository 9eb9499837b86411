"""The same files on this machine and on an object store are the same documents."""

import gzip
import json
import lzma

import pytest

from mosaicjax import storage
from mosaicjax.data.documents import open_sources
from mosaicjax.errors import InputError
from tests import object_store
from tests.data import mds_writer

pyarrow = pytest.importorskip("pyarrow", reason="pip install 'mosaicjax[tables]'")
deltalake = pytest.importorskip("deltalake", reason="pip install 'mosaicjax[tables]'")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def both(tmp_path, monkeypatch):
    """A folder with a source of every kind, and a copy of it on an object store."""
    here = tmp_path / "corpus"
    lines = b"".join(json.dumps({"text": f"line {n} é"}).encode() + b"\n" for n in range(300))
    for name, data in {
        "code/a.py": b"a = 1\n",
        "code/tests/t.py": b"left out\n",
        "code/.git/c.txt": b"left out\n",
        "code/.git/d.txt": b"left out\n",
        "code/photo.png": b"\x89PNG",
        "code/latin.txt": b"caf\xe9",
        "code/z/b.md": "é\n".encode(),
        "rows/a.jsonl": lines,
        "rows/b.jsonl.gz": gzip.compress(lines),
        "rows/c.jsonl.xz": lzma.compress(lines),
        "rows/d.jsonl.zst": pyarrow.Codec("zstd").compress(lines, asbytes=True),
    }.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(data)
    table = pyarrow.table({"text": [f"cell {n}" for n in range(2_000)]})
    parquet.write_table(table, here / "rows" / "e.parquet", row_group_size=700)
    mds_writer.write(here / "mds", {"text": "str"}, [{"text": f"sample {n}"} for n in range(90)], 40, "gz")
    deltalake.write_deltalake(str(here / "delta"), table)
    deltalake.write_deltalake(str(here / "delta"), pyarrow.table({"text": ["more"]}), mode="append")
    there = object_store.new_bucket(monkeypatch) + "/corpus"
    for path in sorted(here.rglob("*")):
        if path.is_file():
            storage.write_bytes(storage.join(there, path.relative_to(here).as_posix()), path.read_bytes())
    return str(here), there


@pytest.mark.parametrize(
    "name, options",
    [
        ("code", {"exclude": ["tests"]}),
        ("rows", {"include": ["*"]}),
        ("rows/a.jsonl", {}),
        ("rows/d.jsonl.zst", {}),
        ("rows/e.parquet", {}),
        ("mds", {}),
        ("delta@v0", {}),
        ("delta", {}),
    ],
)
def test_documents_are_the_same_there(both, name, options):
    found = []
    for root in both:
        documents = open_sources([storage.join(root, name)], **options)
        texts = [each.text for each in documents]
        names = [each.name.replace(root, "").lstrip("/") for each in documents if name != "delta"]
        found.append((texts, names, documents.skipped, documents.size_bytes))
    assert found[0] == found[1] and found[0][0]


def test_what_is_not_there_is_one_line(both):
    _, there = both
    with pytest.raises(InputError, match="source .*/nothing.jsonl does not exist"):
        open_sources([f"{there}/nothing.jsonl"])
    with pytest.raises(InputError, match="source .*/nothing does not exist"):
        open_sources([f"{there}/nothing"])
