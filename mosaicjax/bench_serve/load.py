"""Many requests: by clients that wait for their answers, or by arrivals at random times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mosaicjax.bench_serve.asks import Ask
from mosaicjax.bench_serve.client import Answer, Target, ask_one

Hear = Callable[[Answer], None]


@dataclass(frozen=True)
class Clients:
    """So many clients, each of which asks again as soon as it is answered."""

    count: int

    def __str__(self) -> str:
        return f"{self.count} client{'s' * (self.count > 1)}"


@dataclass(frozen=True)
class Poisson:
    """So many arrivals a second on average, at random times, however many are under way."""

    rate: float
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.rate:g} arrivals a second"

    def due(self, count: int) -> list[float]:
        """When each is to be sent, in seconds from the first."""
        waits = np.random.default_rng(self.seed).exponential(1 / self.rate, count)
        waits[:1] = 0
        return [float(each) for each in np.cumsum(waits)]


async def send(
    target: Target,
    asks: Sequence[Ask],
    arrivals: Clients | Poisson,
    hear: Hear = lambda answer: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Answer]:
    """Send all of them; the answers, in their order. `hear` gets each when it has ended.

    Raises:
        InputError: a prompt that the target's interface does not take, before anything is sent.
    """
    for ask in asks:
        target.body(ask)
    answers: dict[int, Answer] = {}

    async def one(number: int) -> None:
        answers[number] = await ask_one(target, asks[number], clock)
        hear(answers[number])

    numbers = iter(range(len(asks)))

    async def client() -> None:
        for number in numbers:
            await one(number)

    async def arrival(number: int, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await one(number)

    async with asyncio.TaskGroup() as group:
        if isinstance(arrivals, Clients):
            for _ in range(min(arrivals.count, len(asks))):
                group.create_task(client())
        else:
            for number, seconds in enumerate(arrivals.due(len(asks))):
                group.create_task(arrival(number, seconds))
    return [answers[number] for number in range(len(asks))]
