"""The bookkeeping of pages beside what a device would hold in them, over random lives of requests."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicjax.serve.pages import NoRoom, Pages


class Device:
    """What was written where: a token for each slot of each page."""

    def __init__(self):
        self.slots = {}

    def write(self, pages, table, begin, end):
        for place in range(begin, end):
            page = table.numbers[place // pages.size]
            self.slots[page, place % pages.size] = tuple(table.tokens[: place + 1])

    def check(self, pages, table, end):
        """Each slot has its token with all that led to it: keys depend on what comes before."""
        for place in range(end):
            found = self.slots[table.numbers[place // pages.size], place % pages.size]
            assert found == tuple(table.tokens[: place + 1]), place


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=14)
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), PROMPTS),
        st.tuples(st.just("write"), st.integers(0, 9), st.integers(1, 6)),
        st.tuples(st.just("add"), st.integers(0, 9), st.integers(0, 1)),
        st.tuples(st.just("end"), st.integers(0, 9)),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(acts=ACTS, count=st.integers(1, 9), size=st.integers(1, 4), first=st.integers(0, 3))
def test_no_page_is_lost_or_holds_what_is_not_its_tables(acts, count, size, first):
    pages, device = Pages(count, size, first), Device()
    tables, done = [], {}
    for act, *given_ in acts:
        if act == "begin":
            prompt = given_[0]
            free = pages.free
            try:
                table = pages.begin(prompt)
            except NoRoom:
                assert pages.free == free and pages.needed(len(prompt)) > 0
                continue
            assert table.shared < len(prompt) and table.shared % size == 0
            assert len(table.pages) == pages.needed(len(prompt))
            tables.append(table)
            done[id(table)] = table.shared
        elif tables:
            table = tables[given_[0] % len(tables)]
            if act == "write":
                end = min(done[id(table)] + given_[1], len(table.tokens))
                device.write(pages, table, done[id(table)], end)
                done[id(table)] = end
                pages.written(table, end)
            elif act == "add" and done[id(table)] == len(table.tokens):
                try:
                    pages.add(table, given_[1])
                except NoRoom:
                    assert pages.free == 0
            elif act == "end":
                pages.end(table)
                tables.remove(table)
        for table in tables:
            assert len(set(table.numbers)) == len(table.numbers)
            assert all(first <= number < first + count for number in table.numbers)
            device.check(pages, table, done[id(table)])
        assert pages.held == len({number for table in tables for number in table.numbers})
        assert pages.held + pages.free == count and pages.kept <= pages.free
    for table in tables:
        pages.end(table)
    assert pages.held == 0 and pages.free == count


def test_a_prefix_is_shared_in_whole_pages_but_for_the_last_token():
    pages = Pages(8, 4)
    first = pages.begin(range(10))
    assert first.shared == 0
    pages.written(first, 10)
    # Two whole pages are known; the third is not whole.
    assert pages.begin([*range(10), 11]).shared == 8
    assert pages.begin(range(8)).shared == 4
    assert pages.begin([0, 1, 2, 9]).shared == 0


def test_what_is_not_written_yet_is_not_shared():
    pages = Pages(8, 4)
    first = pages.begin(range(9))
    assert pages.begin(range(9)).shared == 0
    pages.written(first, 5)
    assert pages.begin(range(9)).shared == 4


def test_the_longest_unused_goes_first_and_a_prefix_last():
    pages = Pages(4, 2)
    for prompt in ([1, 1, 1, 1], [2, 2, 2, 2]):
        table = pages.begin(prompt)
        pages.written(table, 4)
        pages.end(table)
    assert (pages.kept, pages.free, pages.held) == (4, 4, 0)
    taken = pages.begin([3, 3])
    # Of the first prompt its end is gone, and its beginning is there.
    assert pages.begin([1, 1, 1, 1, 5]).shared == 2
    with pytest.raises(NoRoom):
        pages.begin([4] * 8)
    pages.end(taken)
    assert pages.held == 3


def test_room_is_what_is_left_without_the_pages_that_are_shared():
    """A prompt whose prefix is kept needs pages for the rest alone, and its prefix cannot be taken for it."""
    pages = Pages(3, 2)
    table = pages.begin([1, 1, 1, 1])
    pages.written(table, 4)
    pages.end(table)
    # With one page less there would be none for the rest: what it shares is no room for it.
    small = Pages(2, 2)
    first = small.begin([1, 1, 1, 1])
    small.written(first, 4)
    small.end(first)
    with pytest.raises(NoRoom):
        small.begin([1, 1, 1, 1, 1, 1])
    assert (small.kept, small.free, small.held) == (2, 2, 0)
    again = pages.begin([1, 1, 1, 1, 1, 1])
    assert again.shared == 4 and pages.free == 0
    with pytest.raises(NoRoom):
        pages.add(again, 1)
