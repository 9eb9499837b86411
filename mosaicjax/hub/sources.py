"""A model's weights on the host, block by block, without a device, with adapters added."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import numpy as np

from mosaicjax.adapters import Adapter, is_adapter
from mosaicjax.checkpoint import About, Saved, read_about
from mosaicjax.errors import InputError
from mosaicjax.hub import peft
from mosaicjax.hub.base import ADAPTERS, find_base, read_base
from mosaicjax.hub.foreign_dir import ForeignModel, open_model
from mosaicjax.hub.model_dir import Kind, kind_of, saved_model, saved_recipe
from mosaicjax.hub.read import FIELD, USED, array_name
from mosaicjax.recipe import Recipe
from mosaicjax.spec import Spec, named_leaves

Read = Callable[[], np.ndarray]


class Source(Protocol):
    """Where weights are read from."""

    @property
    def leaves(self) -> Collection[str]:
        """The names of all weights, as in `Spec.items`."""
        ...

    def read(self, leaf: str, index: tuple[Any, ...]) -> Read:
        """Begin to read a block; `index` has a number for each leading dim, then a slice of the next.

        Raises:
            InputError: when the block is waited for and cannot be read.
        """
        ...


def source_of(path: str, step: int) -> Source:
    """The weights of a model's directory; of a run those that it is used with, adapters added.

    `step` is that of its checkpoint, and counts for nothing in a foreign model, which has none.

    Raises:
        InputError: there is no such checkpoint, or what its adapters stand on is not there.
    """
    kind = kind_of(path)
    if kind is Kind.FOREIGN:
        return OfForeign(open_model(path))
    if kind is Kind.ADAPTER:
        base = find_base(peft.base_of(path))
        return WithAdapters(source_of(base.path, base.step), peft.read_adapters(path, saved_model(path)))
    about = read_about(path, step)
    if not holds_adapters(about):
        return OfCheckpoint(path, step, about)
    base = read_base(path)
    return WithAdapters(source_of(base.path, base.step), read_adapters(path, step, about))


def holds_adapters(about: About) -> bool:
    """Whether a checkpoint holds adapters, and no other weights."""
    return any(name.startswith(f"{ADAPTERS}.") for name in about.arrays)


def declared_adapters(recipe: Recipe) -> Spec:
    """The adapters that a recipe trains; a tree like its model's."""
    return recipe.last.program()[1].trainable


def read_adapters(path: str, step: int, about: About) -> dict[str, Adapter]:
    """The adapters of a run that it is used with, by their weights' names, as numpy arrays in float32."""
    saved, found = Saved(path, step), {}
    for leaf, declared in named_leaves(declared_adapters(saved_recipe(path)).tree, is_adapter):
        arrays = {}
        for part in ("a", "b"):
            used = array_name(f"{leaf}/{part}", about.arrays)
            name = used if used.startswith(f"{USED}.") else used.replace(FIELD, ADAPTERS, 1)
            if name not in about.arrays:
                raise InputError(
                    f"checkpoint {step} of {path} lacks adapters of its recipe", got=f"no {name}"
                )
            arrays[part] = saved.read(name, (Ellipsis,))().astype(np.float32)
        found[leaf] = Adapter(arrays["a"], arrays["b"], declared.scale, declared.summed)
    return found


class OfCheckpoint:
    """The weights of a run or of an imported model."""

    def __init__(self, path: str, step: int, about: About) -> None:
        self._saved, self._arrays = Saved(path, step), about.arrays
        begin = array_name("")
        names = [name.removeprefix(begin) for name in about.arrays if name.startswith(begin)]
        self.leaves: Collection[str] = {name.replace(".", "/") for name in names}

    def read(self, leaf: str, index: tuple[Any, ...]) -> Read:
        """See `Source.read`."""
        return self._saved.read(array_name(leaf, self._arrays), index)


class OfForeign:
    """The weights of a directory in Hugging Face's format."""

    def __init__(self, model: ForeignModel) -> None:
        self._places = {
            (piece.leaf, piece.index): (foreign, stored, piece)
            for foreign, stored in model.tensors
            for piece in foreign.pieces
        }
        self.leaves: Collection[str] = {leaf for leaf, _ in self._places}

    def read(self, leaf: str, index: tuple[Any, ...]) -> Read:
        """See `Source.read`."""

        def wait() -> np.ndarray:
            foreign, stored, piece = self._places[leaf, index[:-1]]
            with stored.open() as array:
                return np.array(foreign.view(array, piece)[index[-1]])

        return wait


class WithAdapters:
    """The weights of another source, with adapters added in float32."""

    def __init__(self, base: Source, adapters: Mapping[str, Adapter]) -> None:
        self._base, self._adapters = base, adapters
        self.leaves = base.leaves

    def read(self, leaf: str, index: tuple[Any, ...]) -> Read:
        """See `Source.read`."""
        under_way = self._base.read(leaf, index)
        adapter = self._adapters.get(leaf)
        if adapter is None:
            return under_way
        a, b = adapter.a[index], adapter.b[index[:-1]]

        def wait() -> np.ndarray:
            return under_way().astype(np.float32) + np.float32(adapter.scale) * np.tensordot(a, b, axes=1)

        return wait
