"""Agreement between real processes, and what a single one does."""

import json

import pytest

from mosaicjax import processes
from mosaicjax.errors import InputError
from tests import jobs


def test_all_see_all_texts_in_order():
    results = jobs.run_job("process_worker.py", "exchange", count=3)
    for index, result in enumerate(results):
        assert result.returncode == 0, result.stderr
        answer = json.loads(result.stdout)
        assert answer["rounds"] == [[f"{other}:{turn}" for other in range(3)] for turn in range(60)]
        assert answer["told"] == "from 0: größer"
        assert answer["place"] == [index, 3, index == 0, index, 3]


def test_one_refusal_stops_all():
    results = jobs.run_job("process_worker.py", "refused")
    for result in results:
        assert (result.returncode, result.stdout) == (2, "")
        assert last_line(result.stderr) == "process 1: no shard; expected 00001.bin; got nothing"


def test_a_defect_keeps_its_traceback_and_stops_the_others():
    failed, other = jobs.run_job("process_worker.py", "defect")
    assert failed.returncode == 1
    assert last_line(failed.stderr) == "KeyError: 'tokens'"
    assert "Traceback" in failed.stderr
    assert other.returncode == 2
    assert last_line(other.stderr) == (
        "process 0: reading data failed with KeyError: 'tokens'; its log has the traceback"
    )


def test_silence_is_an_error_and_not_a_hang():
    waiting, silent = jobs.run_job("process_worker.py", "silent")
    assert silent.returncode == 0
    assert waiting.returncode == 2
    assert last_line(waiting.stderr) == (
        "process 1 gave no answer about the mesh within 0.5 s; "
        "fix: read the log of process 1: it has stopped or hangs"
    )


def test_processes_at_different_places_are_found_out():
    results = jobs.run_job("process_worker.py", "astray")
    assert [result.returncode for result in results] == [1, 1]
    assert "process 0 is at 'the mesh' while process 1 is at 'the data'" in results[0].stderr


def test_single_process_needs_nobody():
    assert processes.start("ignored", 1, 0) == processes.Processes(0, 1) == processes.current()
    assert processes.current().primary
    assert processes.exchange("x", "anything") == ["x"]
    assert processes.broadcast_text("x", "anything") == "x"
    processes.agree(None, "anything")
    processes.stop()
    error = InputError("no shard")
    with pytest.raises(InputError) as raised:
        processes.agree(error, "anything")
    assert raised.value is error
    with pytest.raises(InputError, match="^no shard$"), processes.refused_by_all("anything"):
        raise InputError("no shard")
    with pytest.raises(KeyError), processes.refused_by_all("anything"):
        raise KeyError("tokens")


def test_an_absent_coordinator_is_one_line():
    address = jobs.free_address()
    with pytest.raises(InputError) as refusal:
        processes.start(address, 2, 1, timeout_seconds=0.1)
    assert str(refusal.value) == (
        f"nobody answers at the coordinator address {address} within 0 s: [Errno 111] Connection refused; "
        "fix: start process 0, and give all processes its address"
    )


@pytest.mark.parametrize(
    ("coordinator", "count", "index", "message"),
    [
        ("h:1", 0, 0, "wrong number of processes; expected at least 1; got 0"),
        ("h:1", 2, 2, "wrong process index; expected 0 to 1; got 2"),
        ("h:1", 2, -1, "wrong process index; expected 0 to 1; got -1"),
        ("", 2, 0, "wrong coordinator address; expected host:port; got nothing"),
        ("host", 2, 0, "wrong coordinator address; expected host:port; got host"),
        ("host:http", 2, 0, "wrong coordinator address; expected host:port; got host:http"),
    ],
)
def test_wrong_numbers_are_refused(coordinator, count, index, message):
    with pytest.raises(InputError) as refusal:
        processes.start(coordinator, count, index)
    assert str(refusal.value) == message


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]
