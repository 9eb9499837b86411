"""Blocks on the disk: never more than the limit, those used last, whole, whoever dies on the way."""

import fcntl
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.data.disk_cache import DEFAULT_SIZE, DiskCache, Place
from mosaicjax.errors import InputError

CHECKSUM = 4


def block(name, size):
    return np.random.default_rng([size, *name.encode()]).bytes(size)


def held(folder):
    """What lies in a cache: bytes by name."""
    root = folder / "blocks"
    return {
        path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()
    }


NAMES = st.sampled_from(["a/0", "a/1", "a/2", "b/0", "b/1", "c"])
USES = st.lists(st.tuples(st.sampled_from(["get", "put"]), NAMES, st.integers(0, 400)), max_size=40)


@given(uses=USES, limit=st.integers(0, 1_200))
def test_what_is_kept_was_used_last(tmp_path_factory, uses, limit):
    folder = tmp_path_factory.mktemp("cache")
    cache = DiskCache(Place(folder, limit))
    contents, used = {}, {}
    for turn, (what, name, size) in enumerate(uses):
        before = held(folder)
        if what == "get":
            found = cache.get(name)
            assert (found is not None) == (name in before)
            assert found is None or found == contents[name]
        else:
            # A block of one name has one content.
            contents.setdefault(name, block(name, size))
            cache.put(name, contents[name])
            assert (name in held(folder)) == (len(contents[name]) + CHECKSUM <= limit)
        used[name] = turn
        after = held(folder)
        assert sum(after.values()) <= limit
        gone = before.keys() - after.keys()
        # Who had to go was used before all who stayed, and nobody goes where there is room.
        assert all(used[one] < used[other] for one in gone for other in after)
        if gone:
            assert what == "put" and sum(before.values()) + after[name] > limit


def test_reading_a_block_is_using_it(tmp_path):
    cache = DiskCache(Place(tmp_path, 3 * 1_004))
    for name in ("x", "y", "z"):
        cache.put(name, block(name, 1_000))
    assert cache.get("x") == block("x", 1_000)
    cache.put("w", block("w", 1_000))
    assert "x" in held(tmp_path) and "y" not in held(tmp_path)


@pytest.mark.parametrize("place", [0, 100, -1, -CHECKSUM, "cut", "empty"])
def test_a_damaged_block_is_fetched_anew(tmp_path, place):
    cache = DiskCache(Place(tmp_path, 10_000))
    for name in ("x", "y"):
        cache.put(name, block(name, 1_000))
    path = tmp_path / "blocks" / "x"
    data = bytearray(path.read_bytes())
    if isinstance(place, int):
        data[place] ^= 8
    path.write_bytes(data if isinstance(place, int) else data[:500] if place == "cut" else b"")
    assert cache.get("x") is None and cache.get("y") == block("y", 1_000)
    assert held(tmp_path) == {"y": 1_004}
    cache.put("x", block("x", 1_000))
    assert cache.get("x") == block("x", 1_000)


WORKER = """
import sys
from pathlib import Path
import numpy as np
from mosaicjax.data.disk_cache import DiskCache, Place

folder, limit, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
random, cache = np.random.default_rng(seed), DiskCache(Place(folder, limit))
turns = 0
while True:
    number = int(random.integers(60))
    size = 1_000 + 911 * number
    found = cache.get(f"some/{number}")
    if found is None:
        cache.put(f"some/{number}", np.random.default_rng(number).bytes(size))
    elif found != np.random.default_rng(number).bytes(size):
        sys.exit(f"block {number} is another")
    turns += 1
    if turns % 50 == 0:
        print(turns, flush=True)
"""


@pytest.mark.slow
def test_processes_that_are_killed_leave_a_sound_cache(tmp_path):
    limit = 400_000  # a quarter of all blocks

    def worker(seed):
        command = [sys.executable, "-c", WORKER, str(tmp_path), str(limit), str(seed)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    workers = [worker(seed) for seed in range(3)]
    for turn in range(12):
        for process in workers:
            process.stdout.readline()
            with open(tmp_path / "lock") as lock:
                # Others go on writing, but neither begin to nor make room.
                fcntl.flock(lock, fcntl.LOCK_EX)
                assert sum(held(tmp_path).values()) <= limit
        victim = turn % 3
        assert workers[victim].poll() is None, workers[victim].stderr.read().decode()
        workers[victim].send_signal(signal.SIGKILL)
        workers[victim].communicate()
        workers[victim] = worker(100 + turn)
    for process in workers:
        process.kill()
        process.communicate()
    cache = DiskCache(Place(tmp_path, limit))
    for number in range(60, 120):
        # All the room can be had again, whatever those left that were killed.
        cache.put(f"some/{number}", block(str(number), 6_000))
    assert limit * 7 / 8 < sum(held(tmp_path).values()) <= limit
    assert not list((tmp_path / "unfinished").iterdir())


def test_settings_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("MOSAICJAX_CACHE_DIR", raising=False)
    monkeypatch.delenv("MOSAICJAX_CACHE_SIZE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DEFAULT_SIZE == "50GB"
    assert Place.of_machine() == Place(tmp_path / "mosaicjax" / "data", 50 * 10**9)
    monkeypatch.setenv("MOSAICJAX_CACHE_DIR", str(tmp_path / "here"))
    for text, expected in {
        "200GB": 200 * 10**9,
        "1.5 tb": 1_500 * 10**9,
        "700B": 700,
        "2MB": 2 * 10**6,
    }.items():
        monkeypatch.setenv("MOSAICJAX_CACHE_SIZE", text)
        assert Place.of_machine() == Place(tmp_path / "here", expected)
    for text in ("many", "-3GB", "7", "GB"):
        monkeypatch.setenv("MOSAICJAX_CACHE_SIZE", text)
        with pytest.raises(
            InputError, match=f"MOSAICJAX_CACHE_SIZE; expected a size such as 200GB; got {text}"
        ):
            Place.of_machine()


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the cache .*file.* cannot be used; got Not a directory"):
        DiskCache(Place(tmp_path / "file" / "below", 100))


FULL = """
import resource, signal, sys
from pathlib import Path
from mosaicjax.data.disk_cache import DiskCache, Place

# The system refuses larger files, as it does on a full disk.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
cache = DiskCache(Place(Path(sys.argv[1]), 10**6))
cache.put("small", b"s" * 3_000)
for _ in range(3):
    cache.put("large", b"l" * 7_000)
assert cache.get("small") == b"s" * 3_000 and cache.get("large") is None
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
cache.put("large", b"l" * 7_000)
assert cache.get("large") == b"l" * 7_000
"""


def test_a_disk_that_takes_no_more_is_said_once(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"the cache {tmp_path} cannot keep what is read (File too large): going on")
    assert held(tmp_path) == {"small": 3_004, "large": 7_004}
    assert (tmp_path / "lock").read_text().strip() == str(10_008)
