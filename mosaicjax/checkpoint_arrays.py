"""The arrays of a checkpoint, below the directory that Orbax makes and commits.

Each array is a zarr3 of its own, each shard in chunks of its own, written through TensorStore by the
processes that hold the shards. Orbax's own array handler is not used: it has no driver for S3, and where one
of several processes cannot write, the others wait for it for twenty minutes. Here they tell each other how it
went before the commit marker may be written, so a checkpoint with a shard missing is never committed.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np
import tensorstore as ts

from mosaicjax import processes, storage
from mosaicjax.errors import InputError

# Arrays in flight at a time: enough to hide the latency of a store, few enough to bound host memory.
_READS_AT_ONCE = 16
# Blocks on their way to the disk while the next one is made.
_WRITES_AT_ONCE = 3
# How much later than the fastest process the slowest may finish its shards.
_SLOWEST_PROCESS_SECONDS = 1200.0

CHUNK_BYTES = 32 * 2**20
"""A chunk is no larger where its shard can be cut: what reads a slice of an array holds little beside it."""

Block = tuple[str, tuple[slice, ...], np.ndarray]
"""Name of an array, a place in it that is made of whole chunks, and what it holds there."""


@dataclass(frozen=True)
class Streamed:
    """An array that is written block by block."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]


@dataclass(frozen=True)
class Stream:
    """Arrays that are made while they are written; `blocks` gives this process's part of them."""

    arrays: Mapping[str, Streamed]
    blocks: Callable[[], Iterator[Block]]


def chunk_shape(shard: tuple[int, ...], itemsize: int, leading: int = 0) -> tuple[int, ...]:
    """What chunks a shard is cut into, evenly, from the first dim on; `leading` dims into single slices."""
    chunk = [1 if i < leading else max(1, size) for i, size in enumerate(shard)]
    for i, size in enumerate(chunk):
        rest = math.prod(chunk[i + 1 :]) * itemsize
        if size * rest > CHUNK_BYTES:
            fitting = max(1, CHUNK_BYTES // rest)
            chunk[i] = next(rows for rows in range(min(fitting, size), 0, -1) if size % rows == 0)
    return tuple(chunk)


class ArraysHandler:
    """An Orbax `CheckpointableHandler` for a flat mapping, name -> array, or a `Stream`, on any storage."""

    async def save(self, directory: Any, checkpointable: Mapping[str, jax.Array] | Stream) -> Awaitable[None]:
        """Copy this process's shards to the host now; the returned awaitable writes them.

        Of a stream nothing is made before that, and then a few blocks at a time.
        """
        if isinstance(checkpointable, Stream):
            return self._write_stream(directory, checkpointable)
        for value in checkpointable.values():
            value.copy_to_host_async()
        # The train step may reuse the buffers of its state as soon as this returns: so a real copy.
        shards = {
            name: [
                (shard.index, np.array(shard.data))
                for shard in value.addressable_shards
                if shard.replica_id == 0
            ]
            for name, value in checkpointable.items()
        }
        specs = {name: _array_spec(value) for name, value in checkpointable.items()}
        return self._write(directory, specs, shards)

    async def _write(self, directory: Any, specs: dict[str, Any], shards: dict[str, Any]) -> None:
        path = str(await directory.await_creation())
        with _Outcome(f"write {path}") as outcome:
            # One context: one set of connections and credentials for all arrays.
            context = ts.Context()
            await _all(_write_array(path, name, specs[name], shards[name], context) for name in specs)
        await outcome.agree()

    async def _write_stream(self, directory: Any, stream: Stream) -> None:
        path = str(await directory.await_creation())
        with _Outcome(f"write {path}") as outcome:
            context = ts.Context()
            specs = {
                name: _zarr_spec(array.shape, array.dtype, array.chunk)
                for name, array in stream.arrays.items()
            }
            opened = {name: await _open_to_write(path, name, spec, context) for name, spec in specs.items()}
            under_way: deque[Any] = deque()
            for name, index, data in stream.blocks():
                # Its maker may use the block's memory again only when it is written; each block has its own.
                under_way.append(opened[name][index].write(data, can_reference_source_data_indefinitely=True))
                if len(under_way) >= _WRITES_AT_ONCE:
                    await under_way.popleft()
            await _all(under_way)
        await outcome.agree()

    async def load(
        self, directory: Any, abstract_checkpointable: Mapping[str, jax.ShapeDtypeStruct] | None = None
    ) -> Awaitable[dict[str, jax.Array]]:
        """Read the named arrays, each process the shards it holds."""
        assert abstract_checkpointable is not None
        return self._read(str(directory), abstract_checkpointable)

    async def _read(self, path: str, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        arrays: dict[str, jax.Array] = {}
        with _Outcome(f"read {path}") as outcome:
            arrays = await _read_arrays(path, abstract)
        await outcome.agree()
        return arrays

    async def metadata(self, directory: Any) -> None:
        """Nothing: names, shapes and dtypes stand in the checkpoint's own JSON."""

    def is_handleable(self, checkpointable: Any) -> bool:
        """Whether this is a flat mapping of arrays, or a stream of them."""
        return isinstance(checkpointable, Mapping | Stream)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool:
        """Whether this is a flat mapping of abstract arrays."""
        return isinstance(abstract_checkpointable, Mapping)


class _Outcome:
    """Whether this process's reads or writes succeeded, to be agreed on with the others."""

    def __init__(self, action: str) -> None:
        self._action = action
        self._error: InputError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        # TensorStore reports what a store refuses as ValueError.
        if isinstance(error, InputError):
            self._error = error
        elif isinstance(error, ValueError | OSError):
            self._error = InputError(f"cannot {self._action}: {storage.one_line(error)}")
            self._error.__cause__ = error
        return self._error is not None

    async def agree(self) -> None:
        """Raise on every process what any of them met.

        Raises:
            InputError: some process met an error.
        """
        await asyncio.to_thread(
            processes.agree,
            self._error,
            self._action,
            channel="checkpoint",
            timeout_seconds=_SLOWEST_PROCESS_SECONDS,
        )


def _array_spec(value: jax.Array) -> dict[str, Any]:
    # Chunks lie within a shard: no two processes ever write the same object.
    shard = value.sharding.shard_shape(value.shape)
    return _zarr_spec(value.shape, value.dtype, chunk_shape(shard, value.dtype.itemsize))


def _zarr_spec(shape: tuple[int, ...], dtype: np.dtype, chunk: tuple[int, ...]) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "metadata": {
            "shape": list(shape),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        # A shard that is all zeros must be an object too: a missing one is then always a loss.
        "store_data_equal_to_fill_value": True,
    }


async def _open_to_write(directory: str, name: str, spec: dict[str, Any], context: ts.Context) -> Any:
    spec = spec | {"kvstore": storage.tensorstore_spec(storage.join(directory, name) + "/")}
    if processes.current().primary:
        await ts.open(ts.Spec(spec), create=True, open=True, context=context)
    return await ts.open(ts.Spec(spec), open=True, assume_metadata=True, context=context)


async def _write_array(
    directory: str, name: str, spec: dict[str, Any], shards: list[tuple[Any, np.ndarray]], context: ts.Context
) -> None:
    array = await _open_to_write(directory, name, spec, context)
    await _all(array[index].write(data) for index, data in shards)


async def _read_arrays(directory: str, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    slots = asyncio.Semaphore(_READS_AT_ONCE)
    context = ts.Context()

    async def read(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        async with slots:
            kvstore = storage.tensorstore_spec(storage.join(directory, name) + "/")
            spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}
            array = await ts.open(spec, open=True, context=context)
            if array.dtype.name != leaf.dtype.name:
                array = ts.cast(array, ts.dtype(leaf.dtype))
            places = leaf.sharding.addressable_devices_indices_map(leaf.shape)
            # Replicas of a shard are read once.
            reads = {str(index): array[index].read() for index in places.values()}
            blocks = dict(zip(reads, await _all(reads.values()), strict=True))
            pieces = [jax.device_put(blocks[str(index)], device) for device, index in places.items()]
            return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, pieces)

    values = await _all(read(name, leaf) for name, leaf in abstract.items())
    return dict(zip(abstract, values, strict=True))


def open_saved(directory: str, name: str, context: ts.Context) -> Any:
    """One array of a checkpoint, to be read by slices; neighbouring slices of a chunk read it once.

    Raises:
        InputError: it cannot be opened.
    """
    kvstore = storage.tensorstore_spec(storage.join(directory, name) + "/")
    spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}
    try:
        return ts.open(spec, open=True, context=context, recheck_cached_data=False).result()
    except (ValueError, OSError) as error:
        raise InputError(f"cannot read {directory}/{name}: {storage.one_line(error)}") from error


def reading_context() -> ts.Context:
    """What `open_saved` shares between the arrays of a checkpoint."""
    return ts.Context({"cache_pool": {"total_bytes_limit": 2 * CHUNK_BYTES}})


async def _all(operations: Iterable[Awaitable[Any]]) -> list[Any]:
    """Wait for every operation and then raise the first failure: none may outlive the event loop."""
    results = await asyncio.gather(*operations, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
