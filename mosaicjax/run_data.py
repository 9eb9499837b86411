"""The token stores of a recipe, opened: the stream of each phase, and the held-out rows."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mosaicjax.data import mixture
from mosaicjax.data.held_pairs import ANSWERS, HeldOutPairs
from mosaicjax.data.packing import Packing
from mosaicjax.data.phased import Phased, taken_before
from mosaicjax.data.rows import Contiguous, Packed, SplitRows
from mosaicjax.data.store import Store, digest
from mosaicjax.data.stream import Drawn, HeldOut, Stream
from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.errors import InputError
from mosaicjax.recipe import Recipe, check_vocabulary

MANY_DOCUMENTS = 2**20
"""How so many documents or more are packed is kept on this machine: it takes seconds."""


@dataclass(frozen=True)
class Data:
    """The token stores of a recipe, opened; `tokenizer` is that of all, `held_out` the last phase's."""

    stores: tuple[Store, ...]
    stream: Phased
    held_out: HeldOut | HeldOutPairs | None
    digests: tuple[str, ...]
    """Of the training tokens, up to each phase."""

    @property
    def digest(self) -> str:
        """Of all training tokens."""
        return self.digests[-1]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return self.stores[0].tokenizer


def open_data(recipe: Recipe) -> Data:
    """Open and verify the recipe's stores, before any device starts.

    Raises:
        InputError: no store, a damaged shard, a tokenizer larger than the model's vocabulary, too few tokens,
            preference pairs read as something else or longer than a row, or something else read as pairs.
    """
    phases = [recipe.in_phase(number) for number in range(len(recipe.phases) + 1)]
    paths = list(dict.fromkeys(path for phase in phases for path in phase.data.stores().values()))
    stores = {path: Store.open(path, verify=True) for path in paths}
    first = stores[paths[0]].manifest.tokenizer
    for path, store in stores.items():
        record = store.manifest.tokenizer
        check_vocabulary(recipe.model.build().dims["vocab"], record.size, path)
        if (record.hash, record.separator) != (first.hash, first.separator):
            raise InputError(
                f"{path} was built with another tokenizer than {paths[0]}",
                expected=f"{first.hash[:12]}, separator {first.separator_token!r}",
                got=f"{record.hash[:12]}, separator {record.separator_token!r}",
                fix="build it again with the other's",
            )
    streams: list[Stream] = []
    for phase, begin in zip(phases, [0, *(later.step for later in recipe.phases)], strict=True):
        streams.append(_stream(phase, stores, begin, streams))
    last = phases[-1]
    validation = {name: stores[path].split("validation") for name, path in last.data.stores().items()}
    held_out: HeldOut | HeldOutPairs | None = None
    if any(split.counts.documents for split in validation.values()) or recipe.eval.every:
        if last.data.rows is mixture.Rows.PAIRS:
            held_out = HeldOutPairs(validation, separator=first.separator, seq=last.seq)
        else:
            held_out = HeldOut(validation, separator=first.separator, seq=last.seq, isolate=last.data.isolate)
    return Data(tuple(stores.values()), Phased(streams), held_out, _digests(phases, stores))


def _digests(phases: Sequence[Recipe], stores: Mapping[str, Store]) -> tuple[str, ...]:
    """Of the training tokens of each phase and those before it, wherever the stores lie."""
    found, so_far = [], dict[tuple[str, ...], None]()
    for phase in phases:
        for path in phase.data.stores().values():
            files = sorted(stores[path].manifest.files.items())
            so_far[tuple(record.sha256 for name, record in files if name.startswith("train/"))] = None
        joined = "".join(each for hashes in so_far for each in hashes)
        found.append(hashlib.sha256(joined.encode()).hexdigest())
    return tuple(found)


def _stream(recipe: Recipe, stores: Mapping[str, Store], begin: int, before: Sequence[Stream]) -> Stream:
    """The stream of a phase that begins at a data step, after those of the phases before it."""
    paths = recipe.data.stores()
    rows = {name: _rows(stores[path], recipe) for name, path in paths.items()}
    weights = recipe.data.weights([len(each) for each in rows.values()])
    return Stream(
        [Drawn(*each, weight) for each, weight in zip(rows.items(), weights, strict=True)],
        separator=next(iter(stores.values())).manifest.tokenizer.separator,
        seq=recipe.seq,
        batch=recipe.batch,
        seed=recipe.seed,
        skips=recipe.skips,
        isolate=recipe.data.isolate,
        first_step=begin,
        taken={name: taken_before(name, each, begin, before) for name, each in rows.items()},
    )


def _rows(store: Store, recipe: Recipe) -> SplitRows:
    split, kind = store.split("train"), recipe.data.rows
    check_kind(store, kind)
    if kind is mixture.Rows.CONCATENATED:
        return Contiguous(split, recipe.seq)
    together = ANSWERS if kind is mixture.Rows.PAIRS else 1
    if split.counts.documents < MANY_DOCUMENTS:
        return Packed(Packing.of(split, recipe.seq, together=together))
    try:
        cache = store.cache
    except InputError as error:
        print(f"{error}; how documents are packed is not kept", file=sys.stderr, flush=True)
        return Packed(Packing.of(split, recipe.seq, together=together))
    name = digest(store.manifest.files, "train/documents/")
    return Packed(Packing.kept(split, recipe.seq, cache, name, together=together))


def check_kind(store: Store, kind: mixture.Rows) -> None:
    """Refuse preference pairs that are read as something else, and something else that is read as pairs.

    Raises:
        InputError: with the way out.
    """
    if store.manifest.settings.pairs and kind is not mixture.Rows.PAIRS:
        raise InputError(
            f"{store.path} holds preference pairs",
            expected="data.rows PAIRS, and the method DPO",
            got=kind.name,
            fix="--data.rows PAIRS, or a store of conversations",
        )
    if kind is mixture.Rows.PAIRS and not store.manifest.settings.pairs:
        raise InputError(
            f"{store.path} holds no preference pairs, as data.rows PAIRS has them",
            fix="data build --template NAME of rows with chosen and rejected",
        )
