"""The arrays of a checkpoint, below the directory that Orbax makes and commits.

Each array is a zarr3 of its own with one chunk a shard, written through TensorStore by the processes that
hold the shards. Orbax's own array handler is not used: it has no driver for S3, and where one of several
processes cannot write, the others wait for it for twenty minutes. Here they tell each other how it went
before the commit marker may be written, so a checkpoint with a shard missing is never committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any, Self

import jax
import numpy as np
import tensorstore as ts

from mosaicjax import processes, storage
from mosaicjax.errors import InputError

# Arrays in flight at a time: enough to hide the latency of a store, few enough to bound host memory.
_READS_AT_ONCE = 16
# How much later than the fastest process the slowest may finish its shards.
_SLOWEST_PROCESS_SECONDS = 1200.0


class ArraysHandler:
    """An Orbax `CheckpointableHandler` for a flat mapping, name -> array, on any storage."""

    async def save(self, directory: Any, checkpointable: Mapping[str, jax.Array]) -> Awaitable[None]:
        """Copy this process's shards to the host now; the returned awaitable writes them."""
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
        """Whether this is a flat mapping of arrays."""
        return isinstance(checkpointable, Mapping)

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
        if isinstance(error, ValueError | OSError):
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
    # One chunk a shard: no two processes ever write the same object.
    chunk = [max(1, size) for size in value.sharding.shard_shape(value.shape)]
    return {
        "driver": "zarr3",
        "metadata": {
            "shape": list(value.shape),
            "data_type": value.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        # A shard that is all zeros must be an object too: a missing one is then always a loss.
        "store_data_equal_to_fill_value": True,
    }


async def _write_array(
    directory: str, name: str, spec: dict[str, Any], shards: list[tuple[Any, np.ndarray]], context: ts.Context
) -> None:
    spec = spec | {"kvstore": storage.tensorstore_spec(storage.join(directory, name) + "/")}
    if processes.current().primary:
        await ts.open(ts.Spec(spec), create=True, open=True, context=context)
    array = await ts.open(ts.Spec(spec), open=True, assume_metadata=True, context=context)
    await _all(array[index].write(data) for index, data in shards)


async def _read_arrays(directory: str, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    slots = asyncio.Semaphore(_READS_AT_ONCE)
    context = ts.Context()

    async def read(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        async with slots:
            kvstore = storage.tensorstore_spec(storage.join(directory, name) + "/")
            spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}
            array = await ts.open(spec, open=True, context=context)
            places = leaf.sharding.addressable_devices_indices_map(leaf.shape)
            # Replicas of a shard are read once.
            reads = {str(index): array[index].read() for index in places.values()}
            blocks = dict(zip(reads, await _all(reads.values()), strict=True))
            pieces = [jax.device_put(blocks[str(index)], device) for device, index in places.items()]
            return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, pieces)

    values = await _all(read(name, leaf) for name, leaf in abstract.items())
    return dict(zip(abstract, values, strict=True))


async def _all(operations: Iterable[Awaitable[Any]]) -> list[Any]:
    """Wait for every operation and then raise the first failure: none may outlive the event loop."""
    results = await asyncio.gather(*operations, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
