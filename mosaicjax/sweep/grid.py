"""What a sweep tries: values of a recipe's fields, and the recipe of every combination of them."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mosaicjax import recipe_file
from mosaicjax.checkpoint import complete_steps
from mosaicjax.errors import InputError
from mosaicjax.recipe_file import RECIPE_JSON, Loaded

SEED = "seed"
"""The field whose values are repeats of one setting, to be averaged over."""


@dataclass(frozen=True)
class Axis:
    """A field of the recipe, dotted, and the values to try, as typed."""

    name: str
    values: tuple[str, ...]

    @staticmethod
    def read(text: str) -> Axis:
        """The axis of `optimizer.lr.peak=1e-3,2e-3`.

        Raises:
            InputError: another form, or a value twice.
        """
        name, equals, listed = text.partition("=")
        values = tuple(value.strip() for value in listed.split(","))
        if not (name.strip() and equals and all(values)):
            raise InputError(
                "--over", expected="FIELD=VALUE,VALUE,..., as optimizer.lr.peak=1e-3,2e-3", got=text
            )
        if len(set(values)) < len(values):
            raise InputError(f"--over {name} has a value twice", got=listed)
        # Fields have underscores, options dashes: either may be typed.
        return Axis(name.strip().lstrip("-").replace("-", "_"), values)

    @property
    def option(self) -> str:
        """The option of `mosaicjax train` that sets it."""
        return "--" + self.name.replace("_", "-")

    @property
    def repeats(self) -> bool:
        """Whether its values are repeats of one setting."""
        return self.name == SEED

    @cached_property
    def numbers(self) -> tuple[float, ...] | None:
        """The values as finite numbers; None where one is none."""
        try:
            numbers = tuple(map(float, self.values))
        except ValueError:
            return None
        return numbers if all(map(math.isfinite, numbers)) else None


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: a value of each axis, the overrides that say so, the recipe, and the directory."""

    values: Mapping[str, str]
    overrides: tuple[str, ...]
    loaded: Loaded
    run: str

    @property
    def title(self) -> str:
        """Its values, for a person."""
        return ", ".join(f"{name} {value}" for name, value in self.values.items())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the resolved recipe and the classes of its file."""
        said = recipe_file.to_json(self.loaded.recipe) + recipe_file.code(self.loaded.source)
        return hashlib.sha256(said.encode()).hexdigest()


def read_axes(texts: Sequence[str], overrides: Sequence[str]) -> tuple[Axis, ...]:
    """All axes of a sweep.

    Raises:
        InputError: none, one twice, or one that is overridden too.
    """
    axes = tuple(map(Axis.read, texts))
    names = [axis.name for axis in axes]
    if not names:
        raise InputError("nothing to sweep", fix="--over optimizer.lr.peak=1e-3,2e-3,4e-3")
    given = {word.split("=")[0].replace("_", "-") for word in overrides if word.startswith("--")}
    for axis in axes:
        if names.count(axis.name) > 1:
            raise InputError(f"--over {axis.name} is given twice", fix="all its values in one")
        if axis.option in given:
            raise InputError(
                f"{axis.option} is given beside --over {axis.name}", fix="one of the two, with all values"
            )
    return axes


def cells(recipe: str, overrides: Sequence[str], axes: Sequence[Axis], out: str) -> list[Cell]:
    """Every combination, the last axis changing fastest, its recipe resolved and checked.

    Raises:
        InputError: a recipe, override or value that cannot be, two combinations that are one recipe, or a
            directory that another recipe was trained into.
    """
    found: list[Cell] = []
    seen: dict[str, Cell] = {}
    for combination in itertools.product(*(axis.values for axis in axes)):
        values = dict(zip((axis.name for axis in axes), combination, strict=True))
        mine = tuple(f"{axis.option}={values[axis.name]}" for axis in axes)
        loaded = recipe_file.load(recipe, [*overrides, *mine])
        loaded.recipe.program()
        cell = Cell(values, (*overrides, *mine), loaded, os.path.join(out, directory_name(values)))
        if (other := seen.setdefault(cell.digest, cell)) is not cell:
            raise InputError(
                f"two combinations of the sweep are one recipe: {other.title}; and {cell.title}",
                fix="each value once",
            )
        check_continues(cell)
        found.append(cell)
    return found


def directory_name(values: Mapping[str, str]) -> str:
    """The run directory of a combination within the sweep's: `optimizer.lr.peak=2e-3,seed=1`."""
    text = ",".join(f"{name}={value}" for name, value in values.items())
    plain = re.sub(r"[^A-Za-z0-9_.,=+-]", "_", text)[:150]
    # What a file system may not take is replaced, so that two values could meet.
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def check_continues(cell: Cell) -> None:
    """Refuse a directory whose run cannot go on with this recipe.

    Raises:
        InputError: with what differs.
    """
    steps = complete_steps(cell.run)
    if steps and os.path.exists(os.path.join(cell.run, RECIPE_JSON)):
        before = recipe_file.from_run(cell.run)
        recipe_file.check_code(before, cell.loaded, cell.run)
        recipe_file.check_continues(before.recipe, cell.loaded.recipe, cell.run, max(steps))
