"""A foreign model's weights, read slice by slice: onto a mesh, or into the arrays of a checkpoint."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaicjax import processes
from mosaicjax.checkpoint_arrays import Block, Stream, Streamed, chunk_shape
from mosaicjax.errors import InputError
from mosaicjax.host_memory import own_pages
from mosaicjax.hub.foreign_dir import ForeignModel
from mosaicjax.hub.stored import cast, copy_into, numpy_dtype
from mosaicjax.models.names import Piece
from mosaicjax.spec import DtypeName

FIELD = "trainable"
"""The field of a checkpoint that holds the weights, frozen ones too."""

USED = "evaluated"
"""The field that holds, of some or all weights, what a model is used with instead: averages, for one."""


def array_name(leaf: str, arrays: Collection[str] = ()) -> str:
    """What a checkpoint calls a weight; where it has these `arrays`, the one that the model is used with."""
    used = ".".join([USED, *leaf.split("/")])
    return used if used in arrays else ".".join([FIELD, *leaf.split("/")])


def stream(model: ForeignModel, dtype: DtypeName) -> Stream:
    """A model's weights as the arrays of a checkpoint; each process makes its share of the blocks."""
    params, dims = dict(model.spec.items()), model.spec.dims
    leading = {piece.leaf: len(piece.index) for foreign, _ in model.tensors for piece in foreign.pieces}
    kind = numpy_dtype(dtype)
    arrays: dict[str, Streamed] = {}
    for leaf, param in params.items():
        shape = param.shape(dims)
        arrays[array_name(leaf)] = Streamed(shape, kind, chunk_shape(shape, kind.itemsize, leading[leaf]))
    here = processes.current()

    def blocks() -> Iterator[Block]:
        for foreign, stored in itertools.islice(model.tensors, here.index, None, here.count):
            with stored.open() as array:
                for piece in foreign.pieces:
                    name = array_name(piece.leaf)
                    view = foreign.view(array, piece)
                    for place in _grid(view.shape, arrays[name].chunk[len(piece.index) :]):
                        block = _ordered(view[place], kind, f"{stored.file}: tensor {stored.name}")
                        first = tuple(slice(i, i + 1) for i in piece.index)
                        yield name, (*first, *place), block[(None,) * len(first)]

    return Stream(arrays, blocks)


def _grid(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Places of the chunks that make up a shape."""
    steps = (range(0, size, step) for size, step in zip(shape, chunk, strict=True))
    for corner in itertools.product(*steps):
        yield tuple(slice(at, at + step) for at, step in zip(corner, chunk, strict=True))


def _ordered(view: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """A copy of a view in its own axes' order and another dtype."""
    block = np.empty(view.shape, dtype)
    copy_into(block, cast(view, dtype, where))
    return block


def load(model: ForeignModel, abstract: Any) -> Any:
    """A model's weights on a mesh; each process reads its devices' slices, of one tensor at a time.

    `abstract` is the tree of `jax.ShapeDtypeStruct` wanted, each with its `NamedSharding`. Every weight lies
    on its devices from the beginning and is filled in place: the host holds one mapped tensor and two blocks.

    Raises:
        InputError: the model's weights are others than these, or a file cannot be read.
    """
    leaves = [leaf for leaf, _ in model.spec.items()]
    wanted = jax.tree.leaves(abstract)
    shapes = [param.shape(model.spec.dims) for _, param in model.spec.items()]
    if [leaf.shape for leaf in wanted] != shapes:
        raise InputError(
            f"{model.path} holds a model of another shape",
            expected=[leaf.shape for leaf in wanted],
            got=shapes,
        )
    places = dict(zip(leaves, wanted, strict=True))
    with own_pages() as give_back:
        memory = _Blocks()
        filled = {leaf: _zeros(place.shape, place.dtype, place.sharding)() for leaf, place in places.items()}
        for foreign, stored in model.tensors:
            with stored.open() as array:
                for piece in foreign.pieces:
                    view, place = foreign.view(array, piece), places[piece.leaf]
                    where = f"{stored.file}: tensor {stored.name}"
                    shard = place.sharding.shard_shape(place.shape)
                    leading = len(piece.index)
                    fill = _fill(place.sharding, everywhere=shard[:leading] == place.shape[:leading])
                    for update in _updates(view, piece, place, where, memory):
                        filled[piece.leaf], done = fill(filled[piece.leaf], *update)
                        del update
                        memory.taken(done)
            give_back()
        jax.block_until_ready(filled)
    return jax.tree.unflatten(jax.tree.structure(abstract), [filled[leaf] for leaf in leaves])


@lru_cache(maxsize=256)
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> Any:
    """A function that makes an array of zeros on its devices; compiled once for all layers alike."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@lru_cache(maxsize=64)
def _fill(sharding: NamedSharding, everywhere: bool) -> Any:
    """A function that puts every device's block into its shard, in place, and leaves alone who has none.

    `everywhere` says that every device has one.
    """
    whole, each = sharding.spec, P(sharding.mesh.axis_names)

    def fill(buffer: Array, block: Array, start: Array, held: Array) -> tuple[Array, Array]:
        at = [start[0, i] for i in range(buffer.ndim)]
        if not everywhere:
            before = jax.lax.dynamic_slice(buffer, at, block.shape)
            block = jnp.where(held[0], block, before)
            return jax.lax.dynamic_update_slice(buffer, block, at), held
        # As integers: on CPU, XLA moves 16-bit floats one by one through 32 bits.
        bits = jnp.dtype(f"uint{8 * buffer.dtype.itemsize}")
        whole_bits = jax.lax.bitcast_convert_type(buffer, bits)
        block_bits = jax.lax.bitcast_convert_type(block, bits)
        filled = jax.lax.dynamic_update_slice(whole_bits, block_bits, at)
        return jax.lax.bitcast_convert_type(filled, buffer.dtype), held

    shard = partial(jax.shard_map, mesh=sharding.mesh, check_vma=False)
    mapped = shard(fill, in_specs=(whole, whole, each, each), out_specs=(whole, each))
    return jax.jit(mapped, donate_argnums=0)


class _Blocks:
    """Memory of blocks, to be used again once a device has taken them: new pages cost more than a copy."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._used: list[np.ndarray] = []
        self._lent: list[np.ndarray] = []
        self._waiting: Array | None = None

    def new(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with anything in it."""
        nbytes = math.prod(shape) * dtype.itemsize
        fitting = next((i for i, memory in enumerate(self._free) if memory.size >= nbytes), None)
        memory = np.empty(nbytes, np.uint8) if fitting is None else self._free.pop(fitting)
        self._used.append(memory)
        return memory[:nbytes].view(dtype).reshape(shape)

    def taken(self, done: Array) -> None:
        """What was given out is with the devices until `done` is there; wait for what was before it.

        So the next blocks are made while the devices take these.
        """
        if self._waiting is not None:
            jax.block_until_ready(self._waiting)
        self._free, self._lent, self._used = self._free + self._lent, self._used, []
        self._waiting = done


def _updates(
    view: np.ndarray, piece: Piece, place: jax.ShapeDtypeStruct, where: str, memory: _Blocks
) -> Iterator[tuple[Array, Array, Array]]:
    """For each chunk of the shards: all devices' blocks, where they begin in a shard, and who has one."""
    sharding, mesh = place.sharding, place.sharding.mesh
    shard = sharding.shard_shape(place.shape)
    leading = len(piece.index)
    parts = tuple(whole // mine for whole, mine in zip(place.shape, shard, strict=True))
    # The blocks of all shards of this process together are no larger than one chunk.
    local = -(-math.prod(parts) // processes.current().count)
    chunk = chunk_shape(shard, place.dtype.itemsize * local, leading)
    shape = tuple(size * count for size, count in zip(chunk, parts, strict=True))
    devices = sharding.addressable_devices_indices_map(place.shape)
    each = NamedSharding(mesh, P(mesh.axis_names))
    numbers = {device: i for i, device in enumerate(mesh.devices.flat)}
    for corner in _grid(shard[leading:], chunk[leading:]):
        made: dict[str, np.ndarray] = {}
        blocks = []
        start, held = np.zeros((len(numbers), len(shard)), np.int32), np.zeros(len(numbers), bool)
        for device, index in devices.items():
            begins = [part.indices(size)[0] for part, size in zip(index, place.shape, strict=True)]
            inner = [at - begin for at, begin in zip(piece.index, begins, strict=False)]
            mine = all(0 <= at < size for at, size in zip(inner, shard, strict=False))
            if str(index) not in made:
                theirs = zip(begins[leading:], corner, strict=True)
                cut = tuple(slice(begin + part.start, begin + part.stop) for begin, part in theirs)
                made[str(index)] = block = memory.new(chunk, place.dtype)
                if mine:
                    copy_into(block[(0,) * leading], cast(view[cut], place.dtype, where))
            if mine:
                start[numbers[device]] = [*inner, *(part.start for part in corner)]
                held[numbers[device]] = True
            blocks.append(jax.device_put(made[str(index)], device))
        whole = jax.make_array_from_single_device_arrays(shape, sharding, blocks)
        yield whole, _global(start, each), _global(held, each)


def _global(value: np.ndarray, sharding: NamedSharding) -> Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
