"""Directories with a model: a run, an imported one, or one in Hugging Face's format, and what they are."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from mosaicjax import recipe_file, storage
from mosaicjax.checkpoint import complete_steps
from mosaicjax.errors import InputError
from mosaicjax.hub import peft
from mosaicjax.hub.foreign_dir import is_foreign, open_model, read_object
from mosaicjax.hub.tokens import Around
from mosaicjax.models.family import Family
from mosaicjax.recipe import Recipe
from mosaicjax.spec import DtypeName

MODEL_JSON = "model.json"
TOKENIZER_DIR = "tokenizer"
FORMAT = 1


class Kind(Enum):
    """What a directory is."""

    RUN = "a run"
    IMPORTED = "an imported model"
    FOREIGN = "a model in Hugging Face's format"
    ADAPTER = "an adapter in PEFT's format"


@dataclass(frozen=True)
class Imported:
    """What an imported model's directory says of it.

    `length` is how many positions it was made for (0: unknown), `around` what it expects around a text (None:
    it came without a tokenizer), `special` its special tokens by the keys of a `config.json`, `source` where
    it came from and what of its configuration was not read.
    """

    model: Family
    dtype: DtypeName
    length: int
    around: Around | None
    special: Mapping[str, Any]
    source: Mapping[str, Any] = field(default_factory=dict)


def kind_of(path: storage.PathLike) -> Kind:
    """What a directory is.

    Raises:
        InputError: it holds no model.
    """
    if storage.exists(storage.join(path, recipe_file.RECIPE_JSON)):
        return Kind.RUN
    if storage.exists(storage.join(path, MODEL_JSON)):
        return Kind.IMPORTED
    if is_foreign(path):
        return Kind.FOREIGN
    if peft.is_peft(path):
        return Kind.ADAPTER
    raise InputError(
        f"{path} holds no model",
        expected=f"a run ({recipe_file.RECIPE_JSON}), an imported model ({MODEL_JSON}) or a Hugging Face"
        f" directory (config.json, or {peft.CONFIG})",
    )


def save_imported(path: storage.PathLike, imported: Imported) -> None:
    """Write what an imported model's directory says of it."""
    values = {
        "format": FORMAT,
        "model": recipe_file.converter().unstructure(imported.model),
        "dtype": imported.dtype,
        "length": imported.length,
        "around": None if imported.around is None else asdict(imported.around),
        "special": dict(imported.special),
        "source": dict(imported.source),
    }
    storage.write_text(storage.join(path, MODEL_JSON), json.dumps(values, indent=1) + "\n")


def read_imported(path: storage.PathLike) -> Imported:
    """What an imported model's directory says of it.

    Raises:
        InputError: a newer version wrote it, or it was edited into something else.
    """
    where = storage.join(path, MODEL_JSON)
    values = read_object(where)
    if values.pop("format", 0) != FORMAT:
        raise InputError(f"{where} was written by a newer mosaicjax", expected=f"format {FORMAT}")
    try:
        around = values.pop("around")
        if around is not None:
            around = Around(tuple(around["before"]), tuple(around["ends"]), around["separator"])
        model = recipe_file.converter().structure(values.pop("model"), Family)
        return Imported(model, around=around, **values)
    except (KeyError, TypeError) as error:
        raise InputError(f"{where} cannot be read", got=error) from error


def model_of(path: str) -> Family:
    """The model of a directory, for a recipe: `model=model_of("runs/imported")`, whatever kind it is.

    Raises:
        InputError: it holds no model, or a run's whose class stands in the recipe's own file.
    """
    model = saved_model(path)
    if type(model).__module__ == recipe_file.MODULE:
        raise InputError(
            f"the model of {path} is of a class in its recipe's own file",
            got=type(model).__name__,
            fix=f"copy the class from {storage.join(path, recipe_file.RECIPE_SOURCE)}",
        )
    return model


def saved_model(path: str) -> Family:
    """The model of a directory; the recipe that is being read stays the one whose classes are found by name.

    Raises:
        InputError: it holds no model.
    """
    match kind_of(path):
        case Kind.RUN:
            return saved_recipe(path).last.model
        case Kind.IMPORTED:
            return read_imported(path).model
        case Kind.FOREIGN:
            return open_model(path).family
        case Kind.ADAPTER:
            return saved_model(peft.base_of(path))


def saved_recipe(path: str) -> Recipe:
    """The recipe of a run; the one that is being read stays the one whose classes are found by name.

    Raises:
        InputError: it cannot be read.
    """
    mine = sys.modules.get(recipe_file.MODULE)
    try:
        return recipe_file.from_run(path).recipe
    finally:
        if mine is not None:
            sys.modules[recipe_file.MODULE] = mine


def newest_step(path: storage.PathLike) -> int:
    """The step of a run's or an imported model's newest checkpoint.

    Raises:
        InputError: it has none.
    """
    steps = complete_steps(path)
    if not steps:
        raise InputError(
            f"{path} holds no checkpoint", fix="wait for its first save, train or import it again"
        )
    return steps[-1]
