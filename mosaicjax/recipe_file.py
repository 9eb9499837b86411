"""Recipes as files: read a Python file, change it from the command line, save it as JSON, compare two."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import io
import json
import re
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import cattrs
import tyro

from mosaicjax import storage
from mosaicjax.errors import InputError
from mosaicjax.recipe import Recipe

MODULE = "mosaicjax_recipe"
"""Name under which a recipe's file is imported; its own classes carry it."""

RECIPE_JSON = "recipe.json"
RECIPE_SOURCE = "recipe.py"

SAFE_CHANGES = (
    "steps",
    "microbatch",
    "mesh",
    "model.remat",
    "loss.chunk",
    "optimizer.lr",
    "optimizer.weight_decay",
    "eval",
    "save",
    "log",
    "price",
)
"""What a run may change when it goes on: these leave weights, optimizer state and data order as they were."""


@dataclass(frozen=True)
class Loaded:
    """A recipe with the text of the file that defines its own classes ("" where there is none)."""

    recipe: Recipe
    source: str
    name: str


def load(path: str, overrides: Sequence[str] = ()) -> Loaded:
    """The recipe of a Python file, or of a run directory, with overrides applied.

    Raises:
        InputError: no such file, a file that does not import or has no `recipe`, an unknown override.
    """
    if path.endswith(".py"):
        loaded = from_file(path)
    elif storage.exists(storage.join(path, RECIPE_JSON)):
        loaded = from_run(path)
    else:
        raise InputError(f"no recipe at {path}", expected="a .py file, or a run directory with recipe.json")
    recipe = override(loaded.recipe, overrides, path) if overrides else loaded.recipe
    recipe.check()
    return dataclasses.replace(loaded, recipe=recipe)


def from_file(path: str) -> Loaded:
    """Import a recipe file.

    Raises:
        InputError: naming the line where it fails.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError("no such recipe", got=path, fix="`ls recipes` lists those that come with mosaicjax")
    source = file.read_text(encoding="utf-8")
    module = import_source(source, path)
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise InputError(
            f"{path} defines no recipe", expected="recipe = Recipe(...)", got=type(recipe).__name__
        )
    return Loaded(recipe, source, file.stem)


def import_source(source: str, path: str) -> types.ModuleType:
    """A recipe's text as a module.

    Raises:
        InputError: with the error and the line of the file.
    """
    spec = importlib.util.spec_from_loader(MODULE, loader=None, origin=path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = path
    sys.modules[MODULE] = module
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:
        line = next((at.tb_lineno for at in _frames(error) if at.tb_frame.f_code.co_filename == path), None)
        line = error.lineno if isinstance(error, SyntaxError) else line
        where = f"{path}, line {line}" if line else path
        raise InputError(f"the recipe does not import: {where}: {type(error).__name__}: {error}") from error
    return module


def _frames(error: BaseException) -> list[types.TracebackType]:
    frames, at = [], error.__traceback__
    while at is not None:
        frames.append(at)
        at = at.tb_next
    return frames[::-1]


def override(recipe: Recipe, arguments: Sequence[str], program: str) -> Recipe:
    """The recipe with command-line options such as `--optimizer.lr.peak 3e-4` in it.

    Raises:
        InputError: an option that the recipe lacks, with the nearest that it has, or a value of a wrong type.
    """
    known = option_names(recipe)
    for argument in arguments:
        name = argument.split("=")[0]
        if name.startswith("--") and not any(_same_option(name, option) for option in known):
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            raise InputError(
                f"unknown override {name}",
                fix=f"did you mean {' or '.join(near)}?"
                if near
                else "`mosaicjax train RECIPE --show-overrides` lists them",
            )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            changed = tyro.cli(
                tyro.conf.AvoidSubcommands[Recipe], default=recipe, args=list(arguments), prog=program
            )
    except SystemExit as stopped:
        if not stopped.code:
            raise
        text = " ".join(re.sub(r"[╭╮╰╯│─]+", " ", said.getvalue()).split())
        raise InputError(f"override: {text.split(' For full helptext')[0]}") from stopped
    assert isinstance(changed, Recipe)
    return changed


def _same_option(given: str, option: str) -> bool:
    given, option = (name.lstrip("-").replace("_", "-") for name in (given, option))
    return given == option or given == ".".join(
        [*option.split(".")[:-1], "no-" + option.split(".")[-1]]
    ).lstrip(".")


def options(recipe: Recipe) -> list[tuple[str, Any]]:
    """Every option that `override` takes for this recipe, dotted, with its value."""
    return [(f"--{name.replace('_', '-')}", value) for name, value in flat(recipe).items()]


def option_names(recipe: Recipe) -> list[str]:
    """Every option that `override` takes for this recipe, dotted."""
    return [name for name, _ in options(recipe)]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A recipe's fields by dotted name; a part that could be another class also appears by its class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            parts |= flat(getattr(value, field.name), f"{prefix}.{field.name}" if prefix else field.name)
        return parts
    if isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value):
        parts = {}
        for i, item in enumerate(value):
            parts |= flat(item, f"{prefix}.{i}")
        return parts
    return {prefix: value}


def tag(kind: type) -> str:
    """A class by module and name."""
    return f"{kind.__module__}:{kind.__qualname__}"


def converter() -> cattrs.Converter:
    """Dataclasses to JSON and back, each tagged with its class; an unknown key is refused."""
    convert = cattrs.Converter(forbid_extra_keys=True)

    def take_apart(value: Any) -> dict[str, Any]:
        fields = {
            field.name: convert.unstructure(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
        return {"type": tag(type(value)), **fields}

    def put_together(value: Mapping[str, Any], declared: type) -> Any:
        kind = _class(value.get("type", ""), declared)
        hints = get_type_hints(kind)
        names = {field.name for field in dataclasses.fields(kind)}
        unknown = set(value) - names - {"type"}
        if unknown:
            raise InputError(f"{RECIPE_JSON}: {kind.__name__} has no {', '.join(sorted(unknown))}")
        fields = {name: convert.structure(value[name], hints[name]) for name in names if name in value}
        return kind(**fields)

    convert.register_unstructure_hook_func(dataclasses.is_dataclass, take_apart)
    convert.register_structure_hook_func(dataclasses.is_dataclass, put_together)
    return convert


def _class(name: str, declared: type) -> type:
    module, _, qualified = name.partition(":")
    try:
        kind: Any = importlib.import_module(module)
        for part in qualified.split("."):
            kind = getattr(kind, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{RECIPE_JSON} names a class that is not there", got=name) from error
    if not (isinstance(kind, type) and issubclass(kind, declared)):
        raise InputError(f"{RECIPE_JSON}: a part of another kind", expected=declared.__name__, got=name)
    return kind


def to_json(recipe: Recipe) -> str:
    """The resolved recipe as text; equal recipes give equal text."""
    return json.dumps(converter().unstructure(recipe), indent=1) + "\n"


def from_json(text: str) -> Recipe:
    """The recipe of `to_json`.

    Raises:
        InputError: not JSON, or an unknown key or class.
    """
    try:
        recipe = converter().structure(json.loads(text), Recipe)
    except (json.JSONDecodeError, cattrs.BaseValidationError, TypeError) as error:
        reasons = (
            "; ".join(cattrs.transform_error(error))
            if isinstance(error, cattrs.BaseValidationError)
            else error
        )
        raise InputError(f"{RECIPE_JSON} cannot be read", got=reasons) from error
    return recipe


def from_run(run: str) -> Loaded:
    """The resolved recipe of a run directory, from that alone."""
    source_path = storage.join(run, RECIPE_SOURCE)
    source = storage.read_text(source_path) if storage.exists(source_path) else ""
    text = storage.read_text(storage.join(run, RECIPE_JSON))
    if f'"{MODULE}:' in text:
        import_source(source, source_path)
    return Loaded(from_json(text), source, Path(run.rstrip("/")).name)


def save(run: str, loaded: Loaded) -> None:
    """Put the resolved recipe and its source into a run directory."""
    if loaded.source:
        storage.write_text(storage.join(run, RECIPE_SOURCE), loaded.source)
    storage.write_text(storage.join(run, RECIPE_JSON), to_json(loaded.recipe))


@dataclass(frozen=True)
class Change:
    """A field that differs between two recipes."""

    name: str
    before: Any
    after: Any

    @property
    def safe(self) -> bool:
        """Whether a run may go on with it."""
        return any(self.name == safe or self.name.startswith(safe + ".") for safe in SAFE_CHANGES)

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.after}"


def changes(before: Recipe, after: Recipe) -> list[Change]:
    """What differs, by dotted name, classes too."""
    old, new = _flat_json(json.loads(to_json(before))), _flat_json(json.loads(to_json(after)))
    absent = "(none)"
    names = [name for name in {**old, **new} if old.get(name, absent) != new.get(name, absent)]
    return [Change(name, old.get(name, absent), new.get(name, absent)) for name in names]


def _flat_json(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
        parts: dict[str, Any] = {}
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            parts |= _flat_json(item, f"{prefix}.{key}" if prefix else str(key))
        return parts
    return {prefix: value}


def check_continues(before: Recipe, after: Recipe, run: str) -> list[Change]:
    """What a run that goes on would change.

    Raises:
        InputError: a change that is not on the list of safe ones.
    """
    found = changes(before, after)
    unsafe = [change for change in found if not change.safe]
    if unsafe:
        raise InputError(
            f"{run} was trained by another recipe ({'; '.join(map(str, unsafe))})",
            expected=f"changes of {', '.join(SAFE_CHANGES)} alone",
            fix=f"another --out, with --init-from {run} to start from its weights",
        )
    return found
