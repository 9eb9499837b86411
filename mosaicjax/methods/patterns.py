"""Patterns of weights' names, for methods that treat some weights otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from mosaicjax.errors import InputError
from mosaicjax.spec import LAYER_KEY, Param, Spec

_SHOWN = 12


def names(name: str, param: Param) -> list[str]:
    """What patterns are compared with: a weight's name, or one for each layer that a stacked weight holds.

    `stacks/0/0/layer/mlp/up` of layers 0 and 1 is `layer/0/mlp/up` and `layer/1/mlp/up`. Names are those that
    `mosaicjax show` prints.
    """
    if param.layers is None:
        return [name]
    rest = name.split(f"{LAYER_KEY}/", 1)[-1]
    layers = param.layers
    return [f"{LAYER_KEY}/{layers.first + turn * layers.stride}/{rest}" for turn in range(layers.count)]


def matches(spec: Spec, patterns: Sequence[str], where: str) -> dict[str, list[int | None]]:
    """For every weight, layer by layer, the number of the first pattern that it matches, or None.

    `*` stands for anything, `/` among it, `?` for a character, `[0-3]` for one of those.

    Raises:
        InputError: no patterns, or one that matches no weight first; `where` names the knob.
    """
    if not patterns:
        raise InputError(where, expected="at least one pattern of weights' names", got="none")
    known = {name: names(name, param) for name, param in spec.items()}

    def first(name: str) -> int | None:
        return next((i for i, pattern in enumerate(patterns) if fnmatchcase(name, pattern)), None)

    found = {weight: [first(name) for name in every] for weight, every in known.items()}
    used = {number for numbers in found.values() for number in numbers}
    idle = [pattern for i, pattern in enumerate(patterns) if i not in used]
    if idle:
        every = [name for some in known.values() for name in some]
        more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
        raise InputError(
            f"{where}: {idle[0]!r} matches no weight that is trained and that no pattern before it matches",
            expected=f"a pattern of names such as {', '.join(every[:_SHOWN])}{more}",
        )
    return found
