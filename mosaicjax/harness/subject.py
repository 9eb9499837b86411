"""The model that tasks are done with: its weights, its tokenizer, and what tells it from others."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mosaicjax import recipe_file, storage
from mosaicjax.checkpoint import checkpoints_dir
from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.errors import InputError
from mosaicjax.generate import Generator, Run, load_run
from mosaicjax.harness.score import Scorer
from mosaicjax.hub import peft, start
from mosaicjax.hub.foreign_dir import open_model
from mosaicjax.hub.model_dir import Kind, kind_of, newest_step, read_imported
from mosaicjax.mesh import Mesh


@dataclass(frozen=True)
class Settings:
    """How a model is run: `batch` rows at once, inputs of at most `length` tokens, on a mesh.

    `length` 0 is what the model was made for or trained with.
    """

    batch: int = 32
    length: int = 0
    mesh: Mesh = Mesh(fsdp=(1,))

    def check(self) -> None:
        """Raises: InputError: with the setting, expected and got."""
        if self.batch < 1:
            raise InputError("--batch", expected="1 or more rows", got=self.batch)
        if self.length < 0:
            raise InputError("--max-length", expected="1 or more tokens, or 0 (the model's)", got=self.length)


class Subject:
    """A run, an imported model or a Hugging Face directory, described at once and loaded when first used."""

    def __init__(self, path: str, settings: Settings = Settings()) -> None:
        """Read what the directory says of its model.

        Raises:
            InputError: no model or no tokenizer there, or settings that mean nothing.
        """
        settings.check()
        self.path, self.settings = path, settings
        self.kind = kind_of(path)
        model, dtypes = start.described(path)
        self.length = settings.length or model_length(path)
        model.build().check(self.length)
        self.tokenizer: Tokenizer = start.tokenizer(path)
        self.identity = identity(path) | {
            "dtype": dtypes.compute,
            "tokenizer": self.tokenizer.hash,
            "max_length": self.length,
        }

    @cached_property
    def _run(self) -> Run:
        return load_run(self.path, self.settings.mesh)

    @cached_property
    def scorer(self) -> Scorer:
        """What gives log-likelihoods."""
        decoder, weights, layout, dtypes, _ = self._run
        return Scorer(decoder, weights, layout, dtypes, length=self.length, rows=self.settings.batch)

    @cached_property
    def generator(self) -> Generator:
        """What writes."""
        decoder, weights, layout, dtypes, _ = self._run
        return Generator(decoder, weights, layout, dtypes, self.tokenizer)


def model_length(path: str) -> int:
    """How many tokens a directory's model reads at once: the longest rows that it was trained on or made for.

    Raises:
        InputError: it does not say.
    """
    match kind_of(path):
        case Kind.RUN:
            length = recipe_file.from_run(path).recipe.last.seq
        case Kind.IMPORTED:
            length = read_imported(path).length
        case Kind.FOREIGN:
            length = open_model(path).length
        case Kind.ADAPTER:
            length = model_length(peft.base_of(path))
    if not length:
        raise InputError(
            f"{path} does not say how long a text its model reads",
            fix="--max-length, or --longest of `serve`",
        )
    return length


def identity(path: str) -> dict[str, Any]:
    """What tells a directory's weights from others, wherever the directory lies.

    A checkpoint of ours is told by what it says of itself, with the time at which it was written.

    Raises:
        InputError: it holds no model, or a file of it cannot be read.
    """
    kind = kind_of(path)
    if kind is Kind.FOREIGN:
        return {"weights": open_model(path).digest()}
    step = newest_step(path)
    checkpoint = storage.join(checkpoints_dir(path), str(step))
    digest = hashlib.sha256()
    for name in _small_files(checkpoint):
        digest.update(name.encode() + storage.read_bytes(storage.join(checkpoint, name)))
    if kind is Kind.IMPORTED:
        digest.update(str(read_imported(path).source.get("digest")).encode())
    return {"weights": digest.hexdigest(), "step": step}


def _small_files(checkpoint: str) -> list[str]:
    """Files of a checkpoint that say what is in it, its time among them."""
    return [name for name in storage.list_dir(checkpoint) if name.startswith("_")]
