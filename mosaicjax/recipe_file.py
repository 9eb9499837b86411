"""Recipes as files: read a Python file, change it from the command line, save it as JSON, compare two."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import io
import json
import shlex
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args, get_type_hints

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
    "data.path",
    "data.domains.*.path",
    "phases.*.data.path",
    "phases.*.data.domains.*.path",
    "skips",
    "on_spike",
    "loss.chunk",
    "optimizer.lr",
    "optimizer.weight_decay",
    "eval",
    "tasks",
    "save",
    "log",
    "price",
)
"""What a run may change when it goes on: these leave weights, optimizer state and data order as they were.

Tokens may lie elsewhere, but a checkpoint's digest of them must still fit; steps may be left out that are
still to come.
"""


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
            form: Any = tyro.conf.FlagConversionOff[tyro.conf.AvoidSubcommands[Recipe]]
            changed = tyro.cli(form, default=recipe, args=list(arguments), prog=program)
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise InputError(f"override: {_unboxed(said.getvalue())}") from stopped
    assert isinstance(changed, Recipe)
    return changed


def _unboxed(said: str) -> str:
    """What tyro says in a box with a title, which is drawn in dashes where the locale is plain."""
    lines = [line.strip(" │") for line in said.splitlines()[1:]]
    text = " ".join(line for line in lines if line.strip("-─╰╯"))
    return text.split(" For full helptext")[0]


def _same_option(given: str, option: str) -> bool:
    return given.replace("_", "-") == option


def options(recipe: Recipe) -> list[tuple[str, str]]:
    """Every option that `override` takes for this recipe, dotted, with its value as one would type it.

    A part that is None has no options: only the recipe's file can give one.
    """
    fields = flat(recipe).items()
    return [(f"--{name.replace('_', '-')}", _typed(value)) for name, value in fields if value is not None]


def _typed(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_typed, value))
    if isinstance(value, Mapping):
        return " ".join(_typed(part) for pair in value.items() for part in pair)
    return value.name if isinstance(value, Enum) else shlex.quote(str(value))


def option_names(recipe: Recipe) -> list[str]:
    """Every option that `override` takes for this recipe, dotted."""
    return [name for name, _ in options(recipe)]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A recipe's fields by dotted name; an empty list of parts has none."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts: dict[str, Any] = {}
        hints = get_type_hints(type(value))
        for field in dataclasses.fields(value):
            held = getattr(value, field.name)
            if held != () or not any(map(dataclasses.is_dataclass, get_args(hints[field.name]))):
                parts |= flat(held, f"{prefix}.{field.name}" if prefix else field.name)
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

    def put_together(value: Any, declared: type) -> Any:
        if not isinstance(value, Mapping):
            raise InputError(f"{RECIPE_JSON}: a part is no object", expected=declared.__name__, got=value)
        kind = _class(value.get("type", ""), declared)
        hints = get_type_hints(kind)
        names = {field.name for field in dataclasses.fields(kind)}
        unknown = set(value) - names - {"type"}
        if unknown:
            raise InputError(f"{RECIPE_JSON}: {kind.__name__} has no {', '.join(sorted(unknown))}")
        fields = {}
        for name in sorted(names & set(value)):
            try:
                fields[name] = convert.structure(value[name], hints[name])
            except InputError:
                raise
            except (TypeError, ValueError, cattrs.BaseValidationError, cattrs.errors.CattrsError) as error:
                hint = hints[name]
                raise InputError(
                    f"{RECIPE_JSON}: {kind.__name__}.{name}",
                    expected=hint.__name__ if isinstance(hint, type) else hint,
                    got=value[name],
                ) from error
        return kind(**fields)

    def plain(value: Any, declared: type) -> Any:
        # bool("False") is true and int(3.5) is 3: what is not there as such is refused.
        accepted = (int, float) if declared is float else declared
        if not isinstance(value, accepted) or isinstance(value, bool) != (declared is bool):
            raise TypeError(f"{value!r} is no {declared.__name__}")
        return declared(value)

    for declared in (bool, int, float, str):
        convert.register_structure_hook(declared, plain)
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
    except (json.JSONDecodeError, TypeError) as error:
        raise InputError(f"{RECIPE_JSON} cannot be read", got=error) from error
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
        return any(fnmatchcase(self.name, safe) or self.name.startswith(safe + ".") for safe in SAFE_CHANGES)

    @property
    def of_phase(self) -> bool:
        """Whether it is one of the recipe's phases."""
        return self.name.split(".")[0] == "phases"

    def __str__(self) -> str:
        before, after = ("(empty)" if value == "" else value for value in (self.before, self.after))
        return f"{self.name}: {before} -> {after}"


def code(source: str) -> str:
    """What a recipe file defines beside the recipe itself, whatever its comments and layout."""
    body = ast.parse(source).body
    kept = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return "\n".join(ast.dump(node) for node in kept)


def check_code(before: Loaded, after: Loaded, run: str) -> None:
    """Refuse to go on with classes or functions of a recipe's file that were edited.

    Raises:
        InputError: they differ from those that the run began with.
    """
    if f'"{MODULE}:' in to_json(after.recipe) and code(before.source) != code(after.source):
        raise InputError(
            f"{run} was trained by other code: the classes in the recipe's file were edited",
            expected=f"those of {storage.join(run, RECIPE_SOURCE)}",
            fix=f"another --out, with --init-from {run} to start from its weights",
        )


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


def check_continues(before: Recipe, after: Recipe, run: str, reached: int = 0) -> list[Change]:
    """What a run that goes on from the data step `reached` would change; phases that are still to come may.

    Raises:
        InputError: a change that is not on the list of safe ones.
    """
    found = changes(before, after)
    begun = [[later for later in recipe.phases if later.step < reached] for recipe in (before, after)]
    to_come = begun[0] == begun[1]
    unsafe = [change for change in found if not (change.safe or (to_come and change.of_phase))]
    if unsafe:
        raise InputError(
            f"{run} was trained by another recipe ({'; '.join(map(str, unsafe))})",
            expected=f"changes of {', '.join(SAFE_CHANGES)} and phases from data step {reached} on alone",
            fix=f"another --out, with --init-from {run} to start from its weights",
        )
    return found
