"""The arrays of a store: zarr3, sharded, every chunk with a checksum, here or on an object store."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mosaicjax import storage

TOKENS, DOCUMENTS = "tokens", "documents"
"""The arrays of a split."""
LOSS = "loss"
"""Where not every token bears loss: 1 for those that do, as long as the tokens."""
CHUNK_TOKENS = 65_536
CHUNK_DOCUMENTS = 8_192
SHARD_DOCUMENTS = 2**20
BLOCK_CHUNKS = 4
"""So many chunks of a remote array are kept together on this machine's disk."""
RETRIES = {"max_retries": 120, "initial_delay": "500ms", "max_delay": "5s"}


def token_dtype(vocabulary: int) -> str:
    """Return the smaller of uint16 and uint32 that holds every id below `vocabulary`."""
    return "uint16" if vocabulary <= 2**16 else "uint32"


def create_array(folder: Path, *, dtype: str, shape: Sequence[int], shard: int, chunk: int) -> Any:
    """Create a zarr3 array, or open the one there of the same kind, and return it open.

    It is sharded along its first axis; the inner chunks are raw, each with a CRC-32C.

    Raises: OSError where the disk takes no more.
    """
    import tensorstore

    rest = list(shape[1:])
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [chunk, *rest],
        "codecs": checked,
        "index_codecs": checked,
        "index_location": "end",
    }
    spec = _spec(folder) | {
        # a chunk of nothing but the fill value lies on the disk too: its absence is damage
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": list(shape),
            "data_type": dtype,
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard, *rest]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }
    with writing():
        return tensorstore.open(spec, create=True, open=True).result()


def write_shard_of(folder: Path, first: int, tokens: np.ndarray) -> None:
    """Write one whole shard, from position `first` on, into an array that exists.

    Raises: OSError where the disk takes no more.
    """
    import tensorstore

    spec = _spec(folder) | {"store_data_equal_to_fill_value": True}
    with writing():
        array = tensorstore.open(spec, open=True).result()
        array[first : first + len(tokens)].write(tokens).result()


@contextmanager
def writing() -> Iterator[None]:
    """Have what TensorStore says of a disk that takes no more as the error that it is.

    Raises: OSError.
    """
    try:
        yield
    except ValueError as error:
        found = re.search(r"os_error_code='(\d+)'", str(error))
        if found is None:
            raise
        code, said = int(found.group(1)), str(error).split(" [os_error_code=")[0]
        raise OSError(code, f"{os.strerror(code)} ({said})") from error


def open_array(folder: storage.PathLike) -> Any:
    """Begin to open an array for reading; nothing of it is kept in memory.

    A request that a remote store does not answer is repeated, after a second at first and then after twice
    as long each time, for some ten minutes. The result's `result()` waits.
    """
    import tensorstore

    spec = _spec(folder) | {
        "fill_missing_data_reads": False,
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
    }
    context = tensorstore.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "s3_request_retries": RETRIES,
            "gcs_request_retries": RETRIES,
        }
    )
    return tensorstore.open(spec, context=context, open=True, read=True)


def shard_file(folder: Path | str, number: int, axes: int = 1) -> Path:
    """Return the file that holds a shard of an array of so many axes."""
    return Path(folder, "c", str(number), *["0"] * (axes - 1))


def _spec(folder: storage.PathLike) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": storage.tensorstore_spec(f"{folder}/")}
