"""Random windows of a file of tokens, as `benchmarks/data.py` runs them: numpy alone, no epochs, no resume.

    python memmap_reader.py TOKENS.npy --seq 2048 --batch 256 --batches 200 --form windows

`form`: `windows` are uint16 of seq + 1 tokens; `pairs` are int64 inputs and targets, as nanoGPT has them.
The result is a line of JSON.
"""

import argparse
import json
import time

import numpy as np


def peak_bytes():
    """Resident at most; `ru_maxrss` would be the parent's, where that was larger."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tokens")
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--batches", type=int, required=True)
    parser.add_argument("--form", choices=("windows", "pairs"), required=True)
    options = parser.parse_args()
    began = time.perf_counter()
    tokens = np.load(options.tokens, mmap_mode="r")
    rng = np.random.default_rng(0)

    def batch():
        starts = rng.integers(0, len(tokens) - options.seq, options.batch).tolist()
        if options.form == "windows":
            return np.stack([tokens[start : start + options.seq + 1] for start in starts])
        inputs = np.stack([tokens[start : start + options.seq].astype(np.int64) for start in starts])
        targets = np.stack([tokens[start + 1 : start + options.seq + 1].astype(np.int64) for start in starts])
        return inputs, targets

    batch()
    first = time.perf_counter()
    for _ in range(options.batches):
        batch()
    seconds = time.perf_counter() - first
    print(
        json.dumps(
            {
                "first_batch_seconds": first - began,
                "tokens_per_second": options.batches * options.batch * options.seq / seconds,
                "peak_bytes": peak_bytes(),
            }
        )
    )


if __name__ == "__main__":
    main()
