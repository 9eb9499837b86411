import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.data.build import build
from mosaicjax.data.documents import open_sources
from mosaicjax.data.manifest import Layout, read_manifest
from mosaicjax.data.store import Store
from mosaicjax.errors import InputError

SMALL = Layout(shard_tokens=65_536, part_characters=30_000)
PROJECT = Path(__file__).parents[2]

# Builds a store, and is killed by the system at the n-th event of a kind: no part of the build knows of it.
KILLED = """
import os, signal, sys
from mosaicjax.data.build import build
from mosaicjax.data.manifest import Layout

if __name__ == "__main__":
    # A shell's background job is born deaf to Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    source, out, tokenizer, workers, event, kind, count = sys.argv[1:]
    left = int(count)

    def kill(name, arguments):
        global left
        if name == event and kind in str(arguments[0]):
            left -= 1
            if left == 0:
                children = open(f"/proc/self/task/{os.getpid()}/children").read()
                print(children, flush=True)
                os.kill(TARGET, signal.SIGNAL)

    sys.addaudithook(kill)
    layout = Layout(shard_tokens=65_536, part_characters=30_000)
    options = {"held_out": 0.1, "workers": int(workers), "layout": layout, "progress": False}
    build([source], out, tokenizer=tokenizer, **options)
    print("finished")
"""


@pytest.fixture(scope="module")
def corpus(code_folder, tmp_path_factory):
    """Some 30 files of code, of which copies differ in one line, so that the store has several shards."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(2):
        for document in open_sources([code_folder]):
            (folder / f"{number}-{Path(document.name).name}").write_text(f"# {number}\n{document.text}")
    return folder


@pytest.fixture(scope="module")
def reference(corpus, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "store"
    build([corpus], out, tokenizer=tokenizer, held_out=0.1, workers=1, layout=SMALL, progress=False)
    return out


def naive_store(texts, tokenizer, seed, held_out):
    """The tokens, starts and byte lengths of both splits, from the definition."""

    def key(number):
        return hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()

    splits = {"train": ([0], [], []), "validation": ([0], [], [])}
    texts = [text for text in texts if text]
    for number in sorted(range(len(texts)), key=key):
        data = texts[number].encode()
        share = (
            int.from_bytes(hashlib.blake2b(data, digest_size=8, person=b"held out").digest(), "big") / 2**64
        )
        tokens, starts, lengths = splits["validation" if share < held_out else "train"]
        starts.append(len(tokens))
        tokens.extend([*tokenizer.encode(texts[number]), 0])
        lengths.append(len(data))
    return splits


@settings(max_examples=25)
@given(
    texts=st.lists(
        st.text(max_size=30) | st.sampled_from(["a", "hello " * 300, "x = 1\n" * 9_000]), min_size=1
    ),
    seed=st.integers(0, 2**31),
    held_out=st.sampled_from([0.0, 0.3]),
    characters=st.sampled_from([1, 50, 10_000]),
)
def test_store_is_what_the_definition_says(
    texts, seed, held_out, characters, tokenizer, write_rows, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("round-trip")
    rows = write_rows(folder / "rows.jsonl", texts)
    expected = naive_store(texts, tokenizer, seed, held_out)
    options = {"tokenizer": tokenizer, "held_out": held_out, "seed": seed, "workers": 1, "progress": False}
    layout = Layout(shard_tokens=65_536, part_characters=characters)
    if not expected["train"][1]:
        with pytest.raises(InputError, match="empty corpus|every document is held out"):
            build([rows], folder / "store", layout=layout, **options)
        return
    manifest = build([rows], folder / "store", layout=layout, **options)
    store = Store.open(folder / "store", verify=True)
    for name, (tokens, starts, lengths) in expected.items():
        split = store.split(name)
        assert split.tokens(0, len(split)).tolist() == tokens
        spans = split.spans().tolist()
        assert [first for first, _ in spans] == starts
        ends = [*(start - 1 for start in starts[1:]), len(tokens) - 1]
        assert [last for _, last in spans] == ends[: len(starts)]
        some = len(starts) // 2
        assert split.spans(some // 2, some).tolist() == spans[some // 2 : some]
        assert split.document_bytes().tolist() == lengths
        counts = manifest.splits[name]
        assert (counts.documents, counts.tokens, counts.bytes) == (len(starts), len(tokens), sum(lengths))
        assert store.tokenizer.token_bytes[tokens].sum() == sum(lengths)
    assert manifest.skipped == ({"empty": texts.count("")} if "" in texts else {})


@pytest.mark.parametrize("workers, characters", [(2, 30_000), (3, 5_000), (1, 2**22)])
def test_workers_and_parts_decide_nothing(
    corpus, tokenizer, reference, data_digests, tmp_path, workers, characters
):
    layout = Layout(shard_tokens=65_536, part_characters=characters)
    options = {"held_out": 0.1, "workers": workers, "layout": layout, "progress": False}
    build([corpus], tmp_path / "store", tokenizer=tokenizer, **options)
    digests = data_digests(reference)
    assert data_digests(tmp_path / "store") == digests
    assert sum(name.startswith("train/tokens/c/") for name in digests) > 2
    changing = {"time": None, "settings": None}
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (reference, tmp_path / "store")]
    assert manifests[0] | changing == manifests[1] | changing


def run_killed(corpus, out, tokenizer, workers, event, kind, count, *, sent="SIGKILL", to="os.getpid()"):
    script = out.parent / "killed.py"
    script.write_text(KILLED.replace("SIGNAL", sent).replace("TARGET", to))
    arguments = [corpus, out, tokenizer.files[0], workers, event, kind, count]
    command = [sys.executable, str(script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    # a process group of its own, as a shell gives a command; workers left behind would hold the pipes open
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        timeout=90,
        start_new_session=True,
        check=False,
    )


def assert_ended(children):
    alive = [psutil.Process(int(pid)) for pid in children if psutil.pid_exists(int(pid))]
    assert not psutil.wait_procs(alive, timeout=20)[1]


@pytest.mark.parametrize(
    "workers, event, kind, count, spilled",
    [
        (1, "os.rename", ".tokens.", 1, False),  # the first spill file written, not yet in its place
        (1, "os.rename", ".npy.", 4, True),  # a spill file without its index
        (1, "os.rename", "train-1.json", 1, True),  # a shard without its record
        (1, "os.rename", ".unfinished/manifest.json", 1, True),  # all but the manifest
        (1, "os.remove", "settings.json", 1, None),  # after the manifest
        (2, "open", "1-message.py", 1, None),  # two workers at work
    ],
)
def test_killed_build_goes_on_to_the_same_store(
    corpus, tokenizer, reference, data_digests, tmp_path, workers, event, kind, count, spilled
):
    out = tmp_path / "store"
    killed = run_killed(corpus, out, tokenizer, workers, event, kind, count)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert_ended(killed.stdout.split())
    if kind != "settings.json":
        with pytest.raises(InputError, match="unfinished build"):
            read_manifest(out)
    spills = list(out.rglob("*.npy"))
    build([corpus], out, tokenizer=tokenizer, held_out=0.1, workers=1, layout=SMALL, progress=False)
    assert data_digests(out) == data_digests(reference)
    assert spilled in (bool(spills), None)
    assert not list(out.glob(".*"))


def test_finished_parts_are_not_made_again(corpus, tokenizer, tmp_path):
    out = tmp_path / "store"
    run_killed(corpus, out, tokenizer, 1, "os.rename", ".npy.", 6)
    before = {path.name: path.stat().st_ino for path in out.rglob("*.npy")}
    run_killed(corpus, out, tokenizer, 1, "os.rename", ".npy.", 3)
    after = {path.name: path.stat().st_ino for path in out.rglob("*.npy")}
    assert len(before) == 5 and len(after) == 7
    assert before.items() <= after.items()


def test_ctrl_c_leaves_a_build_to_go_on_with(corpus, tokenizer, reference, data_digests, tmp_path):
    out = tmp_path / "store"
    stopped = run_killed(corpus, out, tokenizer, 2, "open", "1-message.py", 1, sent="SIGINT", to="0")
    assert "KeyboardInterrupt" in stopped.stderr and "finished" not in stopped.stdout
    assert_ended(stopped.stdout.split())
    build([corpus], out, tokenizer=tokenizer, held_out=0.1, workers=2, layout=SMALL, progress=False)
    assert data_digests(out) == data_digests(reference)


def test_other_settings_are_refused(corpus, tokenizer, reference, tmp_path):
    out = tmp_path / "store"
    run_killed(corpus, out, tokenizer, 1, "os.rename", ".unfinished/manifest.json", 1)
    same = {"tokenizer": tokenizer, "held_out": 0.1, "layout": SMALL, "workers": 1, "progress": False}
    for begun in (out, reference):
        for change, problem in [
            ({"seed": 1}, "another seed; expected 0; got 1"),
            ({"held_out": 0.2}, "another held_out; expected 0.1; got 0.2"),
            ({"field": "body"}, "another field"),
            ({"exclude": ["0-*"]}, "another source_files"),
        ]:
            with pytest.raises(InputError, match=problem):
                build([corpus], begun, **same | change)


def test_finished_store_is_left_alone(corpus, tokenizer, reference):
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    manifest = build([corpus], reference, tokenizer=tokenizer, held_out=0.1, layout=SMALL, progress=False)
    assert manifest == read_manifest(reference)
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*")} == before


def test_changed_sources_are_refused(tokenizer, tmp_path, write_rows, data_digests):
    rows = write_rows(tmp_path / "rows.jsonl", [f"{number:06d} " * 1_000 for number in range(20)])
    out = tmp_path / "store"
    run_killed(rows, out, tokenizer, 1, "os.rename", ".unfinished/manifest.json", 1)
    options = {"tokenizer": tokenizer, "held_out": 0.1, "layout": SMALL, "workers": 1, "progress": False}
    original = rows.read_text()
    lines = original.splitlines(keepends=True)
    for changed in (
        original.replace("000007", "000008"),
        # the same number of bytes in fewer parts
        "".join([*lines[:9], " " * len("".join(lines[9:-1])), "\n"]),
    ):
        rows.write_text(changed.ljust(len(original)))
        with pytest.raises(InputError, match="the sources changed since this build was begun"):
            build([rows], out, **options)
    # nothing was lost: with the sources as they were the build goes on
    rows.write_text(original)
    build([rows], out, **options)
    build([rows], tmp_path / "other", **options)
    assert data_digests(out) == data_digests(tmp_path / "other")


def test_damaged_work_is_made_again(corpus, tokenizer, reference, data_digests, tmp_path):
    out = tmp_path / "store"
    run_killed(corpus, out, tokenizer, 1, "os.rename", ".unfinished/manifest.json", 1)
    shard = out / "train" / "tokens" / "c" / "1"
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    (out / "validation" / "tokens" / "c" / "0").unlink()
    spills = sorted(out.rglob("*.tokens"))
    spills[0].write_bytes(spills[0].read_bytes()[:-2])
    spills[1].unlink()
    build([corpus], out, tokenizer=tokenizer, held_out=0.1, workers=1, layout=SMALL, progress=False)
    assert data_digests(out) == data_digests(reference)


def test_second_build_at_once_is_refused(corpus, tokenizer, reference, tmp_path):
    out = tmp_path / "store"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    options = {"tokenizer": tokenizer, "held_out": 0.1, "layout": SMALL, "workers": 1, "progress": False}
    with pytest.raises(InputError, match="another process is building"):
        build([corpus], out, **options)
    os.close(handle)
    assert build([corpus], out, **options).files == read_manifest(reference).files


def test_builds_that_cannot_be(corpus, tokenizer, tmp_path):
    options = {"tokenizer": tokenizer, "progress": False}
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for out, changes, problem in [
        ("file", {}, "is a file"),
        ("mine", {}, "is not empty and no token store"),
        ("new", {"workers": -1}, "number of workers"),
        ("new", {"held_out": 1.0}, "held-out fraction"),
        ("new", {"layout": Layout(shard_tokens=1_000)}, "a multiple of 65536"),
        ("new", {"tokenizer": tmp_path / "none"}, "tokenizer .* does not exist"),
    ]:
        with pytest.raises(InputError, match=problem):
            build([corpus], tmp_path / out, **options | changes)
    with pytest.raises(InputError, match="lies inside its source"):
        build([corpus], corpus / "store", **options)
    assert not (tmp_path / "new").exists()


def test_bad_row_stops_the_build_and_its_workers(tokenizer, tmp_path, write_rows):
    rows = write_rows(tmp_path / "rows.jsonl", ["words " * 10_000] * 3)
    rows.write_text(rows.read_text() + "{}\n")
    with pytest.raises(InputError, match="rows.jsonl, line 4"):
        build([rows], tmp_path / "store", tokenizer=tokenizer, workers=2, layout=SMALL, progress=False)
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
