"""One process of a job that trains: `train_worker.py <case> <recipe> <out> <coordinator> <count> <index>`."""

import sys
import time

from mosaicjax import processes, recipe_file
from mosaicjax.errors import Diverged, InputError


class Unreadable:
    """A stream whose batches from a step on cannot be read."""

    def __init__(self, stream, step):
        self._stream, self._step = stream, step

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def rows(self, step, rows):
        if step >= self._step:
            raise InputError("shard c/7 is damaged")
        return self._stream.rows(step, rows)


def main() -> None:
    case, recipe, out, coordinator, count, index = sys.argv[1:]
    processes.start(coordinator, int(count), int(index))
    from dataclasses import replace

    from mosaicjax.report.live import LiveLine
    from mosaicjax.run import prepare
    from mosaicjax.train import train

    options = ["--steps", "20", "--save.every", "0", "--eval.every", "0"]
    ready = prepare(recipe_file.load(recipe, options), out, lambda text: None)
    if case == "unreadable" and index == "1":
        stream = Unreadable(ready.data.stream, 5)
        ready = replace(ready, data=replace(ready.data, stream=stream))
    train(ready, started=time.time(), say=lambda text: None, line=LiveLine(sys.stdout, time.monotonic))


if __name__ == "__main__":
    try:
        main()
    except (InputError, Diverged) as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(2 if isinstance(refusal, InputError) else 1)
