"""Streams one after the other: another mixture, sequence length or batch from a data step on."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from mosaicjax.data.rows import Batch, SplitRows
from mosaicjax.data.stream import Stream


class Phased:
    """The training batches of a run's phases; `streams[p]` is read from its `first_step` on.

    Phases begin at data steps: what a batch holds depends on its data step alone, whatever is left out before
    it. So a run that leaves out steps enters a phase as many steps of training earlier.
    """

    def __init__(self, streams: Sequence[Stream]) -> None:
        assert streams and streams[0].first_step == 0, "the first phase begins with the run"
        self.streams = tuple(streams)
        self._begins = [stream.first_step for stream in streams]
        assert self._begins == sorted(set(self._begins)), self._begins

    @property
    def skips(self) -> tuple[int, ...]:
        """The data steps left out."""
        return self.streams[0].skips

    def skipping(self, skips: Iterable[int]) -> Phased:
        """Return the same streams with other steps left out."""
        left_out = tuple(skips)
        return Phased([stream.skipping(left_out) for stream in self.streams])

    def data_step(self, step: int) -> int:
        """Return the data step that a step of training reads."""
        return self.streams[0].data_step(step)

    def phase(self, step: int) -> int:
        """Return the number of the phase that a step of training is in."""
        return bisect_right(self._begins, self.data_step(step)) - 1

    def stream(self, step: int) -> Stream:
        """Return the stream that a step of training reads from."""
        return self.streams[self.phase(step)]

    def rows(self, step: int, rows: Sequence[int]) -> Batch:
        """Read rows of a training step's global batch, as `Stream.rows`; what phases before it held goes.

        Raises: InputError naming a damaged shard.
        """
        phase = self.phase(step)
        for before in self.streams[:phase]:
            before.forget()
        return self.streams[phase].rows(step, rows)


def begin_of(data_step: int, skips: Sequence[int]) -> int:
    """Return the first step of training that reads this data step or a later one; `skips` are in order."""
    return data_step - bisect_left(skips, data_step)


def taken_before(name: str, rows: SplitRows, begin: int, before: Sequence[Stream]) -> int:
    """Return how many of a domain's rows come before a phase: it goes on in its epoch where it stood.

    Rows of another length or another packing are counted by their share of the epoch. Places come in the same
    turn then, as they do where a domain's share is another; but rows of the windows under way, before and
    after, may come once more in that epoch, or not at all. With another batch alone each comes once.
    """
    for number in reversed(range(len(before))):
        stream = before[number]
        mine = next((each.rows for each in stream.drawn if each.name == name), None)
        if mine is None or mine.identity != rows.identity:
            continue
        end = before[number + 1].first_step if number + 1 < len(before) else begin
        epoch, within = divmod(stream.samples_at(end)[name], len(mine))
        return epoch * len(rows) + within * len(rows) // len(mine)
    return 0
