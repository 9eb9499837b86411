"""A look at token stores: counts, documents as text, how long they are, and which come more than once."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mosaicjax import storage
from mosaicjax.data.store import Split, Store
from mosaicjax.errors import InputError

BLOCK_TOKENS = 2**22
BAR = 40
CHARACTERS = 300


@dataclass(frozen=True)
class Lengths:
    """How many documents have how many tokens, in bins that double: 0, 1, 2 to 3, 4 to 7, ...

    Shapes: `documents` and `tokens` int64 [bins].
    """

    documents: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray) -> Lengths:
        """Count lengths."""
        bins = np.zeros(len(lengths), np.int64)
        some = lengths > 0
        bins[some] = np.frexp(lengths[some])[1]
        count = int(bins.max(initial=0)) + 1
        tokens = np.zeros(count, np.int64)
        np.add.at(tokens, bins, lengths)
        return cls(np.bincount(bins, minlength=count), tokens)

    def name(self, number: int) -> str:
        """The lengths of a bin."""
        if number < 2:
            return str(number)
        return f"{2 ** (number - 1):,}-{2**number - 1:,}"


def inspect(
    paths: Sequence[str], *, split: str = "train", documents: int = 3, picture: str = ""
) -> Iterator[str]:
    """Lines about one store, or several side by side; with `picture` the lengths as a PNG.

    Raises: InputError for a store that is not there or damaged, or a split without documents.
    """
    stores = {path: Store.open(path) for path in paths}
    splits = {path: store.split(split) for path, store in stores.items()}
    for path, part in splits.items():
        if part.counts.documents == 0:
            raise InputError(f"{path} has no documents in {split}", fix="another --split")
    total = sum(part.counts.tokens for part in splits.values())
    found: dict[str, Lengths] = {}
    for path, store in stores.items():
        part = splits[path]
        spans = part.spans()
        lengths = spans[:, 1] - spans[:, 0]
        found[path] = Lengths.of(lengths)
        yield from summary(path, store, split, total if len(paths) > 1 else 0)
        half, most = (f"{value:,.0f}" for value in np.percentile(lengths, (50, 99)))
        yield f"  tokens a document: mean {lengths.mean():,.1f}, half below {half}, 99% below {most}"
        yield from bars(found[path])
        if part.masked:
            bearing = learned(part)
            yield f"  tokens that bear loss: {bearing:,}, {bearing / len(part):.1%}"
        copies, of_texts = duplicates(part)
        yield f"  duplicates: {copies:,} documents are copies, of {of_texts:,} texts"
        # Evenly spaced, so that those of a large store are of all of it.
        for number in sorted({i * len(spans) // documents for i in range(documents)} if documents else ()):
            yield f"  document {number:,} of {len(spans):,}, {lengths[number]:,} tokens:"
            yield from text(store, part, *spans[number].tolist())
    if picture:
        draw(found, picture, split)
        yield f"lengths drawn in {picture}"


def summary(path: str, store: Store, split: str, total: int) -> Iterator[str]:
    """What the manifest says; `total` tokens of all stores give the share of this one."""
    manifest = store.manifest
    tokenizer = manifest.tokenizer
    yield f"{path}: tokenizer of {tokenizer.size:,} ids ({tokenizer.encoder}), {manifest.dtype}"
    for name, counts in manifest.splits.items():
        share = f", {counts.tokens / total:.1%} of all stores" if total and name == split else ""
        each = counts.bytes / max(1, counts.tokens - counts.documents - 1)
        yield (
            f"  {name}: {counts.documents:,} documents, {counts.tokens:,} tokens{share},"
            f" {counts.bytes:,} bytes, {each:.2f} a token"
        )
    if manifest.skipped:
        left_out = ", ".join(f"{count:,} {why}" for why, count in manifest.skipped.items())
        yield f"  left out when it was built: {left_out}"


def bars(lengths: Lengths) -> Iterator[str]:
    """A histogram as text, by documents."""
    tallest = int(lengths.documents.max())
    width = max(len(lengths.name(number)) for number in range(len(lengths.documents)))
    for number in np.flatnonzero(lengths.documents).tolist():
        count = int(lengths.documents[number])
        bar = "#" * max(1, round(BAR * count / tallest))
        share = lengths.tokens[number] / max(1, lengths.tokens.sum())
        yield f"  {lengths.name(number):>{width}} {bar:<{BAR}} {count:,} documents, {share:.1%} of tokens"


def duplicates(split: Split, *, block: int = BLOCK_TOKENS) -> tuple[int, int]:
    """How many documents are copies of one before them, and of how many texts.

    All tokens are read, some `block` at a time.

    Raises: InputError naming a damaged shard.
    """
    seen: Counter[bytes] = Counter()
    spans = split.spans()
    first = 0
    while first < len(spans):
        last = max(first + 1, int(np.searchsorted(spans[:, 1], spans[first, 0] + block)))
        base = int(spans[first, 0])
        tokens = split.tokens(base, int(spans[last - 1, 1]))
        for begin, end in (spans[first:last] - base).tolist():
            seen[hashlib.blake2b(tokens[begin:end].tobytes(), digest_size=16).digest()] += 1
        first = last
    repeated = [count for count in seen.values() if count > 1]
    return sum(repeated) - len(repeated), len(repeated)


def learned(split: Split, *, block: int = BLOCK_TOKENS) -> int:
    """How many tokens bear loss; all are read, some `block` at a time.

    Raises: InputError naming a damaged shard.
    """
    firsts = range(0, len(split), block)
    return sum(int(split.read_loss([(at, min(at + block, len(split)))])()[0].sum()) for at in firsts)


def text(store: Store, split: Split, first: int, last: int) -> Iterator[str]:
    """The beginning of a document, its lines marked."""
    whole = store.tokenizer.decode(split.tokens(first, min(last, first + CHARACTERS)).tolist())
    shown = whole[:CHARACTERS] + (" [...]" if last - first > CHARACTERS or len(whole) > CHARACTERS else "")
    yield from (f"    | {line}" for line in shown.splitlines() or [""])


def draw(found: Mapping[str, Lengths], path: str, split: str) -> None:
    """Each store's share of documents by length, and of tokens, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharex=True)
    for name, lengths in found.items():
        edges = np.append(0.5, 2.0 ** np.arange(len(lengths.documents)))
        for panel, counts in zip(axes, (lengths.documents, lengths.tokens), strict=True):
            panel.stairs(counts / max(1, counts.sum()), edges, label=name, linewidth=1.6)
    for panel, what in zip(axes, ("documents", "tokens"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens of a document")
        panel.set_title(f"share of {what}, {split}", loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    storage.write_bytes(path, picture.getvalue())
