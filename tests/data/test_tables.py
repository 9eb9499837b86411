import gzip
import json

import pytest

from mosaicjax.data.build import build
from mosaicjax.data.documents import open_sources
from mosaicjax.data.tables import ROWS
from mosaicjax.errors import InputError

pyarrow = pytest.importorskip("pyarrow", reason="pip install 'mosaicjax[tables]'")
deltalake = pytest.importorskip("deltalake", reason="pip install 'mosaicjax[tables]'")
parquet = pytest.importorskip("pyarrow.parquet")


def texts(*paths, **options):
    return [document.text for document in open_sources(paths, **options)]


def table(values, name="text"):
    return pyarrow.table({"id": list(range(len(values))), name: values})


def test_zstd_lines_of_one_frame_and_of_several(tmp_path):
    rows = [json.dumps({"text": f"row {n} é" * 50}).encode() + b"\n" for n in range(3_000)]
    codec = pyarrow.Codec("zstd")
    (tmp_path / "one.jsonl.zst").write_bytes(codec.compress(b"".join(rows), asbytes=True))
    parts = [codec.compress(b"".join(part), asbytes=True) for part in (rows[:1_000], rows[1_000:])]
    (tmp_path / "two.jsonl.zst").write_bytes(b"".join(parts))
    expected = [f"row {n} é" * 50 for n in range(3_000)]
    assert texts(tmp_path / "one.jsonl.zst") == expected
    assert texts(tmp_path / "two.jsonl.zst") == expected
    whole = (tmp_path / "one.jsonl.zst").read_bytes()
    (tmp_path / "one.jsonl.zst").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"one\.jsonl\.zst, line \d+"):
        texts(tmp_path / "one.jsonl.zst")


@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
def test_parquet_in_groups_of_rows_with_nulls(tmp_path, compression):
    values = [None if n % 7 == 0 else f"text {n} é" for n in range(3 * ROWS // 2)]
    path = tmp_path / "a.parquet"
    parquet.write_table(table(values, "body"), path, compression=compression, row_group_size=500)
    expected = [value for value in values if value]
    assert texts(path, field="body") == expected
    # In a folder they are asked for, as JSON lines are.
    (tmp_path / "b.txt").write_text("plain")
    assert texts(tmp_path) == ["plain"]
    assert texts(tmp_path, include=["*.parquet"], field="body") == expected
    documents = open_sources([path], field="body")
    assert [each.name for each in documents][:2] == [f"{path}:1", f"{path}:2"]
    assert documents.skipped["empty"] == len(values) - len(expected)
    with pytest.raises(InputError, match=r"a\.parquet lacks the column 'text'; expected one of id, body"):
        texts(path)
    with pytest.raises(InputError, match=r"a\.parquet:0, field 'id'; expected a string; got int"):
        texts(path, field="id")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.parquet cannot be read as Parquet"):
        texts(path, field="body")


def test_a_delta_table_at_each_of_its_versions(tmp_path):
    path = str(tmp_path / "table")
    deltalake.write_deltalake(path, table(["a", "b"]))
    deltalake.write_deltalake(path, table(["c"]), mode="append")
    deltalake.write_deltalake(path, table(["d", "e", "f"]), mode="overwrite")
    assert sorted(texts(f"{path}@v0")) == ["a", "b"]
    assert sorted(texts(f"{path}@v1")) == ["a", "b", "c"]
    assert sorted(texts(path)) == ["d", "e", "f"]
    # The order is the same each time, and the version is in the name.
    documents = open_sources([f"{path}@v1"])
    assert list(documents) == list(documents)
    assert all("table@v1" in each.name for each in documents)
    assert documents.size_bytes > 0
    with pytest.raises(InputError, match="cannot be opened at version 9"):
        texts(f"{path}@v9")
    with pytest.raises(InputError, match="lacks the column 'body'; expected one of id, text"):
        texts(path, field="body")
    # A row that was deleted is in the version before alone.
    deltalake.DeltaTable(path).delete("text = 'd'")
    assert sorted(texts(path)) == ["e", "f"]
    assert sorted(texts(f"{path}@v2")) == ["d", "e", "f"]


def test_a_store_is_of_one_version_of_a_delta_table(tmp_path, tokenizer):
    path, out = str(tmp_path / "table"), tmp_path / "store"
    deltalake.write_deltalake(path, table(["one", "two", "three"]))
    made = build([path], out, tokenizer=tokenizer, held_out=0.0, workers=1, progress=False)
    assert made.settings.sources == (f"{path}@v0",) and made.splits["train"].documents == 3
    deltalake.write_deltalake(path, table(["four"]), mode="append")
    with pytest.raises(InputError, match="another sources; expected .*table@v0.*; got .*table@v1"):
        build([path], out, tokenizer=tokenizer, held_out=0.0, workers=1, progress=False)
    again = build([f"{path}@v0"], out, tokenizer=tokenizer, held_out=0.0, workers=1, progress=False)
    assert again == made


def test_a_folder_that_is_named_like_a_version_is_a_folder(tmp_path):
    (tmp_path / "code@v3").mkdir()
    (tmp_path / "code@v3" / "a.txt").write_text("text")
    assert texts(tmp_path / "code@v3") == ["text"]


def test_no_delta_table_there(tmp_path):
    with pytest.raises(InputError, match="the Delta table .*nothing cannot be opened at version 3"):
        texts(tmp_path / "nothing@v3")


def test_several_kinds_in_the_order_given(tmp_path):
    parquet.write_table(table(["p"]), tmp_path / "p.parquet")
    deltalake.write_deltalake(str(tmp_path / "d"), table(["d"]))
    (tmp_path / "l.jsonl.gz").write_bytes(gzip.compress(b'{"text": "l"}\n'))
    names = ["l.jsonl.gz", "d", "p.parquet"]
    assert texts(*(tmp_path / name for name in names)) == ["l", "d", "p"]
