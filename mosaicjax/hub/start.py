"""Weights to start from, out of any kind of directory with a model, onto the shardings asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaicjax import processes, recipe_file, storage
from mosaicjax.adapters import Adapter, is_adapted, is_adapter, merge
from mosaicjax.checkpoint import read_about, restore_params
from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.errors import InputError
from mosaicjax.hub import peft, tokens
from mosaicjax.hub.base import ADAPTERS, Base, find_base, read_base
from mosaicjax.hub.foreign_dir import is_foreign, open_model, read_configs
from mosaicjax.hub.grow import VOCAB, Growth, grown, growth, shapes_before
from mosaicjax.hub.model_dir import (
    MODEL_JSON,
    TOKENIZER_DIR,
    Kind,
    kind_of,
    newest_step,
    read_imported,
    saved_model,
    saved_recipe,
)
from mosaicjax.hub.read import FIELD, USED, array_name, load
from mosaicjax.hub.sources import declared_adapters, holds_adapters
from mosaicjax.models.family import Family
from mosaicjax.spec import Dtypes, Spec, at_least_float32, join, path_name

NEWEST = -1
"""A run's newest checkpoint."""

_SHOWN = 3


def find_growth(path: str, spec: Spec, new: Tokenizer) -> Growth | None:
    """How the tables of a model's directory grow for the tokens of the data; None where they stay.

    Raises:
        InputError: no model there, or new tokens in another tokenizer than its own with tokens added.
    """
    return growth(_shapes(path, NEWEST), spec, tokenizer(path) if _has_tokenizer(path) else None, new)


def _has_tokenizer(path: str) -> bool:
    match kind_of(path):
        case Kind.RUN:
            return bool(tokens.files_of(storage.join(path, TOKENIZER_DIR)))
        case Kind.IMPORTED:
            return read_imported(path).around is not None
        case Kind.FOREIGN:
            return bool(tokens.files_of(path))
        case Kind.ADAPTER:
            return _has_tokenizer(peft.base_of(path))


def begin(path: str, spec: Spec, grows: Growth | None, abstract: Any, seed: int) -> Any:
    """The weights that a run begins with: those of `weights`, with rows for new tokens.

    Raises:
        InputError: as `weights`.
    """
    if grows is None:
        return weights(path, NEWEST, abstract)
    before = weights(path, NEWEST, shapes_before(spec, grows, abstract))
    return grown(before, spec, grows, abstract, seed)


def check_start(path: str, model: Family, spec: Spec, grows: Growth | None) -> Iterator[str]:
    """Refuse weights of other shapes than a recipe's model has; lines on knobs in which the two differ.

    Raises:
        InputError: no model there, or one of other weights.
    """
    dims = {**spec.dims, VOCAB: grows.before} if grows else spec.dims
    wanted = {name: param.shape(dims) for name, param in spec.items()}
    found = _shapes(path, NEWEST)
    if grows:
        yield str(grows)
    differing = [name for name in dict.fromkeys([*wanted, *found]) if wanted.get(name) != found.get(name)]
    if differing:
        shown = differing[:_SHOWN]
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise InputError(
            f"init_from {path} holds another model than the recipe's: {', '.join(shown)}{more}",
            expected=", ".join(str(wanted.get(name, "no such weight")) for name in shown),
            got=", ".join(str(found.get(name, "no such weight")) for name in shown),
            fix=f'model=model_of("{path}") in the recipe, from mosaicjax.hub',
        )
    theirs = saved_model(path)
    if recipe_file.tag(type(theirs)) != recipe_file.tag(type(model)):
        kinds = f"{type(theirs).__module__}, the recipe's model of {type(model).__module__}"
        yield f"init_from {path} is of {kinds}"
        return
    before, after = recipe_file.flat(theirs), recipe_file.flat(model)
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name) and not (grows and name == VOCAB):
            yield f"init_from: model.{name} was {before.get(name)} and is {after.get(name)} in the recipe"


def _shapes(path: str, step: int) -> dict[str, tuple[int, ...]]:
    """The weights of a model's directory, by name."""
    if kind_of(path) is Kind.FOREIGN:
        spec = open_model(path).spec
        return {name: param.shape(spec.dims) for name, param in spec.items()}
    if kind_of(path) is Kind.ADAPTER:
        return _shapes(peft.base_of(path), NEWEST)
    about = read_about(path, newest_step(path) if step == NEWEST else step)
    if holds_adapters(about):
        base = read_base(path)
        return _shapes(base.path, base.step)
    saved = about.arrays
    begin = array_name("")
    return {
        name.removeprefix(begin).replace(".", "/"): info.shape
        for name, info in saved.items()
        if name.startswith(begin)
    }


def described(path: storage.PathLike) -> tuple[Family, Dtypes]:
    """The model of a directory, and the number formats to generate in.

    Raises:
        InputError: it holds no model, or no checkpoint yet.
    """
    kind = kind_of(path)
    if kind in (Kind.RUN, Kind.IMPORTED):
        newest_step(path)
    match kind:
        case Kind.RUN:
            recipe = recipe_file.from_run(str(path)).recipe
            return recipe.last.model, recipe.dtypes
        case Kind.IMPORTED:
            imported = read_imported(path)
            return imported.model, Dtypes(imported.dtype, imported.dtype)
        case Kind.FOREIGN:
            model = open_model(path)
            return model.family, Dtypes(model.dtype, model.dtype)
        case Kind.ADAPTER:
            return described(peft.base_of(path))


def tokenizer(path: storage.PathLike) -> Tokenizer:
    """The tokenizer of a model's directory, which puts around a text what the model expects.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if storage.exists(storage.join(path, MODEL_JSON)):
        around = read_imported(path).around
        if around is None:
            raise InputError(f"{path} was imported without a tokenizer that can be read")
        return tokens.load(storage.join(path, TOKENIZER_DIR), around)
    if is_foreign(path):
        config, generation = read_configs(path)
        return tokens.load(path, tokens.around(path, tokens.special_ids(config, generation)))
    if peft.is_peft(path):
        return tokenizer(peft.base_of(str(path)))
    return tokens.load(storage.join(path, TOKENIZER_DIR), None)


def weights(path: storage.PathLike, step: int, abstract: Any) -> Any:
    """The weights of a run, an imported model or a foreign one, cast to the dtypes asked for.

    A run's are those that it is evaluated with: averages, where its methods make them; adapters are added to
    the weights that they stand on.

    `step` NEWEST is the newest checkpoint's; a foreign model has none. All processes of a job call it.

    Raises:
        InputError: no model there, or one of other weights.
    """
    with processes.refused_by_all(f"opening {path}"):
        kind = kind_of(path)
        model = open_model(path) if kind is Kind.FOREIGN else None
        saves = kind in (Kind.RUN, Kind.IMPORTED)
        if saves and step == NEWEST:
            step = newest_step(path)
        adapts = saves and holds_adapters(read_about(path, step))
    if kind is Kind.ADAPTER:
        return _with_peft(str(path), abstract)
    if adapts:
        return _with_adapters(str(path), step, abstract)
    if model is None:
        return restore_params(path, step, abstract, field=FIELD, before=USED, cast=True)
    with processes.refused_by_all(f"reading {path}"):
        loaded = load(model, abstract)
    return loaded


def _with_adapters(path: str, step: int, abstract: Any) -> Any:
    """The weights that a run of adapters is used with."""
    with processes.refused_by_all(f"opening {path}"):
        base, spec = read_base(path), declared_adapters(saved_recipe(path))

    def place(adapter: Adapter | None, weight: jax.ShapeDtypeStruct) -> Adapter | None:
        if adapter is None:
            return None
        return _placed(adapter, adapter.a.shape(spec.dims), adapter.b.shape(spec.dims), weight)

    wanted = jax.tree.map(place, spec.tree, abstract, is_leaf=_is_place)
    adapters = restore_params(path, step, wanted, field=ADAPTERS, before=USED, cast=True)
    return _merged(adapters, base, abstract)


def _with_peft(path: str, abstract: Any) -> Any:
    """The weights that an adapter in PEFT's format is for, with it added."""
    with processes.refused_by_all(f"reading {path}"):
        base, host = find_base(peft.base_of(path)), peft.read_adapters(path, saved_model(path))

    def put(path: Any, weight: jax.ShapeDtypeStruct) -> Adapter | None:
        mine = host.get(path_name(path))
        if mine is None:
            return None
        places = _placed(mine, mine.a.shape, mine.b.shape, weight)

        def array(values: np.ndarray, like: jax.ShapeDtypeStruct) -> Array:
            return jax.make_array_from_callback(like.shape, like.sharding, lambda index: values[index])

        return replace(mine, a=array(mine.a, places.a), b=array(mine.b, places.b))

    return _merged(jax.tree_util.tree_map_with_path(put, abstract), base, abstract)


def _merged(adapters: Any, base: Base, abstract: Any) -> Any:
    """Weights with adapters added, in the dtypes and places asked for; what is adapted is read in float32."""

    def wide(adapter: Adapter | None, weight: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = weight.dtype if adapter is None else at_least_float32(weight.dtype)
        return jax.ShapeDtypeStruct(weight.shape, dtype, sharding=weight.sharding)

    under = weights(base.path, base.step, jax.tree.map(wide, adapters, abstract, is_leaf=_is_place))

    def one(node: Any, wanted: jax.ShapeDtypeStruct) -> Any:
        if not is_adapted(node):
            return node
        return jax.jit(lambda node: merge(node).astype(wanted.dtype), out_shardings=wanted.sharding)(node)

    return jax.tree.map(one, join(adapters, under), abstract, is_leaf=is_adapted)


def _is_place(node: object) -> bool:
    return node is None or is_adapter(node)


def _placed(
    adapter: Adapter, a: tuple[int, ...], b: tuple[int, ...], weight: jax.ShapeDtypeStruct
) -> Adapter:
    """An adapter's shapes `a` and `b`, in float32, placed as its weight is."""
    mesh, partition = weight.sharding.mesh, weight.sharding.spec
    whole = (*partition, *(None,) * (len(weight.shape) - len(partition)))
    # Both have the layers and the rank.
    stacked = (len(a) + len(b) - len(weight.shape)) // 3
    own = whole[stacked:]

    def struct(shape: tuple[int, ...], *axes: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, P(*whole[:stacked], *axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    return replace(
        adapter, a=struct(a, *own[: adapter.summed], None), b=struct(b, None, *own[adapter.summed :])
    )
