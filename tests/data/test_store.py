import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.data.arrays import CHUNK_TOKENS, shard_file, token_dtype
from mosaicjax.data.build import build
from mosaicjax.data.fim import FillInMiddle
from mosaicjax.data.manifest import Layout, structure, write_json
from mosaicjax.data.store import Store
from mosaicjax.errors import InputError

SHARD = 2 * CHUNK_TOKENS


@pytest.fixture(scope="module")
def built(tmp_path_factory, tokenizer, write_rows):
    """A store whose training split has three shards."""
    folder = tmp_path_factory.mktemp("built")
    rows = write_rows(folder / "rows.jsonl", [f"{number**7} " * 60 for number in range(350)])
    build(
        [rows],
        folder / "store",
        tokenizer=tokenizer,
        held_out=0.05,
        workers=1,
        layout=Layout(shard_tokens=SHARD),
        progress=False,
    )
    return folder / "store"


@pytest.fixture
def store(built, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(built, tmp_path / "store")
    return tmp_path / "store"


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def numbers():
    return np.random.default_rng(0).integers(0, 60_000, 3 * SHARD + 777)


@pytest.fixture(scope="module")
def split(numbers, tmp_path_factory, write_split):
    return write_split(tmp_path_factory.mktemp("windows"), numbers, shard_tokens=SHARD)


def spans(split, starts, length):
    """Windows of one length, read side by side."""
    return split.read([(start, start + length) for start in starts])()


@given(data=st.data())
def test_windows_are_those_of_the_array(data, numbers, split):
    length = data.draw(st.integers(1, 3_000) | st.sampled_from([CHUNK_TOKENS, SHARD + 1]))
    edges = [place - length // 2 for place in (CHUNK_TOKENS, SHARD, 3 * SHARD)]
    start = st.integers(0, len(numbers) - length) | st.sampled_from([edge for edge in edges if edge >= 0])
    starts = [min(start, len(numbers) - length) for start in data.draw(st.lists(start, max_size=5))]
    rows = spans(split, starts, length)
    assert [(row.dtype, len(row)) for row in rows] == [(np.uint16, length)] * len(starts)
    for row, place in zip(rows, starts, strict=True):
        assert row.tolist() == numbers[place : place + length].tolist()


def test_layout_on_the_disk(built):
    metadata = json.loads((built / "train" / "tokens" / "zarr.json").read_text())
    assert metadata["data_type"] == "uint16"
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [SHARD]
    (sharding,) = metadata["codecs"]
    assert sharding["name"] == "sharding_indexed"
    assert sharding["configuration"]["chunk_shape"] == [65_536]
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "crc32c"]
    assert (token_dtype(65_536), token_dtype(65_537)) == ("uint16", "uint32")


def test_manifest_lists_every_file_and_nothing_else(built, data_digests):
    recorded = json.loads((built / "manifest.json").read_text())
    assert {name: record["sha256"] for name, record in recorded["files"].items()} == data_digests(built)
    assert recorded["splits"]["train"]["documents"] + recorded["splits"]["validation"]["documents"] == 350
    assert recorded["tokenizer"]["encoder"] == "tiktoken"
    assert len([name for name in recorded["files"] if name.startswith("train/tokens/c/")]) == 3


def test_manifest_leaves_out_what_is_not_used(built):
    settings = json.loads((built / "manifest.json").read_text())["settings"]
    assert settings["layout"] == {"shard_tokens": SHARD, "part_characters": 2**22}
    assert settings["seed"] == 0 and settings["include"] == []
    # Versions that know neither read the store all the same.
    assert not settings.keys() & {"fim", "filters", "drop_duplicates"}


def test_manifest_keeps_what_is_empty_on_purpose(tmp_path):
    """No suffix first, where half is the default."""
    write_json(tmp_path / "fim.json", FillInMiddle(0.5, 0.0, ("a", "b", "c")))
    text = (tmp_path / "fim.json").read_text()
    assert structure(json.loads(text), FillInMiddle, tmp_path) == FillInMiddle(0.5, 0.0, ("a", "b", "c"))


def test_store_has_its_own_tokenizer(built, tokenizer):
    store = Store.open(built)
    assert store.tokenizer.hash == tokenizer.hash == store.manifest.tokenizer.hash
    assert store.tokenizer.separator == store.manifest.tokenizer.separator == 0
    assert store.tokenizer.files[0].is_relative_to(built)


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_flipped_byte_names_the_shard(store, shard):
    path = shard_file(store / "train" / "tokens", shard)
    flip(path, 1_000)
    split = Store.open(store).split("train")
    fine = [place * SHARD for place in range(3) if place != shard]
    assert [len(tokens) for tokens in spans(split, fine, 10)] == [10, 10]
    with pytest.raises(InputError, match=rf"shard {path} is damaged"):
        spans(split, [*fine, shard * SHARD + 5], 10)
    # a window that begins in the shard before, or ends in the one after
    start = shard * SHARD - 5 if shard else SHARD - CHUNK_TOKENS - 5
    with pytest.raises(InputError, match=rf"shard {path} is damaged"):
        spans(split, [start if shard else 0], 10 if shard else SHARD + 10)
    with pytest.raises(InputError, match=rf"{path} is damaged; expected SHA-256"):
        Store.open(store).verify("train")
    Store.open(store).verify("validation")
    with pytest.raises(InputError, match=rf"{path} is damaged"):
        Store.open(store, verify=True)


@given(place=st.integers(0, 2**40))
def test_no_flipped_byte_is_read(place, tmp_path_factory, write_split, numbers):
    folder = tmp_path_factory.mktemp("flip")
    split = write_split(folder, numbers[: SHARD + 100], shard_tokens=SHARD)
    path = shard_file(folder / "tokens", place % 2)
    flip(path, place // 2 % path.stat().st_size)
    with pytest.raises(InputError, match=f"{path} is damaged"):
        split.tokens(0, SHARD + 100)
    shutil.rmtree(folder)


def test_missing_and_short_files_are_named_at_open(store):
    path = shard_file(store / "train" / "tokens", 1)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(
        InputError, match=rf"{path} is damaged; expected {len(data)} bytes; got {len(data) - 1}"
    ):
        Store.open(store)
    path.unlink()
    with pytest.raises(InputError, match=rf"{path} is missing"):
        Store.open(store)


def test_shard_that_goes_missing_while_reading(store):
    split = Store.open(store).split("train")
    path = shard_file(store / "train" / "tokens", 1)
    path.unlink()
    with pytest.raises(InputError, match=rf"shard {path} is damaged"):
        split.tokens(SHARD, SHARD + 10)


def test_damaged_documents_are_named(store):
    flip(store / "train" / "documents" / "c" / "0" / "0", 50)
    with pytest.raises(InputError, match="train/documents is damaged"):
        Store.open(store).split("train").spans()


def test_directories_that_are_no_store(store, tmp_path):
    with pytest.raises(InputError, match="no token store at"):
        Store.open(tmp_path / "nothing")
    with pytest.raises(InputError, match="no such split; expected train or validation; got test"):
        Store.open(store).split("test")
    manifest = store / "manifest.json"
    contents = json.loads(manifest.read_text())
    for changed, problem in [
        ("{", "is damaged; expected JSON"),
        (json.dumps(contents | {"version": 2}), "version 1; got .*2"),
        (json.dumps(contents | {"surprise": 1}), "is damaged; got .*surprise"),
        (
            json.dumps({key: value for key, value in contents.items() if key != "splits"}),
            "is damaged; got .*splits",
        ),
    ]:
        manifest.write_text(changed)
        with pytest.raises(InputError, match=f"manifest.json .*{problem}"):
            Store.open(store)
    manifest.unlink()
    with pytest.raises(InputError, match="unfinished build; fix: run the same command again"):
        Store.open(store)
