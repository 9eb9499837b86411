"""Starting many processes as one job, and letting them agree without touching a device.

What is exchanged here goes through the coordination service that `jax.distributed` starts beside the
devices: bad input on one host is refused by all of them before the first compilation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import socket
import time
from collections import defaultdict
from collections.abc import Iterator

from mosaicjax.errors import InputError

WAIT_SECONDS = 600.0
_PROBE_SECONDS = 0.2

# Calls are matched between processes by their number within a channel, so the numbers must be the
# process's, not an object's.
_calls: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is."""

    index: int
    count: int

    @property
    def primary(self) -> bool:
        """Whether this process writes what is written once."""
        return self.index == 0


def current() -> Processes:
    """This process's place in the job, without starting a device; 0 of 1 when none was started."""
    from jax._src import distributed

    return Processes(distributed.global_state.process_id, distributed.global_state.num_processes)


def start(coordinator: str, count: int, index: int, *, timeout_seconds: float = 300.0) -> Processes:
    """Join a job of `count` processes; call it before anything asks jax for its devices.

    `coordinator` is the address of process 0, `host:port`. With one process nothing is started.

    Raises:
        InputError: the numbers do not fit together, the backend runs already, or the others do not come.
    """
    if count < 1:
        raise InputError("wrong number of processes", expected="at least 1", got=count)
    if not 0 <= index < count:
        raise InputError("wrong process index", expected=f"0 to {count - 1}", got=index)
    if count == 1:
        return Processes(0, 1)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError("wrong coordinator address", expected="host:port", got=coordinator or "nothing")
    deadline = time.monotonic() + timeout_seconds
    if index > 0:
        _await_listener(host, int(port), deadline)
    import jax

    # Without it several CPU processes cannot reduce across each other; TPUs have their own network.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        left_seconds = max(1, round(deadline - time.monotonic()))
        jax.distributed.initialize(coordinator, count, index, initialization_timeout=left_seconds)
    except RuntimeError as error:
        raise _refused(f"process {index} of {count} cannot join the job at {coordinator}", error) from error
    return current()


def start_on_cluster() -> Processes:
    """Join the job that the cluster describes (a TPU pod, Slurm, Open MPI): jax finds the numbers.

    Raises:
        InputError: no cluster is found, or the others do not come.
    """
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise _refused("cannot find a cluster to join", error) from error
    return current()


def stop() -> None:
    """Leave the job; without one nothing happens."""
    import jax

    if current().count > 1:
        jax.distributed.shutdown()


def exchange(
    text: str, what: str, *, channel: str = "main", timeout_seconds: float = WAIT_SECONDS
) -> list[str]:
    """Give every process the texts of all, in the order of their indices.

    All processes make the same calls in the same order within a channel; a thread of its own needs a
    channel of its own. `what` names the occasion, for messages.

    Raises:
        InputError: a process does not answer in time.
        RuntimeError: the processes are at different places of the program.
    """
    here = current()
    if here.count == 1:
        return [text]
    from jax._src import distributed

    client = distributed.global_state.client
    assert client is not None
    call = next(_calls[channel])
    client.key_value_set(_key(channel, call, here.index), json.dumps([what, text]))
    if call >= 2:
        # Whoever answered call n-1 has read everything of call n-2, so nobody needs it any more.
        client.key_value_delete(_key(channel, call - 2, here.index))
    deadline = time.monotonic() + timeout_seconds
    texts = []
    for index in range(here.count):
        left_ms = max(1, round(1000 * (deadline - time.monotonic())))
        try:
            answer = client.blocking_key_value_get(_key(channel, call, index), left_ms)
        except RuntimeError as error:
            raise InputError(
                f"process {index} gave no answer about {what} within {timeout_seconds:g} s",
                fix=f"read the log of process {index}: it has stopped or hangs",
            ) from error
        occasion, value = json.loads(answer)
        if occasion != what:
            raise RuntimeError(
                f"process {here.index} is at {what!r} while process {index} is at {occasion!r}"
            )
        texts.append(value)
    return texts


def agree(
    error: InputError | None, what: str, *, channel: str = "main", timeout_seconds: float = WAIT_SECONDS
) -> None:
    """Go on together or stop together: an error of any process is raised by all of them.

    Raises:
        InputError: at least one process has an error; the message is the same everywhere and names the
            process it comes from. A single process raises its own error as it is.
    """
    if current().count == 1:
        if error is not None:
            raise error
        return
    texts = exchange(
        "" if error is None else str(error), what, channel=channel, timeout_seconds=timeout_seconds
    )
    refused = [(index, text) for index, text in enumerate(texts) if text]
    if refused:
        index, text = refused[0]
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise InputError(f"process {index}{more}: {text}") from error


@contextlib.contextmanager
def refused_by_all(
    what: str, *, channel: str = "main", timeout_seconds: float = WAIT_SECONDS
) -> Iterator[None]:
    """Run a block on every process, and raise on all of them if it raises on any.

    A defect (any exception but InputError) keeps its type and traceback where it happened; the others
    raise an InputError that points there, instead of waiting for a process that is gone.

    Raises:
        InputError: the block raised on some process.
    """
    error: InputError | None = None
    try:
        yield
    except InputError as refusal:
        error = refusal
    except Exception as defect:
        notice = InputError(
            f"{what} failed with {type(defect).__name__}: {defect}; its log has the traceback"
        )
        if current().count > 1:
            with contextlib.suppress(InputError):
                agree(notice, what, channel=channel, timeout_seconds=timeout_seconds)
        raise
    agree(error, what, channel=channel, timeout_seconds=timeout_seconds)


def broadcast_text(text: str, what: str, *, timeout_seconds: float = WAIT_SECONDS) -> str:
    """The primary's text, on every process; what the others pass is not looked at.

    Raises:
        InputError: the primary does not answer in time.
    """
    return exchange(text if current().primary else "", what, timeout_seconds=timeout_seconds)[0]


def _await_listener(host: str, port: int, deadline: float) -> None:
    """Wait until process 0 listens; where nobody does, jaxlib would abort without an exception."""
    waited_from = time.monotonic()
    while True:
        left_seconds = deadline - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(0.1, left_seconds)).close()
            return
        except OSError as error:
            if left_seconds <= _PROBE_SECONDS:
                waited = time.monotonic() - waited_from
                raise InputError(
                    f"nobody answers at the coordinator address {host}:{port} within {waited:.0f} s: {error}",
                    fix="start process 0, and give all processes its address",
                ) from error
        time.sleep(_PROBE_SECONDS)


def _key(channel: str, call: int, index: int) -> str:
    return f"mosaicjax/{channel}/{call}/{index}"


def _refused(what: str, error: Exception) -> InputError:
    lines = str(error).splitlines()
    return InputError(f"{what}: {lines[0] if lines else type(error).__name__}")
