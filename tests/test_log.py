import json
import math
import os
import signal
import struct
import subprocess
import sys
import uuid

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.log import BEFORE_FIRST_STEP, MetricsLog, decode, encode, read_rows


def started(run_dir, step=BEFORE_FIRST_STEP, **options):
    log = MetricsLog(str(run_dir), **{"tensorboard": False, "primary": True} | options)
    log.resume(step)
    return log


def losses(run_dir):
    return [(row["step"], row["loss"]) for row in read_rows(str(run_dir))]


def test_a_row_byte_for_byte(tmp_path):
    with started(tmp_path) as log:
        log.write("train", 3, {"seen": 96, "loss": 0.1}, {"step_seconds": 0.25, "at": 1.5})
    assert (tmp_path / "metrics.jsonl").read_bytes() == (
        b'{"step": 3, "kind": "train", "loss": 0.1, "seen": 96, "time": {"at": 1.5, "step_seconds": 0.25}}\n'
    )


def test_order_of_keys_does_not_matter(tmp_path):
    with started(tmp_path / "a") as log:
        log.write("train", 1, {"a": 1, "b": 2}, {})
    with started(tmp_path / "b") as log:
        log.write("train", 1, {"b": 2, "a": 1}, {})
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


@given(st.lists(st.floats(), min_size=1, max_size=5))
def test_floats_come_back_bit_for_bit(values):
    named = {f"v{i}": value for i, value in enumerate(values)}
    text = json.dumps(encode(named), allow_nan=False)
    back = decode(json.loads(text))

    def bits(value):
        return struct.pack("<d", math.nan if math.isnan(value) else value)

    assert {key: bits(value) for key, value in back.items()} == {k: bits(v) for k, v in named.items()}


def test_not_finite_is_legal_json(tmp_path):
    with started(tmp_path) as log:
        log.write("train", 1, {"a": math.nan, "b": math.inf, "c": -math.inf}, {"d": math.inf})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["a"], line["b"], line["c"], line["time"]["d"]) == ("nan", "inf", "-inf", "inf")
    (row,) = read_rows(str(tmp_path))
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf
    assert row["time"]["d"] == math.inf


def test_array_scalars_keep_their_value(tmp_path):
    third = np.float32(1 / 3)
    with started(tmp_path) as log:
        log.write("train", np.int64(1), {"loss": jnp.float32(1 / 3), "count": np.int32(7)}, {})
    (row,) = read_rows(str(tmp_path))
    assert np.float32(row["loss"]) == third and row["loss"] == float(third)
    assert row["count"] == 7 and row["step"] == 1


def test_resume_drops_rows_after_the_step(tmp_path):
    with started(tmp_path) as log:
        for step in range(1, 6):
            log.write("train", step, {"loss": 10.0 - step}, {})
        log.write("eval", 5, {"loss": 1.0}, {})
    with started(tmp_path, step=3) as log:
        log.write("train", 4, {"loss": 0.5}, {})
    assert losses(tmp_path) == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 0.5)]
    with started(tmp_path, step=BEFORE_FIRST_STEP) as log:
        log.write("eval", 0, {"loss": 11.0}, {})
    assert losses(tmp_path) == [(0, 11.0)]


@given(cut=st.integers(0, 400), step=st.integers(-1, 6))
def test_a_file_cut_anywhere_keeps_its_whole_rows(tmp_path_factory, cut, step):
    run = tmp_path_factory.mktemp("cut")
    with started(run) as log:
        for number in range(5):
            log.write("train", number, {"loss": 1 / (number + 1), "word": "ä\n"}, {"at": 0.5})
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    # A row survives when its newline does.
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 0x0A]
    expected = [n for n, end in enumerate(ends) if end <= cut and n <= step]
    with started(run, step=step):
        pass
    assert [row["step"] for row in read_rows(str(run))] == expected
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[n] for n in expected)


def test_a_torn_last_line_that_got_its_newline(tmp_path):
    # A crash of the machine can leave the length of a write without its bytes.
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "kind": "train", "loss": 2.0, "time": {}}\n\0\0\0\n'
    )
    with started(tmp_path, step=9):
        pass
    assert losses(tmp_path) == [(1, 2.0)]


def test_damage_in_the_middle_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(InputError, match="line 2 of .*metrics.jsonl"):
        started(tmp_path, step=9)
    with pytest.raises(InputError, match="line 2 of .*metrics.jsonl"):
        read_rows(str(tmp_path))


def test_rows_outlive_a_kill(tmp_path):
    code = f"""
import os, signal
from mosaicjax.log import MetricsLog
log = MetricsLog({str(tmp_path)!r}, tensorboard=False, primary=True)
log.resume(-1)
for step in range(100):
    log.write("train", step, {{"loss": step / 7}}, {{}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert losses(tmp_path) == [(step, step / 7) for step in range(100)]


def test_only_the_primary_writes(tmp_path):
    log = MetricsLog(str(tmp_path / "run"), tensorboard=True, primary=False)
    log.resume(BEFORE_FIRST_STEP)
    log.write("train", 1, {"loss": 1.0}, {})
    log.sync()
    log.close()
    assert not (tmp_path / "run").exists()


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no metrics.jsonl in .*; fix: give the directory of a run"):
        read_rows(str(tmp_path))


@pytest.fixture
def remote():
    import fsspec

    directory = f"memory://runs/{uuid.uuid4().hex}"
    yield directory
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists(directory):
        filesystem.rm(directory, recursive=True)


def test_remote_rows_go_up_whole(remote):
    log = started(remote, tensorboard=True)
    log.write("train", 1, {"loss": 3.0}, {})
    log.sync()
    assert losses(remote) == [(1, 3.0)]
    log.write("train", 2, {"loss": 2.0}, {})
    assert losses(remote) == [(1, 3.0)]
    log.close()
    assert losses(remote) == [(1, 3.0), (2, 2.0)]
    with started(remote, step=1) as log:
        log.write("train", 2, {"loss": 2.5}, {})
    assert losses(remote) == [(1, 3.0), (2, 2.5)]


def test_remote_events_go_up(remote):
    import fsspec

    with started(remote, tensorboard=True) as log:
        log.write("train", 1, {"loss": 3.0}, {})
    filesystem = fsspec.filesystem("memory")
    (path,) = filesystem.ls(f"{remote}/tensorboard", detail=False)
    assert [e[:2] for e in scalars(filesystem.cat_file(path))] == [("train/loss", 1)]


def events(content):
    """TensorBoard's record format read by hand: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    at = 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += 12 + length + 4


def scalars(content):
    return [
        (value.tag, event.step, value.simple_value)
        for event in events(content)
        for value in event.summary.value
    ]


def test_tensorboard_gets_the_rows_and_forgets_what_was_undone(tmp_path):
    with started(tmp_path, tensorboard=True) as log:
        for step in (1, 2, 3):
            log.write("train", step, {"loss": step / 2, "name": "word"}, {"step_seconds": 0.25})
    directory = tmp_path / "tensorboard"
    (first,) = os.listdir(directory)
    assert scalars((directory / first).read_bytes()) == [
        pair
        for step in (1, 2, 3)
        for pair in [("train/loss", step, step / 2), ("train/time/step_seconds", step, 0.25)]
    ]
    with started(tmp_path, step=1, tensorboard=True) as log:
        log.write("train", 2, {"loss": 9.0}, {})
    (second,) = set(os.listdir(directory)) - {first}
    # TensorBoard drops what it has from the step of a START event on.
    content = (directory / second).read_bytes()
    assert [event.step for event in events(content) if event.session_log.status == 1] == [2]
    assert scalars(content) == [("train/loss", 2, 9.0)]
