"""Which documents a build leaves out: plain functions of a text, true for those to keep."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence

from mosaicjax.errors import InputError

Filter = Callable[[str], bool]


def find(names: Sequence[str]) -> list[Filter]:
    """The functions of `MODULE:FUNCTION` names.

    Raises: InputError where there is none.
    """
    found = []
    for name in names:
        module, _, function = name.partition(":")
        try:
            value = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(
                f"no filter {name}", expected="MODULE:FUNCTION, to be imported from here", got=error
            ) from error
        found.append(value)
    return found


def described(filters: Sequence[Filter]) -> tuple[str, ...]:
    """What is known of each filter: its name, and a digest of its source.

    Raises: InputError for what worker processes could not import by name.
    """
    said = []
    for function in filters:
        name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
        if not inspect.isfunction(function) or "<" in name:
            raise InputError(
                "a filter must be a function of a module", expected="one that starts with `def`", got=name
            )
        try:
            source = inspect.getsource(function)
        except OSError as error:
            raise InputError(f"the source of the filter {name} is not there", got=error) from error
        said.append(f"{name} {hashlib.sha256(source.encode()).hexdigest()[:12]}")
    return tuple(said)


def first_against(filters: Sequence[Filter], text: str) -> int:
    """The number of the first filter that leaves a text out, from 1; 0 where all keep it.

    Raises: InputError for a filter that fails, with the text's beginning.
    """
    for number, keeps in enumerate(filters, 1):
        try:
            kept = keeps(text)
        except Exception as error:
            raise InputError(
                f"the filter {keeps.__module__}:{keeps.__qualname__} failed: {type(error).__name__}: {error}",
                got=f"a document that begins {text[:60]!r}",
            ) from error
        if not kept:
            return number
    return 0
