"""The rows of metrics that a run writes: exact, comparable between runs, and right after a kill."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from mosaicjax import storage
from mosaicjax.errors import InputError

if TYPE_CHECKING:
    from tensorboardX.proto.event_pb2 import Event

METRICS = "metrics.jsonl"
"""The name of the file of rows within a run directory."""

RUN_JSON = "run.json"
"""The name of the file of command, versions, devices and seed within a run directory."""

TENSORBOARD = "tensorboard"
"""The name of the directory of TensorBoard's event files within a run directory."""

BEFORE_FIRST_STEP = -1
"""What a run without a checkpoint resumes from: no row is older, so none is kept."""

RESERVED = ("step", "kind", "time")

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

Scalar = bool | int | float | str
Row = dict[str, Any]


class MetricsLog:
    """Appends one JSON object a line to `metrics.jsonl` in a run directory, and TensorBoard events if asked.

    A row is `{"step", "kind", ...values, "time": {...}}`: everything that depends on the clock stands under
    `time`, so two equal runs compare equal byte for byte once it is dropped. Floats are written so that
    reading gives the same float; JSON has no NaN or infinities, so these are the strings `nan`, `inf` and
    `-inf`, which `read_rows` turns back. Only the primary process writes; the calls of others do nothing.

    Call `resume` before the first `write`, and `sync` before a checkpoint commits: then rows up to the
    checkpoint's step are on the disk whenever the checkpoint is. A remote run directory (`s3://`, `gs://`)
    cannot be appended to: its rows wait in a file on this machine and go up whole at `sync` and `close`.
    """

    def __init__(self, run_dir: str, *, tensorboard: bool, primary: bool) -> None:
        self._run_dir = run_dir
        self._primary = primary
        self._tensorboard = tensorboard
        self._file: IO[str] | None = None
        self._events: _Events | None = None
        self._buffer = (
            tempfile.TemporaryDirectory(prefix="mosaicjax-metrics-")
            if primary and storage.is_remote(run_dir)
            else None
        )

    def resume(self, step: int) -> None:
        """Drop the rows after `step` and get ready to append; `BEFORE_FIRST_STEP` drops them all.

        A last line torn by a kill is dropped too. The file is replaced in one move.

        Raises:
            InputError: a line other than the last is not a row.
        """
        if not self._primary:
            return
        assert self._file is None, "resume comes once, before the first row"
        source = storage.join(self._run_dir, METRICS)
        content = storage.read_bytes(source) if storage.exists(source) else b""
        kept = "".join(line for line, row in _parse(content, source) if row["step"] <= step)
        local = self._local(METRICS)
        storage.write_text(local, kept)
        self._file = open(local, "a", encoding="utf-8")
        if self._tensorboard:
            self._events = _Events(self._local(TENSORBOARD), step + 1)

    def write(self, kind: str, step: int, values: Mapping[str, Any], time: Mapping[str, Any]) -> None:
        """Append one row: `values` that two equal runs share, and `time`, which depends on the clock.

        Values are numbers, booleans or strings; zero-dimensional arrays count as numbers. Keys are written
        in alphabetical order.
        """
        if not self._primary:
            return
        assert self._file is not None, "call resume() before the first row"
        plain_values, plain_time = _plain(values), _plain(time)
        assert not set(RESERVED) & set(plain_values), f"reserved keys in {sorted(plain_values)}"
        row = {"step": int(step), "kind": kind, **encode(plain_values), "time": encode(plain_time)}
        with storage.refusal("write", storage.join(self._run_dir, METRICS)):
            self._file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")
            # Handed to the system at once: `tail -f` follows, and killing this process loses no row.
            self._file.flush()
            if self._events is not None:
                for prefix, group in ((kind, plain_values), (f"{kind}/time", plain_time)):
                    for name, value in group.items():
                        if not isinstance(value, str):
                            self._events.scalar(f"{prefix}/{name}", int(step), float(value))

    def sync(self) -> None:
        """Return once every row written so far outlives this machine's crash (or is in the remote store)."""
        if self._file is None:
            return
        with storage.refusal("write", storage.join(self._run_dir, METRICS)):
            self._file.flush()
            os.fsync(self._file.fileno())
            if self._events is not None:
                self._events.flush()
        if self._buffer is not None:
            storage.copy_file(self._local(METRICS), storage.join(self._run_dir, METRICS))
            events = self._local(TENSORBOARD)
            for name in storage.list_dir(events):
                target = storage.join(self._run_dir, TENSORBOARD, name)
                storage.copy_file(storage.join(events, name), target)

    def close(self) -> None:
        """Sync and let go of the files; a second call does nothing.

        Raises:
            InputError: the rows since the last sync cannot be written.
        """
        with storage.refusal("write", storage.join(self._run_dir, METRICS)), contextlib.ExitStack() as closed:
            if self._buffer is not None:
                closed.callback(self._buffer.cleanup)
            if self._events is not None:
                closed.callback(self._events.close)
            if self._file is not None:
                closed.callback(self._file.close)
            try:
                self.sync()
            finally:
                self._file = self._events = self._buffer = None

    def __enter__(self) -> Self:
        """The log itself, closed when the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the log, whatever ended the block."""
        self.close()

    def _local(self, name: str) -> str:
        directory = self._buffer.name if self._buffer is not None else storage.local(self._run_dir)
        return os.path.join(directory, name)


class _Events:
    """One file of TensorBoard events, on this machine.

    tensorboardX's SummaryWriter hands events to a thread that its flush does not wait for, so rows could
    be missing after `sync`; the writer below it, used here, keeps none back.
    """

    def __init__(self, directory: str, first_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        os.makedirs(directory, exist_ok=True)
        # Files are named by the second: the suffix keeps two of the same second apart.
        suffix = f".{os.getpid()}.{first_step}"
        self._writer = EventsWriter(os.path.join(directory, "events"), suffix)
        # At a START event TensorBoard drops what earlier files hold from its step on.
        self._writer.write_event(self._event(first_step, session_log=SessionLog(status=SessionLog.START)))

    def scalar(self, tag: str, step: int, value: float) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self._writer.write_event(self._event(step, summary=summary))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    @staticmethod
    def _event(step: int, **content: Any) -> Event:
        from tensorboardX.proto.event_pb2 import Event

        return Event(wall_time=time.time(), step=step, **content)


def read_rows(run_dir: str) -> list[Row]:
    """The rows of a run, finished or still being written, with NaN and infinities as floats.

    Raises:
        InputError: there is no such file, or a line other than the last is not a row.
    """
    path = storage.join(run_dir, METRICS)
    if not storage.exists(path):
        raise InputError(f"no {METRICS} in {run_dir}", fix="give the directory of a run")
    rows = [row for _, row in _parse(storage.read_bytes(path), path)]
    return [decode(row) | {"time": decode(row.get("time", {}))} for row in rows]


def encode(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with sorted keys, and NaN and infinities as the strings that stand for them in JSON."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in sorted(values.items())
    }


def decode(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `encode`, but for the order of keys."""
    return {
        key: _NOT_FINITE[value] if isinstance(value, str) and value in _NOT_FINITE else value
        for key, value in values.items()
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Scalar]:
    """Python scalars for numpy's and jax's."""
    plain: dict[str, Scalar] = {}
    for key, value in values.items():
        scalar = value.item() if hasattr(value, "item") else value
        assert isinstance(scalar, bool | int | float | str), f"{key} is a {type(value).__name__}"
        assert scalar not in _NOT_FINITE, f"{key} is a string that stands for a float"
        plain[key] = scalar
    return plain


def _parse(content: bytes, path: str) -> list[tuple[str, Row]]:
    """Each whole line with its row; what a kill left of a last line is passed over."""
    lines = content.split(b"\n")
    # What follows the last newline is empty, or a line that was never finished.
    lines.pop()
    parsed: list[tuple[str, Row]] = []
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8")
            row = json.loads(text)
            is_row = isinstance(row, dict) and isinstance(row.get("step"), int)
        except ValueError:
            is_row = False
        if is_row:
            parsed.append((text + "\n", row))
        elif number < len(lines):
            raise InputError(f"line {number} of {path} is not a row of metrics", fix="remove that line")
    return parsed
