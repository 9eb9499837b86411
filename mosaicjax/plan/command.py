"""`mosaicjax plan`: one topology as a page, or several ranked by what a token costs on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from mosaicjax import recipe_file, storage
from mosaicjax.errors import InputError
from mosaicjax.hardware import Price
from mosaicjax.plan import analytic
from mosaicjax.plan.bill import Bill, bill
from mosaicjax.plan.fit import Fitting
from mosaicjax.plan.kept import cache_dir, keep
from mosaicjax.plan.picture import draw
from mosaicjax.plan.text import lines, to_json
from mosaicjax.plan.topology import Topology, compiler_there
from mosaicjax.recipe_file import Loaded
from mosaicjax.report.live import format_count, format_duration, format_usd

DOES_NOT_FIT = 1
"""The exit code where no topology holds the step."""


@dataclass(frozen=True)
class Wanted:
    """What the command line asks of a plan."""

    topologies: tuple[str, ...]
    slices: int = 1
    usd_per_chip_hour: float | None = None
    json: str = ""
    picture: str = ""
    cached: bool = True
    fit: bool = False


def plan(recipe: str, overrides: Sequence[str], wanted: Wanted, say: Callable[[str], None]) -> int:
    """Plan a recipe, print what came of it, and give the exit code.

    Raises:
        InputError: a topology, mesh, price or recipe that cannot be planned.
    """
    if not wanted.topologies:
        raise InputError("nothing to plan for", fix="--topology v5e:16x16, or --topologies A,B,C")
    topologies = [Topology.read(text, wanted.slices) for text in wanted.topologies]
    loaded = recipe_file.load(recipe, overrides)
    cache = cache_dir() if wanted.cached else None
    given = wanted.usd_per_chip_hour
    price = None if given is None else Price(given, "the command line", date.today().isoformat())
    if any(not each.timed for each in topologies) and (wanted.fit or len(topologies) > 1):
        raise InputError("a CPU has no known speed", expected="it alone, without --fit")
    phases = loaded.recipe.in_phases
    if len(phases) > 1 and (wanted.fit or len(topologies) > 1):
        raise InputError(
            "a recipe of phases is planned on one topology at a time",
            fix="--topology ONE without --fit, or a recipe of one of its phases",
        )
    if topologies[0].timed and not compiler_there():
        return _outline(loaded, topologies, price, wanted, say)
    fixes: list[list[str]] = []
    if wanted.fit:
        found = [Fitting(each, price, cache, say).search(loaded.recipe) for each in topologies]
        bills, fixes = [each for each, _ in found], [words for _, words in found]
    else:
        bills = [
            replace(bill(recipe, each, price=price, cache=cache, say=say), phase_steps=steps)
            for each in topologies
            for recipe, steps in phases
        ]
    if len(topologies) == 1:
        many = len(phases) > 1
        names = [f"{loaded.name}, phase {n}" if many else loaded.name for n in range(len(phases))]
        pages = [lines(each, name) for each, name in zip(bills, names, strict=True)]
    else:
        pages = [iter(ranking(bills))]
    for page in pages:
        for line in page:
            say(line)
    if len(phases) > 1 and all(each.fast and each.price for each in bills):
        usd, tokens = sum(each.run_usd for each in bills), loaded.recipe.tokens
        say(
            f"together  ${1e6 * usd / tokens:.4f} a million tokens; {format_count(tokens)} tokens:"
            f" {format_usd(usd)} in {format_duration(sum(each.run_seconds for each in bills))}"
        )
    for each, words in zip(bills, fixes, strict=False):
        say(f"fit       {each.topology.name}: {' '.join(words) or 'the recipe as it is'}")
    rows = [to_json(each, loaded.name) for each in bills]
    for row in rows:
        keep(cache_dir(), row)
    for row, words in zip(rows, fixes, strict=False):
        row["fit"] = words
    _write(wanted.json, rows)
    if wanted.picture:
        timed = [each for each in bills if each.fast is not None]
        cheapest = min(timed, key=lambda each: each.usd_per_million_tokens, default=bills[0])
        draw(cheapest, wanted.picture, loaded.name)
    return 0 if any(each.compiled.fits for each in bills) else DOES_NOT_FIT


def _outline(
    loaded: Loaded,
    topologies: Sequence[Topology],
    price: Price | None,
    wanted: Wanted,
    say: Callable[[str], None],
) -> int:
    """What can be said without the TPU compiler; `--fit` cannot."""
    if wanted.fit:
        raise InputError(
            "--fit compiles, and no TPU compiler is installed", fix="pip install 'mosaicjax[tpu]'"
        )
    found = [
        replace(analytic.estimate(recipe, each, price), phase_steps=steps)
        for each in topologies
        for recipe, steps in loaded.recipe.in_phases
    ]
    for each in sorted(found, key=lambda each: each.usd_per_million_tokens):
        for line in analytic.lines(each, loaded.name):
            say(line)
    _write(wanted.json, [analytic.to_json(each, loaded.name) for each in found])
    return 0


def _write(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """One plan as itself, several as a list."""
    if path:
        text = json.dumps(rows[0] if len(rows) == 1 else rows, indent=1, allow_nan=False)
        storage.write_text(path, text + "\n")


def ranking(bills: Sequence[Bill]) -> Sequence[str]:
    """A line a topology: cheapest token first, what does not fit last."""
    fitting = sorted((each for each in bills if each.compiled.fits), key=lambda b: b.usd_per_million_tokens)
    rows: list[tuple[str, ...]] = [
        ("topology", "$/M tokens", "tokens/s", "MFU causal", "full", "run", "days", "GiB a chip")
    ]
    for each in fitting:
        assert each.work, "what fits has been counted"
        rows.append(
            (
                each.topology.title,
                f"${each.usd_per_million_tokens:.4f}",
                format_count(each.tokens_per_second),
                f"{each.utilization(each.work.model):.1%}",
                f"{each.utilization(each.work.model_full):.1%}",
                format_usd(each.run_usd),
                f"{each.run_seconds / 86_400:,.1f}",
                f"{each.compiled.needed / 2**30:.2f}",
            )
        )
    for each in bills:
        if not each.compiled.fits:
            needed = f"{each.compiled.needed / 2**30:.2f}, does not fit"
            rows.append((each.topology.title, *["-"] * 6, needed))
    widths = [max(len(row[column]) for row in rows) for column in range(8)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
