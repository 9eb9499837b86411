"""A compiled program, read from its text: computations, their instructions, and how often each runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mosaicjax.errors import InputError

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "s2": 2, "u2": 2, "s4": 4, "u4": 4}
"""Of dtypes whose names do not say it."""

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"\}(, execution_thread=\"[^\"]*\")?\s*$")
"""A computation's last line, where another core of the chip runs it (a v6e's SparseCore) with its name."""
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=")
_DECODER = json.JSONDecoder()
_PASSES = ("copy", "bitcast", "convert", "copy-done", "copy-start")
_Sum = tuple[int, int] | None


@dataclass(frozen=True)
class Leaf:
    """One array: dims, the order of dims from minor to major, its tile, and in which memory it lies.

    `space` 0 is HBM; on TPUs 1 is VMEM, and others hold scalars and flags.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def bits(self) -> int:
        """Of one entry."""
        if self.dtype in BITS:
            return BITS[self.dtype]
        digits = re.search(r"\d+", self.dtype)
        return int(digits.group()) if digits else 32

    @property
    def entries(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """What it takes where it lies: its minor dims filled up to whole tiles."""
        if not self.tile or len(self.order) != len(self.dims):
            return self.entries * self.bits // 8
        dims = list(self.dims)
        for dim, size in zip(self.order, reversed(self.tile), strict=False):
            dims[dim] = -(-dims[dim] // size) * size
        return math.prod(dims) * self.bits // 8


Shape = Leaf | tuple["Shape", ...]


def leaves(shape: Shape) -> Iterator[Leaf]:
    """All arrays of a shape, in order."""
    if isinstance(shape, Leaf):
        yield shape
    else:
        for part in shape:
            yield from leaves(part)


def hbm_bytes(shape: Shape) -> int:
    """What the arrays of a shape that lie in HBM take."""
    return sum(leaf.bytes for leaf in leaves(shape) if leaf.space == 0)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation; `rest` is what follows the operands."""

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...]
    literal: str
    rest: str
    root: bool

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The backend's notes."""
        return self._json("backend_config=")

    @cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it names."""
        found: list[str] = []
        for match in _CALLED.finditer(self.rest):
            end = self.rest.find("}", match.end()) if self.rest[match.end()] == "{" else -1
            text = self.rest[match.end() : end] if end >= 0 else self.rest[match.end() :].split(",", 1)[0]
            found += _NAME.findall(text)
        return tuple(found)

    @property
    def place(self) -> str:
        """The name that jax gave it: functions, scopes and primitive, parted by slashes."""
        return self.attribute("op_name")

    @property
    def target(self) -> str:
        """What a custom call calls."""
        return self.attribute("custom_call_target")

    @property
    def cycles(self) -> int | None:
        """The compiler's own estimate for one run, None where it makes none."""
        found = self.config.get("window_config", {}).get("estimated_cycles")
        return None if found is None else int(found)

    @property
    def modelled(self) -> bool:
        """Whether the compiler has a cost model for it; its estimate is a guess elsewhere, and it says so."""
        kind = self.config.get("window_config", {}).get("cost_model_type", "COST_MODEL_TYPE_INVALID")
        return bool(kind != "COST_MODEL_TYPE_INVALID")

    @property
    def estimate(self) -> Mapping[str, int] | None:
        """What a kernel says of itself: `flops`, `transcendentals`, `bytes_accessed`."""
        found = self.config.get("custom_call_config", {}).get("cost_estimate")
        return None if found is None else {name: int(value) for name, value in found.items()}

    def attribute(self, name: str) -> str:
        """A quoted attribute, empty where there is none."""
        found = re.search(rf'\b{name}="([^"]*)"', self.rest)
        return found.group(1) if found else ""

    def number(self, name: str, default: int) -> int:
        """A whole number among the attributes."""
        found = re.search(rf"\b{name}=(\d+)", self.rest)
        return int(found.group(1)) if found else default

    def numbers(self, name: str) -> tuple[int, ...]:
        """A list such as `dimensions={1,2}`."""
        found = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.rest)
        return tuple(map(int, filter(None, found.group(1).split(",")))) if found else ()

    def names(self, attribute: str) -> str:
        """The computation that an attribute such as `body` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else ""

    def _json(self, begin: str) -> Mapping[str, Any]:
        at = self.rest.find(begin)
        if at < 0 or self.rest[at + len(begin) : at + len(begin) + 1] != "{":
            return {}
        found: Mapping[str, Any] = _DECODER.raw_decode(self.rest, at + len(begin))[0]
        return found


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they are scheduled."""

    name: str
    instructions: Mapping[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        """What it returns."""
        return next(each for each in self.instructions.values() if each.root)

    @cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """Who reads what each instruction gives."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for each in self.instructions.values():
            for operand in dict.fromkeys(each.operands):
                found[operand].append(each)
        return {name: tuple(some) for name, some in found.items()}

    @cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """In the order of the arguments."""
        found = [each for each in self.instructions.values() if each.opcode == "parameter"]
        return tuple(sorted(found, key=lambda each: int(each.literal)))

    def operands(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """Who makes what an instruction reads."""
        return tuple(self.instructions[name] for name in instruction.operands)


@dataclass(frozen=True)
class Module:
    """A whole program."""

    computations: Mapping[str, Computation]
    entry: str

    def turns(self, loop: Instruction, within: Computation) -> int:
        """How often a while loop runs its body.

        Raises:
            InputError: its condition is no comparison with a number that is known.
        """
        known = loop.config.get("known_trip_count", {}).get("n")
        if known is not None:
            return int(known)
        condition = self.computations[loop.names("condition")]
        root = condition.root
        if root.opcode == "fusion":
            inner = self.computations[root.called[0]]
            outer = {
                p.name: condition.instructions[name]
                for p, name in zip(inner.parameters, root.operands, strict=True)
            }
            counter, bound = (outer.get(name, inner.instructions[name]) for name in inner.root.operands)
            root = inner.root
        else:
            counter, bound = condition.operands(root)
        first, stride = self._start(counter, loop, within), self._stride(counter, loop)
        if root.opcode != "compare" or bound.opcode != "constant" or first is None or stride < 1:
            raise InputError(f"the loop {loop.name} in the compiled program has no known number of turns")
        return -(-(int(bound.literal) - first + ("direction=LE" in root.rest)) // stride)

    def _start(self, counter: Instruction, loop: Instruction, within: Computation) -> int | None:
        """What a loop's counter is before its first turn."""
        if counter.opcode != "get-tuple-element":
            return None
        tuple_ = within.instructions[loop.operands[0]]
        if tuple_.opcode != "tuple":
            return None
        first = within.instructions[tuple_.operands[counter.number("index", 0)]]
        while first.opcode in _PASSES:
            first = within.instructions[first.operands[0]]
        return int(first.literal) if first.opcode == "constant" else None

    def _stride(self, counter: Instruction, loop: Instruction) -> int:
        """What a turn adds to a loop's counter; 0 where that is not known."""
        if counter.opcode != "get-tuple-element":
            return 0
        index, body = counter.number("index", 0), self.computations[loop.names("body")]
        state = body.parameters[0].name

        def sum_of(within: Computation, each: Instruction, given: Mapping[str, _Sum]) -> _Sum:
            """An instruction as so many times the counter and a number; `given` are its body's arguments."""
            if each.opcode == "constant":
                return (0, int(each.literal)) if re.fullmatch(r"-?\d+", each.literal) else None
            if each.opcode == "parameter":
                return given.get(each.name)
            if each.opcode == "get-tuple-element":
                source = within.instructions[each.operands[0]]
                if within is body and source.name == state:
                    return (1, 0) if each.number("index", 0) == index else None
                return inside(within, source, given, each.number("index", 0))
            if each.opcode == "fusion":
                return inside(within, each, given, None)
            if each.opcode not in (*_PASSES, "add"):
                return None
            parts = [sum_of(within, source, given) for source in within.operands(each)]
            known = [part for part in parts if part is not None]
            return (sum(n for n, _ in known), sum(c for _, c in known)) if len(known) == len(parts) else None

        def inside(
            within: Computation, call: Instruction, given: Mapping[str, _Sum], which: int | None
        ) -> _Sum:
            if call.opcode != "fusion":
                return None
            inner = self.computations[call.called[0]]
            arguments = {
                # Arrays among them are no part of a counter.
                p.name: sum_of(within, source, given) if isinstance(source.shape, Leaf) else None
                for p, source in zip(inner.parameters, within.operands(call), strict=True)
            }
            root = inner.root if which is None else inner.instructions[inner.root.operands[which]]
            return sum_of(inner, root, arguments)

        times, added = sum_of(body, body.instructions[body.root.operands[index]], {}) or (0, 0)
        return added if times == 1 else 0


def _whole_lines(text: str) -> Iterator[str]:
    """Lines of a program; those that a kernel's metadata breaks are put together again."""
    held = ""
    for line in text.splitlines():
        begins = line.startswith(("  %", "  ROOT ")) or _END.match(line) or not held.startswith("  ")
        if begins:
            if held:
                yield held
            held = line.rstrip()
        else:
            held += line
    if held:
        yield held


def read(text: str) -> Module:
    """A program from the text that `compiled.as_text()` gives.

    Raises:
        ValueError: it is no such text.
    """
    computations: dict[str, Computation] = {}
    entry, name, instructions = "", "", {}
    for line in _whole_lines(text):
        if line.startswith(" ") and name:
            each = _instruction(line)
            instructions[each.name] = each
        elif _END.match(line) and name:
            computations[name] = Computation(name, instructions)
            name = ""
        elif (header := _HEADER.match(line)) and " -> " in line:
            name, instructions = header.group(2), {}
            entry = name if header.group(1) else entry
    if not entry:
        raise ValueError("no compiled program: it has no ENTRY")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    text = line.strip()
    root = text.startswith("ROOT ")
    name, _, text = text.removeprefix("ROOT ").partition(" = ")
    shape, at = _shape(text, 0)
    opcode, _, _ = text[at:].strip().partition("(")
    begin = text.index("(", at) + 1
    end = _closing(text, begin)
    inside = text[begin:end]
    operands = tuple(_NAME.findall(inside)) if opcode not in ("constant", "parameter") else ()
    return Instruction(name.lstrip("%"), opcode, shape, operands, inside, text[end + 1 :], root)


def _shape(text: str, at: int) -> tuple[Shape, int]:
    """The shape that begins at a place, and the place behind it."""
    if text[at] != "(":
        match = _SHAPE.match(text, at)
        assert match, f"no shape in {text[at : at + 60]!r}"
        return _leaf(*match.groups()), match.end()
    parts, at = [], at + 1
    while text[at] != ")":
        if text.startswith("/*", at):
            at = text.index("*/", at) + 2
        elif text[at] in ", ":
            at += 1
        else:
            part, at = _shape(text, at)
            parts.append(part)
    return tuple(parts), at + 1


def _leaf(dtype: str, dims: str, layout: str | None) -> Leaf:
    sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
    order, _, notes = (layout or "").partition(":")
    tile = re.search(r"T\(([\d,]+)\)", notes)
    space = re.search(r"S\((\d+)\)", notes)
    return Leaf(
        dtype,
        sizes,
        tuple(int(dim) for dim in order.split(",") if dim),
        tuple(int(size) for size in tile.group(1).split(",")) if tile else (),
        int(space.group(1)) if space else 0,
    )


def _closing(text: str, at: int) -> int:
    """Where the bracket closes that was opened before a place."""
    depth = 1
    for match in re.finditer(r"[()]", text[at:]):
        depth += 1 if match.group() == "(" else -1
        if not depth:
            return at + match.start()
    raise ValueError(f"a bracket that nothing closes: {text[:80]!r}")
