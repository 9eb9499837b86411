"""Our stream as `benchmarks/data.py` runs it: what `mosaicjax train` reads, without the training.

    python stream_reader.py STORE... --seq 2048 --batch 256 --batches 200 --step 0

Several stores are domains of equal shares. `--bare-rows N` takes a folder of an array alone, as the benchmark
writes where no corpus would be long enough. The result is a line of JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mosaicjax.data.manifest import Counts  # noqa: E402 after the path
from mosaicjax.data.mixture import Domain, Mixture, TokenStore  # noqa: E402
from mosaicjax.data.rows import Contiguous  # noqa: E402
from mosaicjax.data.store import Split, Store  # noqa: E402
from mosaicjax.data.stream import Drawn, Stream  # noqa: E402


def opened(options):
    """The stream of a recipe's `TokenStore`, or of a `Mixture`."""
    if options.bare_rows:
        tokens = options.bare_rows * options.seq + 1
        split = Split(Path(options.stores[0]), Counts(1, tokens, 0), options.shard_tokens)
        return Stream(
            [Drawn("", Contiguous(split, options.seq), 1)], separator=0, seq=options.seq, **common(options)
        )
    if len(options.stores) == 1:
        data = TokenStore(options.stores[0])
    else:
        data = Mixture(tuple(Domain(f"d{i}", path, 1.0) for i, path in enumerate(options.stores)))
    stores = [Store.open(path) for path in data.stores().values()]
    rows = [Contiguous(store.split("train"), options.seq) for store in stores]
    weights = data.weights([len(each) for each in rows])
    drawn = [Drawn(*each) for each in zip(data.stores(), rows, weights, strict=True)]
    separator = stores[0].manifest.tokenizer.separator
    return Stream(drawn, separator=separator, seq=options.seq, **common(options))


def common(options):
    return {"batch": options.batch, "seed": 0}


def peak_bytes():
    """Resident at most; `ru_maxrss` would be the parent's, where that was larger."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("stores", nargs="+")
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--batches", type=int, required=True)
    parser.add_argument("--step", type=int, default=0)
    parser.add_argument("--bare-rows", type=int, default=0)
    parser.add_argument("--shard-tokens", type=int, default=2**26)
    options = parser.parse_args()
    import tensorstore  # noqa: F401 imports are not counted, nor are the peers'

    began = time.perf_counter()
    stream = opened(options)
    rows = range(options.batch)
    stream.rows(options.step, rows)
    first = time.perf_counter()
    tokens = 0
    for step in range(options.step + 1, options.step + 1 + options.batches):
        tokens += stream.rows(step, rows)["targets"].size
    seconds = time.perf_counter() - first
    print(
        json.dumps(
            {
                "first_batch_seconds": first - began,
                "tokens_per_second": tokens / seconds if tokens else None,
                "peak_bytes": peak_bytes(),
                "rows": stream.rows_per_epoch,
            }
        )
    )


if __name__ == "__main__":
    main()
