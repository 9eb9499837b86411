"""A foreign model into a directory that training and generation start from."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mosaicjax import processes, recipe_file, storage
from mosaicjax.checkpoint import Checkpoints, complete_steps
from mosaicjax.errors import InputError
from mosaicjax.hub import tokens
from mosaicjax.hub.foreign_dir import GENERATION, ForeignModel, open_model
from mosaicjax.hub.model_dir import TOKENIZER_DIR, Imported, save_imported
from mosaicjax.hub.read import stream
from mosaicjax.spec import DtypeName

GIGA = 10**9
STEP = 0
"""An imported model is the checkpoint before any step of ours."""

Kept = DtypeName | Literal["own"]
"""A number format; `own` keeps the one that the weights have."""


@dataclass(frozen=True)
class Read:
    """What an import did.

    Units: `nbytes` as the foreign files hold the weights; `peak_bytes` the process's largest resident memory.
    """

    family: str
    parameters: int
    dtype: DtypeName
    nbytes: int
    seconds: float
    peak_bytes: int
    unread: tuple[str, ...]

    def __str__(self) -> str:
        size, rate = self.nbytes / GIGA, self.nbytes / GIGA / self.seconds
        return (
            f"{self.family}, {self.parameters / 1e6:,.2f}M parameters in {self.dtype}: {size:.3f} GB in"
            f" {self.seconds:.1f} s, {rate:.2f} GB/s, peak memory {self.peak_bytes / GIGA:.2f} GB"
        )


def import_model(
    source: str, out: str, *, dtype: Kept = "own", say: Callable[[str], None] = lambda line: None
) -> Read:
    """Import a directory in Hugging Face's format; tensors are read and written one at a time.

    Weights rest in `dtype`: by default their own, or float32 where they are of several. In a job of several
    processes each reads and writes its share of the tensors.

    Raises:
        InputError: a model that is unknown or damaged, or an `out` that holds one already.
    """
    began = time.perf_counter()
    with processes.refused_by_all(f"the model in {source}"):
        model = open_model(source)
        model.family.decoder().check(max(1, model.length))
        _check_free(out)
        rest = model.dtype if dtype == "own" else dtype
        weights = stream(model, rest)
    with processes.refused_by_all(f"writing {out}"):
        if processes.current().primary:
            describe(model, source, out, rest, say)
    with Checkpoints(out) as checkpoints:
        checkpoints.write(STEP, weights, {"step": STEP})
    read = Read(
        family=str(model.config["model_type"]),
        parameters=model.spec.count(),
        dtype=rest,
        nbytes=model.nbytes,
        seconds=time.perf_counter() - began,
        peak_bytes=peak_bytes(),
        unread=model.unread,
    )
    say(f"{source} into {out}: {read}")
    return read


def _check_free(out: str) -> None:
    if storage.exists(storage.join(out, recipe_file.RECIPE_JSON)) or complete_steps(out):
        raise InputError(f"{out} holds a run or a model already", fix="another --out")


def describe(
    model: ForeignModel, source: str, out: str, dtype: DtypeName, say: Callable[[str], None]
) -> None:
    """Write everything but the weights: what the model is, its tokenizer and its generation's configuration.

    Raises:
        InputError: the directory cannot be written to.
    """
    special = tokens.special_ids(model.config, model.generation)
    around = None
    try:
        around = tokens.around(source, special)
    except InputError as refusal:
        say(f"no tokenizer that text can be written with: {refusal}")
    for name in tokens.files_of(source):
        storage.copy_file(storage.join(source, name), storage.join(out, TOKENIZER_DIR, name))
    if model.generation:
        storage.copy_file(storage.join(source, GENERATION), storage.join(out, GENERATION))
    if len(model.dtypes) > 1 and dtype == model.dtype:
        say(f"the weights are of several dtypes ({', '.join(model.dtypes)}): they rest in {dtype}")
    if model.unread:
        say(f"keys of config.json that were not read: {', '.join(model.unread)}")
    remembered = {
        "path": source if storage.is_remote(source) else os.path.abspath(source),
        "model_type": model.config["model_type"],
        "name": model.config.get("_name_or_path") or os.path.basename(source.rstrip("/")),
        "dtypes": list(model.dtypes),
        "digest": model.digest(),
        "unread": list(model.unread),
        "mosaicjax": _version(),
        "imported": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    save_imported(out, Imported(model.family, dtype, model.length, around, special, remembered))


def _version() -> str:
    try:
        return importlib.metadata.version("mosaicjax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def peak_bytes() -> int:
    """The most memory that this process has held, pages of mapped files among it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
