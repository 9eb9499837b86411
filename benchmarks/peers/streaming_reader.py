"""mosaicml-streaming as `benchmarks/data.py` runs it, by a Python of its own: nothing of mosaicjax is there.

    python streaming_reader.py write TOKENS.npy FOLDER --seq 2048 --encoding ndarray:uint16:2048
    python streaming_reader.py read FOLDER --batch 256 --batches 200 --shuffle py1e --workers 0 --resume 0

Rows of `seq` tokens are samples of one column. The result is a line of JSON.
"""

import argparse
import json
import time


def declare():
    """What torchvision, which Streaming imports, looks for where its own build does not fit PyTorch's."""
    import torch

    for name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor"
        )


def write(options):
    declare()
    import numpy as np
    from streaming import MDSWriter

    tokens = np.load(options.tokens, mmap_mode="r")
    rows = len(tokens) // options.seq
    raw = options.encoding == "bytes"
    with MDSWriter(out=options.folder, columns={"tokens": options.encoding}) as writer:
        for row in range(rows):
            window = tokens[row * options.seq : (row + 1) * options.seq]
            writer.write({"tokens": window.tobytes() if raw else np.asarray(window)})
    print(json.dumps({"rows": rows}))


def read(options):
    began = time.perf_counter()
    declare()
    import numpy as np
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    imported = time.perf_counter()
    shuffled = options.shuffle != "none"
    dataset = StreamingDataset(
        local=options.folder,
        batch_size=options.batch,
        shuffle=shuffled,
        shuffle_algo=options.shuffle if shuffled else "py1e",
        num_canonical_nodes=1,
    )
    if options.resume:
        dataset.load_state_dict(
            {
                "epoch": 0,
                "sample_in_epoch": options.resume,
                "num_canonical_nodes": 1,
                "shuffle_seed": 9176,
                "initial_physical_nodes": 1,
            }
        )

    def collate(samples):
        columns = [sample["tokens"] for sample in samples]
        if isinstance(columns[0], bytes):
            columns = [np.frombuffer(column, np.uint16) for column in columns]
        return np.stack(columns)

    def batches():
        if options.workers < 0:
            some = []
            for sample in dataset:
                some.append(sample)
                if len(some) == options.batch:
                    yield collate(some)
                    some = []
        else:
            yield from DataLoader(
                dataset, batch_size=options.batch, num_workers=options.workers, collate_fn=collate
            )

    tokens = count = 0
    for batch in batches():
        if count == 0:
            first = started = time.perf_counter()
        else:
            tokens += batch.size
        count += 1
        if count > options.batches:
            break
    seconds = time.perf_counter() - started
    with open("/proc/self/status") as status:
        # `ru_maxrss` would be the parent's, where that was larger.
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    print(
        json.dumps(
            {
                "first_batch_seconds": first - imported,
                "import_seconds": imported - began,
                "tokens_per_second": tokens / seconds,
                "peak_bytes": peak,
                "samples": len(dataset),
            }
        )
    )


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("write")
    command.add_argument("tokens")
    command.add_argument("folder")
    command.add_argument("--seq", type=int, required=True)
    command.add_argument("--encoding", required=True)
    command.set_defaults(run=write)
    command = commands.add_parser("read")
    command.add_argument("folder")
    command.add_argument("--batch", type=int, required=True)
    command.add_argument("--batches", type=int, required=True)
    command.add_argument("--shuffle", required=True)
    command.add_argument("--workers", type=int, required=True)
    command.add_argument("--resume", type=int, default=0)
    command.set_defaults(run=read)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
