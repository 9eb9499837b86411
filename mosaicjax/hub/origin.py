"""What an export is made from: the model of a run or of an imported one, and what is known of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mosaicjax import recipe_file, storage
from mosaicjax.checkpoint import About
from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.errors import InputError
from mosaicjax.hub import peft, tokens
from mosaicjax.hub.foreign_dir import open_model
from mosaicjax.hub.model_dir import TOKENIZER_DIR, Imported, Kind, kind_of, read_imported
from mosaicjax.hub.read import array_name
from mosaicjax.log import METRICS, RUN_JSON, Row, read_rows
from mosaicjax.models.family import Family
from mosaicjax.recipe_file import Loaded
from mosaicjax.report.summary import SUMMARY
from mosaicjax.spec import DtypeName

USUAL_LENGTH = 2_048
"""Positions of a model whose `config.json` did not say: what Transformers takes for most families."""


@dataclass(frozen=True)
class Trained:
    """What a run's directory says of how its model came to be; a part that was not written yet is empty."""

    loaded: Loaded
    surroundings: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Origin:
    """A model to export.

    `tokenizer` is None for an imported model, whose files are copied as they came; `special` are special
    tokens by the keys of a `config.json`; `history` says where the weights come from.
    """

    path: str
    step: int
    family: Family
    dtype: DtypeName
    length: int
    special: Mapping[str, Any]
    history: Trained | Imported
    tokenizer: Tokenizer | None = None
    cursor: Mapping[str, Any] = field(default_factory=dict)


def origin_of(path: str, about: About, step: int) -> Origin:
    """What to export of a directory.

    Raises:
        InputError: it is no run or imported model of ours, or parts of it are missing.
    """
    kind = kind_of(path)
    if kind in (Kind.FOREIGN, Kind.ADAPTER):
        raise InputError(f"{path} is in Hugging Face's format already", expected="a run or an imported model")
    dtypes = {info.dtype for name, info in about.arrays.items() if name.startswith(array_name(""))}
    dtype: Any = dtypes.pop() if len(dtypes) == 1 else "float32"
    if kind is Kind.IMPORTED:
        imported = read_imported(path)
        length = imported.length or USUAL_LENGTH
        return Origin(path, step, imported.model, dtype, length, imported.special, imported)
    loaded = recipe_file.from_run(path)
    if not dtypes:
        dtype = loaded.recipe.dtypes.param
    tokenizer = tokens.load(storage.join(path, TOKENIZER_DIR), None)
    special = dict.fromkeys(tokens.IDS[:2], tokenizer.separator) | {tokens.IDS[2]: None}
    return Origin(
        path=path,
        step=step,
        family=loaded.recipe.last.model,
        dtype=dtype,
        length=max(loaded.recipe.longest, _length_before(loaded.recipe.init_from)),
        special=special,
        history=Trained(loaded, _object(path, RUN_JSON), _object(path, SUMMARY), _rows(path)),
        tokenizer=tokenizer,
        cursor=about.cursor,
    )


def _length_before(start: str) -> int:
    """How many positions the model was made for that a run started from; 0 where it is gone or was none."""
    try:
        kind = kind_of(start) if start else Kind.RUN
        if kind is Kind.RUN:
            return recipe_file.from_run(start).recipe.longest if start else 0
        if kind is Kind.ADAPTER:
            return _length_before(peft.base_of(start))
        return read_imported(start).length if kind is Kind.IMPORTED else open_model(start).length
    except InputError:
        return 0


def _object(path: str, name: str) -> dict[str, Any]:
    where = storage.join(path, name)
    values: dict[str, Any] = json.loads(storage.read_text(where)) if storage.exists(where) else {}
    return values


def _rows(path: str) -> tuple[Row, ...]:
    return tuple(read_rows(path)) if storage.exists(storage.join(path, METRICS)) else ()
