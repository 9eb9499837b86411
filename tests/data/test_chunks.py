"""Our reader of shard files against TensorStore's, which wrote them."""

import json

import numpy as np
import pytest
import tensorstore
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.data.arrays import create_array
from mosaicjax.data.chunks import Chunks


@st.composite
def arrays(draw):
    """Rows, rows of a chunk and of a shard, the shape of a row, and a dtype."""
    chunk = draw(st.integers(1, 20))
    shard = chunk * draw(st.integers(1, 6))
    rows = draw(st.integers(1, 4 * shard))
    return (
        rows,
        chunk,
        shard,
        draw(st.sampled_from([(), (2,)])),
        draw(st.sampled_from(["uint16", "uint32", "int64"])),
    )


@given(array=arrays(), data=st.data())
def test_rows_are_those_that_tensorstore_reads(tmp_path_factory, array, data):
    rows, chunk, shard, row, dtype = array
    folder = tmp_path_factory.mktemp("array")
    store = create_array(folder, dtype=dtype, shape=(rows, *row), shard=shard, chunk=chunk)
    values = np.random.default_rng(rows).integers(0, 2**16, (rows, *row)).astype(dtype)
    if data.draw(st.booleans()):
        store.write(values).result()
    else:
        # Chunks in an order of their own, written over some: they lie anywhere in their shards then.
        starts = data.draw(st.permutations(range(0, rows, chunk)))
        for start in [*starts, *starts[:2]]:
            end = min(start + chunk, rows)
            store[start:end].write(values[start:end]).result()
    ends = st.tuples(st.integers(0, rows), st.integers(0, rows)).map(sorted).map(tuple)
    spans = data.draw(st.lists(ends, min_size=1, max_size=5))
    opened = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}, open=True, read=True
    ).result()
    for (first, last), found in zip(spans, Chunks(folder).begin(spans)(), strict=True):
        expected = opened[first:last].read().result()
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert found.tolist() == expected.tolist() == values[first:last].tolist()


@given(array=arrays(), place=st.integers(0, 2**30), bits=st.integers(1, 255), cut=st.booleans())
def test_damage_anywhere_is_told_or_changes_nothing(tmp_path_factory, array, place, bits, cut):
    rows, chunk, shard, row, dtype = array
    folder = tmp_path_factory.mktemp("array")
    values = np.random.default_rng(rows).integers(0, 2**16, (rows, *row)).astype(dtype)
    create_array(folder, dtype=dtype, shape=(rows, *row), shard=shard, chunk=chunk).write(values).result()
    files = sorted(path for path in (folder / "c").rglob("*") if path.is_file())
    path = files[place % len(files)]
    contents = bytearray(path.read_bytes())
    if cut:
        del contents[place // 7 % len(contents) :]
    else:
        contents[place // 7 % len(contents)] ^= bits
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=str(path)):
        Chunks(folder).check(0, rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda it: it.pop("codecs"),
        lambda it: it["codecs"].append({"name": "gzip"}),
        lambda it: it["codecs"][0]["configuration"]["codecs"].pop(),
        lambda it: it["codecs"][0]["configuration"].update(index_location="start"),
        lambda it: it.update(data_type="no such"),
        lambda it: it.update(shape=[]),
    ],
)
def test_an_array_of_another_form_is_refused(tmp_path, change):
    create_array(tmp_path, dtype="uint16", shape=(50,), shard=20, chunk=10).write(
        np.arange(50, dtype=np.uint16)
    ).result()
    about = json.loads((tmp_path / "zarr.json").read_text())
    change(about)
    (tmp_path / "zarr.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="zarr.json"):
        Chunks(tmp_path).check(0, 5)
