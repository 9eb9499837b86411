"""Weights to start from, out of any kind of directory with a model, onto the shardings asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mosaicjax import processes, recipe_file, storage
from mosaicjax.checkpoint import read_about, restore_params
from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.errors import InputError
from mosaicjax.hub import tokens
from mosaicjax.hub.foreign_dir import is_foreign, open_model, read_configs
from mosaicjax.hub.model_dir import (
    MODEL_JSON,
    TOKENIZER_DIR,
    Kind,
    kind_of,
    newest_step,
    read_imported,
    saved_model,
)
from mosaicjax.hub.read import FIELD, USED, array_name, load
from mosaicjax.models.family import Family
from mosaicjax.spec import Dtypes, Spec

NEWEST = -1
"""A run's newest checkpoint."""

_SHOWN = 3


def check_start(path: str, model: Family, spec: Spec) -> Iterator[str]:
    """Refuse weights of other shapes than a recipe's model has; lines on knobs in which the two differ.

    Raises:
        InputError: no model there, or one of other weights.
    """
    wanted = {name: param.shape(spec.dims) for name, param in spec.items()}
    found = _shapes(path)
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
        if before.get(name) != after.get(name):
            yield f"init_from: model.{name} was {before.get(name)} and is {after.get(name)} in the recipe"


def _shapes(path: str) -> dict[str, tuple[int, ...]]:
    """The weights of a model's directory, by name."""
    if kind_of(path) is Kind.FOREIGN:
        spec = open_model(path).spec
        return {name: param.shape(spec.dims) for name, param in spec.items()}
    saved = read_about(path, newest_step(path)).arrays
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
    if kind is not Kind.FOREIGN:
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
    return tokens.load(storage.join(path, TOKENIZER_DIR), None)


def weights(path: storage.PathLike, step: int, abstract: Any) -> Any:
    """The weights of a run, an imported model or a foreign one, cast to the dtypes asked for.

    A run's are those that it is evaluated with: averages, where its methods make them.

    `step` NEWEST is the newest checkpoint's; a foreign model has none. All processes of a job call it.

    Raises:
        InputError: no model there, or one of other weights.
    """
    with processes.refused_by_all(f"opening {path}"):
        model = open_model(path) if kind_of(path) is Kind.FOREIGN else None
        if model is None and step == NEWEST:
            step = newest_step(path)
    if model is None:
        return restore_params(path, step, abstract, field=FIELD, before=USED, cast=True)
    with processes.refused_by_all(f"reading {path}"):
        loaded = load(model, abstract)
    return loaded
