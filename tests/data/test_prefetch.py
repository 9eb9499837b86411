import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.data.prefetch import Prefetch
from mosaicjax.errors import InputError


@settings(max_examples=20)
@given(start=st.integers(0, 1_000), count=st.integers(0, 30), ahead=st.integers(1, 5))
def test_prefetch_reads_each_step_once_and_in_order(start, count, ahead):
    read = []

    def square(step):
        read.append(step)
        return step**2

    with Prefetch(square, start, ahead=ahead) as prefetch:
        steps = range(start, start + count)
        assert [prefetch.get(step) for step in steps] == [step**2 for step in steps]
    assert read == list(range(start, start + len(read)))
    assert count <= len(read) <= count + ahead + 1


def test_prefetch_waits_for_room():
    allowed, reads = threading.Semaphore(0), Counter()

    def read(step):
        reads[step] += 1
        allowed.release()
        return step

    with Prefetch(read, 0, ahead=2) as prefetch:
        allowed.acquire()
        allowed.acquire()
        # a third read would release a third time
        assert not allowed.acquire(timeout=0.05)
        assert prefetch.get(0) == 0
        assert allowed.acquire(timeout=20)
    assert reads == {0: 1, 1: 1, 2: 1}


def test_prefetch_raises_at_the_step_it_belongs_to():
    read = []

    def fail(step):
        read.append(step)
        if step == 3:
            raise InputError("shard 3 is damaged")
        return step

    with Prefetch(fail, 1, ahead=5) as prefetch:
        assert [prefetch.get(1), prefetch.get(2)] == [1, 2]
        for _ in range(2):
            with pytest.raises(InputError, match="shard 3 is damaged"):
                prefetch.get(3)
    assert read == [1, 2, 3]


def test_prefetch_closes_while_full_and_while_reading():
    before = threading.active_count()
    full = Prefetch(lambda step: step, 0, ahead=1)
    assert full.get(0) == 0
    full.close()
    full.close()
    reading, go_on = threading.Event(), threading.Event()

    def slow(step):
        reading.set()
        assert go_on.wait(20)
        return step

    busy = Prefetch(slow, 0)
    assert reading.wait(20)
    closing = threading.Thread(target=busy.close)
    closing.start()
    go_on.set()
    closing.join(20)
    assert threading.active_count() == before
    with pytest.raises(AssertionError, match="expected step 1, got 5"):
        full.get(5)
