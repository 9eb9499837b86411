"""A disk that is full while a store is built or a run is saved: one line, and on once there is room."""

import functools
import shlex
import subprocess
import sys

import pytest

from mosaicjax.data.build import build
from mosaicjax.data.store import Store
from tests import jobs, tiny

SCRIPT = """
set -u
mount -t tmpfs -o size={size} none {disk}
{command}; echo "first: $?" >&2
echo and then >&2
mount -o remount,size=64m {disk}
{command}; echo "second: $?" >&2
cp -r {disk} {kept}
"""


@functools.cache
def small_disks() -> bool:
    """Whether this machine lets us have a disk of a size, in a name space of our own."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not small_disks(), reason="this machine mounts no disk of a size for us"),
]


def on_disk_of(size, tmp_path, *command):
    """A command on a disk that is too small, and once more with room: what it said, and what is there."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    line = shlex.join(
        [sys.executable, "-m", "mosaicjax.cli", *(str(each).format(disk=disk) for each in command)]
    )
    script = SCRIPT.format(size=size, disk=disk, kept=kept, command=line)
    environment = jobs.environment(1) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, env=environment, timeout=240
    )
    full, room = done.stderr.split("and then\n")
    assert room.endswith("second: 0\n"), done.stderr
    (said,) = [each for each in full.splitlines() if each.startswith("mosaicjax: ")]
    assert full.endswith("first: 2\n") and "Traceback" not in full, full
    assert "No space left on device" in said, said
    return said, kept


@pytest.mark.parametrize("size", ["8k", "24k", "52k", "100k"])
def test_a_build_goes_on_once_there_is_room(tmp_path, size, tiny_store, data_digests):
    rows, tokenizer = tiny_store.parent / "documents.jsonl", tiny_store.parent / "tokenizer"
    expected = tmp_path / "expected"
    build([rows], expected, tokenizer=tokenizer, workers=1, progress=False)
    command = ("data", "build", rows, "--tokenizer", tokenizer, "--out", "{disk}/store", "--workers", 1)
    said, kept = on_disk_of(size, tmp_path, *command)
    assert "the build of" in said and said.endswith("the same command goes on where it stopped")
    assert data_digests(kept / "store") == data_digests(expected)
    Store.open(kept / "store", verify=True)


STEPS = ("--steps", 30, "--log.tensorboard", "False", "--eval.every", 0)


@pytest.fixture(scope="module")
def straight(tiny_recipe, tmp_path_factory):
    """The rows of a run with room."""
    out = tmp_path_factory.mktemp("straight") / "run"
    (done,) = tiny.ended([tiny.launch("train", tiny_recipe, "--out", out, *STEPS)])
    assert done.returncode == 0, done.stderr
    return tiny.rows(out)


@pytest.mark.parametrize(
    "size, what, every",
    [
        ("260k", "checkpoints/3", 3),
        pytest.param("700k", "checkpoints/", 3, marks=pytest.mark.soak),
        ("28k", "metrics.jsonl", 0),
    ],
)
def test_a_run_goes_on_once_there_is_room(tmp_path, size, what, every, tiny_recipe, straight):
    options = (*STEPS, "--save.every", every)
    said, kept = on_disk_of(size, tmp_path, "train", tiny_recipe, "--out", "{disk}/run", *options)
    assert "cannot write" in said and what in said, said
    assert tiny.rows(kept / "run") == straight
