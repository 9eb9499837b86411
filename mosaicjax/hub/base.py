"""Which weights a run stands on, under adapters or as a reference: it remembers them, and refuses others."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from mosaicjax import storage
from mosaicjax.checkpoint import read_about
from mosaicjax.errors import InputError
from mosaicjax.hub import peft
from mosaicjax.hub.foreign_dir import open_model, read_object
from mosaicjax.hub.model_dir import MODEL_JSON, Kind, kind_of, newest_step

ADAPTERS = "adapters"
"""The field of a checkpoint that holds adapters; one that has it has no other weights."""

BASE_JSON = "base.json"


@dataclass(frozen=True)
class Base:
    """A model's directory, the step of its checkpoint (0: a foreign one, which has none), and its digest.

    The digest is of what the checkpoint says of itself, and of a foreign model's files as
    `ForeignModel.digest` takes it: not of all weights.
    """

    path: str
    step: int
    digest: str


def find_base(path: str) -> Base:
    """The model of a directory as it is now.

    Raises:
        InputError: it holds no model, or no checkpoint.
    """
    step = newest_step(path) if kind_of(path) in (Kind.RUN, Kind.IMPORTED) else 0
    return Base(path, step, _digest(path, step))


def save_base(run: str, base: Base) -> None:
    """Write it into the directory of the run that stands on it."""
    storage.write_text(storage.join(run, BASE_JSON), json.dumps(asdict(base), indent=1) + "\n")


def read_base(run: str) -> Base:
    """What a run stands on, as it was when the run began.

    Raises:
        InputError: it is gone, or there is another in its place.
    """
    where = storage.join(run, BASE_JSON)
    values = read_object(where)
    try:
        base = Base(**values)
        found = _digest(base.path, base.step)
    except TypeError as error:
        raise InputError(f"{where} cannot be read", got=error) from error
    except InputError as error:
        raise InputError(
            f"the weights that {run} stands on are not there: {error}",
            fix=f"put them back at {base.path}, or their new place into {where}",
        ) from error
    if found != base.digest:
        raise InputError(
            f"{base.path} holds other weights than those that {run} began from and stands on",
            expected=f"digest {base.digest[:12]}",
            got=found[:12],
            fix=f"put them back, or their new place into {where}",
        )
    return base


def _digest(path: str, step: int) -> str:
    kind = kind_of(path)
    if kind is Kind.FOREIGN:
        return open_model(path).digest()
    if kind is Kind.ADAPTER:
        return peft.digest(path) + find_base(peft.base_of(path)).digest
    about = read_about(path, step)
    arrays = {name: str(info) for name, info in sorted(about.arrays.items())}
    whole = hashlib.sha256(json.dumps([about.cursor, arrays], sort_keys=True).encode())
    for name in (MODEL_JSON, BASE_JSON):
        if storage.exists(storage.join(path, name)):
            whole.update(storage.read_text(storage.join(path, name)).encode())
    return whole.hexdigest()
