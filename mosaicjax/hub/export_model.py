"""A run or an imported model into Hugging Face's format, tensor by tensor, without a device."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mosaicjax import storage
from mosaicjax.checkpoint import read_about
from mosaicjax.errors import InputError
from mosaicjax.hub.base import read_base
from mosaicjax.hub.card import card
from mosaicjax.hub.export_tokens import copy_tokenizer, write_tokenizer
from mosaicjax.hub.foreign_dir import CONFIG, GENERATION, INDEX_SUFFIX, WEIGHTS
from mosaicjax.hub.import_model import GIGA, Kept, peak_bytes
from mosaicjax.hub.model_dir import TOKENIZER_DIR, Kind, kind_of, newest_step, read_imported
from mosaicjax.hub.origin import Origin, origin_of
from mosaicjax.hub.peft import write_adapters
from mosaicjax.hub.safetensors_file import header_bytes, write_tensor
from mosaicjax.hub.sources import Source, holds_adapters, read_adapters, source_of
from mosaicjax.hub.start import NEWEST
from mosaicjax.hub.stored import cast, copy_into, numpy_dtype
from mosaicjax.models.names import Foreign, foreign_tensors
from mosaicjax.spec import DtypeName

SHARD_BYTES = 5 * GIGA

_CARD = "README.md"
_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Written:
    """What an export did.

    Units: `nbytes` of weights; `peak_bytes` the process's largest resident memory.
    """

    out: str
    model_type: str
    step: int
    parameters: int
    dtype: DtypeName
    files: int
    nbytes: int
    seconds: float
    peak_bytes: int

    def __str__(self) -> str:
        size, rate = self.nbytes / GIGA, self.nbytes / GIGA / self.seconds
        return (
            f"{self.model_type}, {self.parameters / 1e6:,.2f}M parameters in {self.dtype}, step {self.step}:"
            f" {size:.3f} GB in {self.files} file{'s' if self.files > 1 else ''} and {self.seconds:.1f} s,"
            f" {rate:.2f} GB/s, peak memory {self.peak_bytes / GIGA:.2f} GB"
        )


def export_model(
    run: str,
    out: str,
    *,
    step: int = NEWEST,
    dtype: Kept = "own",
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = lambda line: None,
) -> Written:
    """Export a run or an imported model so that Transformers loads it.

    The weights of the checkpoint of `step` are written in `dtype`, by default the one that they rest in, in
    files of at most `shard_bytes` where no single tensor is larger. `out` appears when everything is written;
    on an object store, where nothing can be renamed, `config.json` comes last.

    Raises:
        InputError: nothing to export, a knob that Transformers' architecture lacks, or an `out` that holds
            something.
    """
    began = time.perf_counter()
    if shard_bytes < 1:
        raise InputError("size of a shard", expected="1 byte or more", got=shard_bytes)
    if storage.list_dir(out) or (storage.exists(out) and not _is_dir(out)):
        raise InputError(f"{out} is there and not empty", fix="another --out, or remove it")
    step = newest_step(run) if step == NEWEST else step
    about = read_about(run, step)
    origin = origin_of(run, about, step)
    config = origin.family.to_hf(origin.length)
    tensors = foreign_tensors(origin.family.decoder(), origin.family.names())
    kind = origin.dtype if dtype == "own" else dtype
    source = source_of(run, step)
    _check_saved(run, step, tensors, source)
    with _destination(out) as folder:
        shards = _shards(tensors, kind, shard_bytes)
        _write_weights(source, shards, kind, folder)
        _write_tokens(origin, folder, say)
        storage.write_text(storage.join(folder, _CARD), card(origin, kind))
        # Last: what has no configuration does not look like a model.
        storage.write_text(storage.join(folder, CONFIG), _json({**config, **origin.special, "dtype": kind}))
    parameters = sum(math.prod(foreign.shape) for foreign in tensors)
    written = Written(
        out=out,
        model_type=config["model_type"],
        step=step,
        parameters=parameters,
        dtype=kind,
        files=len(shards),
        nbytes=parameters * numpy_dtype(kind).itemsize,
        seconds=time.perf_counter() - began,
        peak_bytes=peak_bytes(),
    )
    say(f"{run} into {out}: {written}")
    return written


def export_adapter(
    run: str,
    out: str,
    *,
    base: str = "",
    step: int = NEWEST,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Export a run's adapters alone, as PEFT reads them, beside `base`: a model in Hugging Face's format.

    Without `base` it is where the weights under the adapters came from in that format.

    Raises:
        InputError: a run without adapters, weights that never were in that format, a model that Transformers
            lacks, or an `out` that holds something.
    """
    if storage.list_dir(out) or (storage.exists(out) and not _is_dir(out)):
        raise InputError(f"{out} is there and not empty", fix="another --out, or remove it")
    step = newest_step(run) if step == NEWEST else step
    about = read_about(run, step)
    if not holds_adapters(about):
        raise InputError(f"{run} holds no adapters", expected="a run with the method LoRA")
    origin = origin_of(run, about, step)
    origin.family.to_hf(origin.length)
    base = base or _foreign_base(read_base(run).path)
    adapters = read_adapters(run, step, about)
    with _destination(out) as folder:
        count = write_adapters(origin.family, adapters, base, folder)
    say(f"{run} into {out}: adapters of {count / 1e6:,.2f}M parameters, step {step}, for {base}")


def _foreign_base(path: str) -> str:
    """Where a model came from in Hugging Face's format."""
    kind = kind_of(path)
    if kind is Kind.FOREIGN:
        return path if storage.is_remote(path) else os.path.abspath(path)
    source = read_imported(path).source.get("path") if kind is Kind.IMPORTED else None
    if source is None:
        raise InputError(
            f"the adapters stand on {path}, which is not in Hugging Face's format",
            fix=f"mosaicjax export {path} --out HF_DIR, and --base HF_DIR",
        )
    return str(source)


def _is_dir(path: str) -> bool:
    return storage.is_remote(path) or os.path.isdir(storage.local(path))


def _json(values: Any) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _check_saved(run: str, step: int, tensors: Sequence[Foreign], source: Source) -> None:
    """Refuse a checkpoint that lacks weights of the model, before anything is written."""
    lacking = {piece.leaf for foreign in tensors for piece in foreign.pieces} - set(source.leaves)
    if lacking:
        raise InputError(
            f"checkpoint {step} of {run} lacks weights of its model", got=f"no {sorted(lacking)[0]}"
        )


@contextlib.contextmanager
def _destination(out: str) -> Iterator[str]:
    """Where to write: on this machine a neighbour that becomes `out` once the block has ended well."""
    if storage.is_remote(out):
        yield out
        return
    target = storage.local(out)
    parent, name = os.path.split(target)
    folder = os.path.join(parent, f".{name}.unfinished")
    storage.make_dirs(folder)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another process is writing {out}", fix="wait for it, or another --out"
            ) from error
        # What a killed export left.
        for left in storage.list_dir(folder):
            storage.remove_tree(os.path.join(folder, left))
        try:
            yield folder
            os.fsync(lock)
            os.rename(folder, target)
        except BaseException:
            storage.remove_tree(folder)
            raise
    finally:
        os.close(lock)


def _shards(tensors: Sequence[Foreign], dtype: DtypeName, shard_bytes: int) -> list[list[Foreign]]:
    """The tensors file by file: each is filled before the next is begun."""
    size = numpy_dtype(dtype).itemsize
    shards: list[list[Foreign]] = []
    room = 0
    for foreign in tensors:
        nbytes = math.prod(foreign.shape) * size
        if not shards or nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(foreign)
        room -= nbytes
    return shards


def _write_weights(
    source: Source, shards: Sequence[Sequence[Foreign]], dtype: DtypeName, folder: str
) -> None:
    name, places, total = WEIGHTS[0], {}, 0
    stem, suffix = name.split(".")
    # One for all tensors: new pages for each would cost more than its copy.
    largest = max(math.prod(foreign.shape) for shard in shards for foreign in shard)
    memory = np.empty(largest, numpy_dtype(dtype))
    for number, shard in enumerate(shards, 1):
        file = name if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        with storage.appending(storage.join(folder, file)) as opened:
            opened.write(header_bytes([(foreign.name, dtype, foreign.shape) for foreign in shard]))
            for foreign in shard:
                array = memory[: math.prod(foreign.shape)].reshape(foreign.shape)
                _fill(source, foreign, array)
                write_tensor(opened, array)
                places[foreign.name] = file
                total += array.nbytes
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        storage.write_text(storage.join(folder, name + INDEX_SUFFIX), _json(index))


def _fill(source: Source, foreign: Foreign, array: np.ndarray) -> None:
    """Put a foreign tensor together from blocks of weights; one is read while another is copied."""
    blocks: list[tuple[np.ndarray, str, tuple[Any, ...]]] = []
    for piece in foreign.pieces:
        view = foreign.view(array, piece)
        row_bytes = max(1, view.nbytes // max(1, view.shape[0]))
        rows = max(1, _BLOCK_BYTES // row_bytes)
        for first in range(0, view.shape[0], rows):
            place = slice(first, min(first + rows, view.shape[0]))
            blocks.append((view[place], piece.leaf, (*piece.index, place)))
    reads = (source.read(leaf, place) for _, leaf, place in blocks)
    ahead = deque(itertools.islice(reads, 2))
    for target, leaf, _ in blocks:
        block = ahead.popleft()()
        copy_into(target, cast(block, array.dtype, f"tensor {foreign.name} ({leaf})"))
        ahead.extend(itertools.islice(reads, 1))


def _write_tokens(origin: Origin, folder: str, say: Callable[[str], None]) -> None:
    if origin.tokenizer is None:
        source = storage.join(origin.path, TOKENIZER_DIR)
        if not storage.list_dir(source):
            say(f"{origin.path} came without a tokenizer, and so does the export")
        copy_tokenizer(source, folder)
    else:
        write_tokenizer(origin.tokenizer, origin.length, folder, say)
    kept = storage.join(origin.path, GENERATION)
    if origin.tokenizer is None and storage.exists(kept):
        storage.copy_file(kept, storage.join(folder, GENERATION))
    else:
        storage.write_text(storage.join(folder, GENERATION), _json(origin.special))
