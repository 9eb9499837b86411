"""Trains a recipe and says nothing of it: `recipe_worker.py RECIPE OUT OPTIONS...`."""

import sys
import time

from mosaicjax import recipe_file
from mosaicjax.report.live import LiveLine
from mosaicjax.run import prepare
from mosaicjax.train import train


def main() -> None:
    recipe, out, *options = sys.argv[1:]
    ready = prepare(recipe_file.load(recipe, options), out, lambda text: None)
    line = LiveLine(sys.stdout, time.monotonic)
    train(ready, started=time.time(), say=lambda text: None, line=line, profile=None)


if __name__ == "__main__":
    main()
