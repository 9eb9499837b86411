"""A store on an object store gives what the one on this machine gives, and asks for nothing twice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax import storage
from mosaicjax.data import arrays
from mosaicjax.data.arrays import BLOCK_CHUNKS, CHUNK_TOKENS
from mosaicjax.data.build import build
from mosaicjax.data.disk_cache import DiskCache, Place
from mosaicjax.data.inspect import inspect
from mosaicjax.data.manifest import Layout
from mosaicjax.data.readers import Blocks
from mosaicjax.data.store import Store
from mosaicjax.errors import InputError
from tests import jobs, object_store

SHARD = 2 * CHUNK_TOKENS


@pytest.fixture(scope="module")
def here(tmp_path_factory, tokenizer, write_rows):
    """A store on this machine whose training split has several shards and blocks."""
    folder = tmp_path_factory.mktemp("here")
    rows = write_rows(folder / "rows.jsonl", [f"{number**7} " * 60 for number in range(900)])
    layout = Layout(shard_tokens=SHARD)
    build(
        [rows], folder / "store", tokenizer=tokenizer, held_out=0.05, workers=1, layout=layout, progress=False
    )
    return folder / "store"


@pytest.fixture
def there(here, tmp_path, monkeypatch):
    """A copy of it on an object store, with a cache of the test's own."""
    monkeypatch.setenv("MOSAICJAX_CACHE_DIR", str(tmp_path / "cache"))
    bucket = object_store.new_bucket(monkeypatch)
    Store.open(here).copy(f"{bucket}/some/store")
    return f"{bucket}/some/store"


def test_the_same_tokens_documents_and_tokenizer(here, there):
    one, other = Store.open(here), Store.open(there, verify=True)
    assert other.manifest == one.manifest
    assert other.tokenizer.hash == one.tokenizer.hash and other.tokenizer.files[0].exists()
    other.verify()
    random = np.random.default_rng(3)
    for name in ("train", "validation"):
        mine, theirs = one.split(name), other.split(name)
        assert theirs.spans().tolist() == mine.spans().tolist()
        assert theirs.document_bytes().tolist() == mine.document_bytes().tolist()
        for _ in range(5):
            spans = [tuple(map(int, sorted(random.integers(0, len(mine) + 1, 2)))) for _ in range(4)]
            for a, b in zip(mine.read(spans)(), theirs.read(spans)(), strict=True):
                assert a.dtype == b.dtype and a.tolist() == b.tolist()
    lines, again = ([line.replace(str(path), "") for line in inspect([path])] for path in (str(here), there))
    assert lines == again


def test_a_second_pass_asks_for_nothing(here, there):
    def everything(store):
        split = store.split("train")
        starts = range(0, len(split), 50_000)
        read = split.read([(start, min(start + 50_001, len(split))) for start in starts])()
        return [each.tolist() for each in read], split.spans().tolist(), store.tokenizer.hash

    first = everything(Store.open(there))
    opened = Store.open(there)
    with object_store.counted() as requests:
        assert everything(opened) == first
    assert requests == []
    with object_store.counted() as requests:
        Store.open(there)
    assert requests and not [path for path in requests if "/tokens/" in path or "/documents/" in path]


def test_a_store_written_anew_is_read_anew(here, there, tmp_path, tokenizer, write_rows):
    before = Store.open(there).split("train").tokens(0, 1_000)
    rows = write_rows(tmp_path / "rows.jsonl", [f"{number**5} " * 60 for number in range(900)])
    build([rows], tmp_path / "other", tokenizer=tokenizer, held_out=0.0, workers=1, progress=False)
    other = Store.open(tmp_path / "other")
    with pytest.raises(InputError, match=f"{there} is another store"):
        other.copy(there)
    storage.remove_tree(there)
    other.copy(there)
    other.copy(there)  # finished: nothing is done
    after = Store.open(there).split("train").tokens(0, 1_000)
    assert after.tolist() == other.split("train").tokens(0, 1_000).tolist() != before.tolist()


@pytest.mark.parametrize(
    "name, change, problem",
    [
        ("train/tokens/c/1", "flip", "shard {there}/train/tokens/c/1 is damaged"),
        ("train/documents/c/0/0", "flip", "{there}/train/documents is damaged"),
        ("train/tokens/c/1", "cut", "{there}/train/tokens/c/1 is damaged; expected .* bytes; got"),
        ("train/documents/c/0/0", "cut", "{there}/train/documents/c/0/0 is damaged; expected .* bytes; got"),
        ("validation/tokens/c/0", "remove", "{there}/validation/tokens/c/0 is missing"),
        ("tokenizer/tokenizer.json", "flip", "tokenizer.json is damaged; expected SHA-256"),
        ("manifest.json", "cut", "{there}/manifest.json is damaged; expected JSON"),
        ("manifest.json", "remove", "{there} has no manifest.json: an unfinished build"),
    ],
)
def test_damage_is_named(there, name, change, problem):
    path = storage.join(there, name)
    data = bytearray(storage.read_bytes(path))
    if change == "remove":
        storage.remove_tree(path)
    else:
        data[500 % len(data)] ^= 1
        storage.write_bytes(path, bytes(data if change == "flip" else data[:-7]))
    with pytest.raises(InputError, match=problem.format(there=there)):
        store = Store.open(there)
        assert store.tokenizer
        store.split("train").spans()
        store.split("train").tokens(0, len(store.split("train")))


def test_what_is_not_there_is_one_line(there):
    with pytest.raises(InputError, match=f"there is no token store at {there}x"):
        Store.open(f"{there}x")
    with pytest.raises(InputError, match="cannot be read|cannot look at|there is no token store"):
        Store.open("s3://no-such-bucket-at-all/store")
    with pytest.raises(
        InputError, match="built on this machine; expected a local folder; got s3://.*data copy"
    ):
        build(["x"], f"{there}/new", tokenizer="x")


def test_a_wrong_key_is_one_line(there, here):
    opened = Store.open(there)
    with object_store.keys_asked_for():
        with pytest.raises(InputError) as refusal:
            Store.open(there)
        with pytest.raises(InputError) as while_reading:
            opened.split("train").tokens(0, 10)
        with pytest.raises(InputError) as while_copying:
            Store.open(here).copy(f"{there}-again")
    assert str(refusal.value).startswith(f"cannot look at {there}/manifest.json: Forbidden; fix: check that")
    said = str(while_reading.value)
    assert said.startswith(f"{there}/train/tokens cannot be read; got PERMISSION_DENIED: ")
    assert "InvalidAccessKeyId" in said and said.endswith("goes on where it stopped") and "{" not in said
    assert "The AWS Access Key Id you provided does not exist" in str(while_copying.value)
    assert len(opened.split("train").tokens(0, 10)) == 10


def test_a_server_that_stays_away_is_one_line(there, monkeypatch):
    opened = Store.open(there)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{jobs.free_address()}")
    monkeypatch.setitem(arrays.RETRIES, "max_retries", 1)
    with pytest.raises(
        InputError, match="train/tokens cannot be read; got ABORTED: .*Could not connect"
    ) as said:
        opened.split("train").tokens(0, 10)
    assert "damaged" not in str(said.value) and "\n" not in str(said.value)


@given(data=st.data())
def test_blocks_are_cut_like_the_array(data, tmp_path_factory, write_split):
    """Spans over blocks that are here, gone or never were; the array itself lies on this machine."""
    size = data.draw(st.integers(1, 3 * CHUNK_TOKENS))
    tokens = np.random.default_rng(size).integers(0, 2**16, size).astype(np.uint16)
    folder = tmp_path_factory.mktemp("blocks")
    write_split(folder, tokens)
    block = data.draw(st.sampled_from([CHUNK_TOKENS, 2 * CHUNK_TOKENS, BLOCK_CHUNKS * CHUNK_TOKENS]))
    limit = data.draw(st.sampled_from([0, 2 * block + 4, 10**9]))
    cache = DiskCache(Place(folder / "cache", limit))
    blocks = Blocks(str(folder / "tokens"), (size,), "uint16", block=block, cache=cache, name="n")
    for _ in range(data.draw(st.integers(1, 3))):
        ends = st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted).map(tuple)
        spans = data.draw(st.lists(ends, max_size=4))
        for (first, last), found in zip(spans, blocks.begin(spans)(), strict=True):
            assert found.dtype == np.uint16 and found.tolist() == tokens[first:last].tolist()
    held = sum(path.stat().st_size for path in (folder / "cache" / "blocks").rglob("*") if path.is_file())
    assert held <= limit
