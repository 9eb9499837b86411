"""Checkpoints of a run: asynchronous, atomic, and restored onto any mesh.

A run directory holds `checkpoints/<step>/`: `state/` with a zarr3 for every array and `about/` with a JSON
(format, cursor, and the name, shape and dtype of each array). Orbax makes and commits the directories.
A checkpoint is complete when its commit marker is there, on every kind of storage: Orbax writes the marker
last, and retention removes it first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from mosaicjax import processes, storage
from mosaicjax.checkpoint_arrays import ArraysHandler, Stream, open_saved, reading_context
from mosaicjax.errors import InputError

FORMAT = 1

_STATE, _ABOUT = "state", "about"
# Names that Orbax 0.12 gives on disk, and keeps for compatibility.
_MARKER, _JSON, _UNFINISHED = "commit_success.txt", "data.json", ".orbax-checkpoint-tmp"
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class ArrayInfo:
    """Shape and dtype of one saved array."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class About:
    """What a checkpoint says of itself."""

    format: int
    cursor: dict[str, Any]
    arrays: dict[str, ArrayInfo]


def checkpoints_dir(run_dir: storage.PathLike) -> str:
    """Where a run keeps its checkpoints."""
    root = run_dir if storage.is_remote(run_dir) else storage.local(run_dir)
    return storage.join(root, "checkpoints")


def complete_steps(run_dir: storage.PathLike) -> list[int]:
    """The steps of a run's complete checkpoints, ascending.

    Raises:
        InputError: the directory cannot be listed.
    """
    root = checkpoints_dir(run_dir)
    steps = (int(name) for name in storage.list_dir(root) if name.isdecimal())
    return sorted(step for step in steps if storage.exists(storage.join(root, str(step), _MARKER)))


def read_about(run_dir: storage.PathLike, step: int) -> About:
    """Read a checkpoint's cursor and its list of arrays, without the arrays.

    Raises:
        InputError: there is no complete checkpoint of this step, or a newer version wrote it.
    """
    path = storage.join(checkpoints_dir(run_dir), str(step))
    if not storage.exists(storage.join(path, _MARKER)):
        raise InputError(
            f"no complete checkpoint of step {step} in {storage.join(run_dir)}",
            expected=f"one of {complete_steps(run_dir)}",
        )
    saved = json.loads(storage.read_text(storage.join(path, _ABOUT, _JSON)))
    if saved["format"] > FORMAT:
        raise InputError(
            f"{path} was written by a newer mosaicjax",
            expected=f"checkpoint format {FORMAT} or older",
            got=saved["format"],
            fix="upgrade mosaicjax",
        )
    arrays = {name: ArrayInfo(tuple(shape), dtype) for name, (shape, dtype) in saved["arrays"].items()}
    return About(saved["format"], saved["cursor"], arrays)


def restore_params(
    run_dir: storage.PathLike,
    step: int,
    abstract: Any,
    *,
    field: str = "params",
    before: str = "",
    cast: bool = False,
) -> Any:
    """Restore one field of the saved state alone, or with an empty name all of it; nothing else is read.

    An array that the field `before` has too is read from there. With `cast`, arrays saved in another dtype
    are turned into the one asked for; else they are refused.

    `abstract` is that field's pytree of `jax.ShapeDtypeStruct`, each with the sharding wanted. In a job of
    several processes all of them call it.

    Raises:
        InputError: there is no such checkpoint, or it holds other weights than these.
    """
    path = storage.join(checkpoints_dir(run_dir), str(step))
    wanted = {name: _abstract(leaf) for name, leaf in _named(abstract, field).items()}
    with processes.refused_by_all(f"reading {path}"):
        saved = read_about(run_dir, step).arrays
        names = {own: other if (other := own.replace(field, before, 1)) in saved else own for own in wanted}
        if field:
            saved = {name: info for name, info in saved.items() if f"{name}.".startswith(f"{field}.")}
        for name in [name for name in saved if cast and name in wanted]:
            saved[name] = ArrayInfo(saved[name].shape, wanted[name].dtype.name)
        _compare(path, wanted, saved)
    with _context(path), _one_line(f"cannot restore {path}", path):
        restored = ocp.load_checkpointables(path, {_STATE: {names[own]: wanted[own] for own in wanted}})[
            _STATE
        ]
    return jax.tree.unflatten(jax.tree.structure(abstract), [restored[names[name]] for name in wanted])


class Saved:
    """The arrays of one checkpoint, read by slices on the host, without a device."""

    def __init__(self, run_dir: storage.PathLike, step: int) -> None:
        """Nothing is read yet."""
        self.step = step
        self._folder = storage.join(checkpoints_dir(run_dir), str(step), _STATE)
        self._context = reading_context()
        self._opened: dict[str, Any] = {}

    def read(self, name: str, index: tuple[Any, ...]) -> Callable[[], np.ndarray]:
        """Begin to read a slice of an array; calling what is returned waits for it.

        Raises:
            InputError: it is not there, or (when waited for) cannot be read.
        """
        if name not in self._opened:
            self._opened[name] = open_saved(self._folder, name, self._context)
        under_way = self._opened[name][index].read()

        def wait() -> np.ndarray:
            try:
                read: np.ndarray = under_way.result()
            except (ValueError, OSError) as error:
                raise InputError(f"cannot read {self._folder}: {name}: {storage.one_line(error)}") from error
            return read

        return wait


class Checkpoints:
    """The checkpoints of one run; in a job of several processes each has one and makes the same calls.

    `keep` newest are kept, and of the older ones those whose step is a multiple of `keep_every`.
    """

    def __init__(self, run_dir: storage.PathLike, *, keep: int = 3, keep_every: int | None = None) -> None:
        """Nothing is read or written yet.

        Raises:
            InputError: `keep` or `keep_every` is below 1.
        """
        for name, value in (("keep", keep), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise InputError(f"wrong {name} of checkpoints", expected="at least 1", got=value)
        self.run_dir = run_dir
        self._root = checkpoints_dir(run_dir)
        self._keep, self._keep_every = keep, keep_every
        self._pending: tuple[str, ocp.AsyncResponse[None]] | None = None
        self._prepared = False

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        return complete_steps(self.run_dir)

    def latest(self) -> int | None:
        """The newest complete checkpoint's step; None before the first."""
        return max(self.steps(), default=None)

    def cursor(self, step: int) -> dict[str, Any]:
        """The cursor saved with a checkpoint.

        Raises:
            InputError: there is no such checkpoint, or a newer version wrote it.
        """
        return read_about(self.run_dir, step).cursor

    def save(self, step: int, state: Any, cursor: Mapping[str, Any]) -> None:
        """Copy the state to the host and return; it is written and committed in the background.

        A save still running is waited for first: none is ever skipped. The state may be donated to the
        next train step as soon as this returns. Leaves that are no global arrays (Python numbers, host
        arrays) are saved as replicated ones and must be equal on every process.

        Raises:
            InputError: the previous save failed, the step is saved already, or the store refuses.
        """
        self.wait()
        with processes.refused_by_all(f"saving step {step}"):
            if processes.current().primary:
                self._prepare(step)
        arrays = _as_global(_named(state))
        listed = {name: [value.shape, value.dtype.name] for name, value in arrays.items()}
        # Through JSON and back: what cannot be written shows here, not in the background.
        about = json.loads(json.dumps({"format": FORMAT, "cursor": dict(cursor), "arrays": listed}))
        path = storage.join(self._root, str(step))
        with _context(self._root), _one_line(f"cannot save {path}", path):
            response = ocp.save_checkpointables_async(path, {_STATE: arrays, _ABOUT: about})
        self._pending = (path, response)

    def write(self, step: int, stream: Stream, cursor: Mapping[str, Any]) -> None:
        """Save arrays that are made while they are written, and return when they are committed.

        Raises:
            InputError: as `save`, or what stops a block from being made.
        """
        self.wait()
        with processes.refused_by_all(f"saving step {step}"):
            if processes.current().primary:
                self._prepare(step)
        listed = {name: [array.shape, array.dtype.name] for name, array in stream.arrays.items()}
        about = json.loads(json.dumps({"format": FORMAT, "cursor": dict(cursor), "arrays": listed}))
        path = storage.join(self._root, str(step))
        with _context(self._root), _one_line(f"cannot save {path}", path):
            ocp.save_checkpointables(path, {_STATE: stream, _ABOUT: about})

    def wait(self) -> None:
        """Wait until no save is running, and remove what retention no longer keeps.

        Raises:
            InputError: the save failed; earlier checkpoints are untouched.
        """
        if self._pending is None:
            return
        (path, response), self._pending = self._pending, None
        try:
            with _one_line(f"cannot save {path}", path):
                response.result()
        except InputError:
            # What the failed save left may be what fills the disk: the next save clears it away first.
            self._prepared = False
            raise
        if processes.current().primary:
            self._retain()

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Restore the whole state onto the shardings asked for, whatever mesh it was saved from.

        `abstract_state` is the state's pytree with `jax.ShapeDtypeStruct` leaves, each with its sharding.

        Raises:
            InputError: there is no such checkpoint, or its names, shapes or dtypes differ from these.
        """
        self.wait()
        return restore_params(self.run_dir, step, abstract_state, field="")

    def close(self) -> None:
        """Wait for the running save.

        Raises:
            InputError: it failed.
        """
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except InputError:
            # The block's own exception is the cause; a failed save must not take its place.
            if error is None:
                raise

    def _retain(self) -> None:
        steps = self.steps()
        for step in steps[: -self._keep]:
            if self._keep_every is None or step % self._keep_every:
                path = storage.join(self._root, str(step))
                storage.remove_tree(storage.join(path, _MARKER))
                storage.remove_tree(path)

    def _prepare(self, step: int) -> None:
        """See that the step can be saved, and at the first save remove what killed processes left."""
        complete = self.steps()
        if step in complete:
            raise InputError(f"step {step} is saved already in {self._root}", fix="save each step once")
        if self._prepared:
            return
        # Orbax would make a missing bucket: a misspelt name must not become a bill.
        storage.check_writable(self._root)
        for name in storage.list_dir(self._root):
            if name.endswith(_UNFINISHED) or (name.isdecimal() and int(name) not in complete):
                storage.remove_tree(storage.join(self._root, name))
        self._prepared = True


def _context(path: str) -> ocp.Context:
    """Orbax's options: our handler for arrays; on object stores a marker for want of an atomic rename."""
    context = ocp.Context()
    if storage.is_remote(path):
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    registry = ocp.handlers.local_registry(include_global_registry=False)
    registry.add(ArraysHandler, checkpointable_name=_STATE)
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=_ABOUT)
    context.checkpointables_options.registry = registry
    # Orbax lists through fsspec's shared instances, which would not see what other processes wrote.
    storage.forget_listings(path)
    return context


@contextlib.contextmanager
def _one_line(what: str, path: str) -> Iterator[None]:
    """Turn what Orbax and TensorStore raise about a store into the one line a user reads."""
    try:
        yield
    except InputError:
        raise
    except storage.failures(path) as error:
        raise InputError(f"{what}: {storage.one_line(error)}") from error
    except KeyError as error:
        # Orbax wraps whatever a handler raises while loading in a KeyError that prints all shardings.
        cause = error.__cause__
        if isinstance(cause, InputError):
            raise cause from error
        if isinstance(cause, storage.failures(path)):
            raise InputError(f"{what}: {storage.one_line(cause)}") from error
        raise


def _named(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a pytree by its dotted path, such as `params.block.wq`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    full = [".".join(part for part in (prefix, name) if part) for name in names]
    assert len(set(full)) == len(full), "two leaves of the state share a name"
    return dict(zip(full, (leaf for _, leaf in leaves), strict=True))


def _as_global(leaves: dict[str, Any]) -> dict[str, jax.Array]:
    """Make every leaf an array over all processes; what is none yet becomes a replicated one."""
    shardings = (leaf.sharding for leaf in leaves.values() if isinstance(leaf, jax.Array))
    mesh = next((each.mesh for each in shardings if isinstance(each, NamedSharding)), None)
    several = processes.current().count > 1

    def convert(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and not (several and leaf.is_fully_addressable):
            return leaf
        if mesh is None:
            assert not several, "no leaf of the state lies on a mesh"
            return jnp.asarray(leaf)
        value = np.asarray(leaf, _abstract(leaf).dtype)
        return jax.make_array_from_callback(
            value.shape, NamedSharding(mesh, PartitionSpec()), lambda index: value[index]
        )

    return {name: convert(leaf) for name, leaf in leaves.items()}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """A leaf's shape, dtype and sharding; Python numbers count as jax would make them."""
    shaped = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        assert processes.current().count == 1, "in a job of several processes every leaf needs a sharding"
        sharding = SingleDeviceSharding(jax.devices()[0])
    dtype = jax.dtypes.canonicalize_dtype(shaped.dtype)
    return jax.ShapeDtypeStruct(shaped.shape, dtype, sharding=sharding)


def _compare(path: str, wanted: dict[str, jax.ShapeDtypeStruct], saved: dict[str, ArrayInfo]) -> None:
    """Refuse a checkpoint of another model in one line; Orbax would print every array it holds."""
    expected = {name: str(ArrayInfo(leaf.shape, leaf.dtype.name)) for name, leaf in wanted.items()}
    found = {name: str(info) for name, info in saved.items()}
    differing = [name for name in dict.fromkeys([*expected, *found]) if expected.get(name) != found.get(name)]
    if differing:
        shown = differing[:_SHOWN]
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise InputError(
            f"checkpoint {path} holds other arrays than this program needs: {', '.join(shown)}{more}",
            expected=", ".join(expected.get(name, "no such array") for name in shown),
            got=", ".join(found.get(name, "no such array") for name in shown),
        )
