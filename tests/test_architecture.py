"""Who may import whom: modules stand on floors, and arrows run down."""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mosaicjax"

FLOORS = {
    "adapters": 0,
    "errors": 0,
    "storage": 0,
    "host_memory": 0,
    "processes": 0,
    "spec": 0,
    "mesh": 0,
    "hardware": 0,
    "kernels": 1,
    "layers": 2,
    "models": 3,
    "data": 3,
    "optim": 3,
    "muon": 3,
    "polar": 2,
    "schedule_free": 3,
    "losses": 3,
    "program": 4,
    "spikes": 4,
    "clocks": 6,
    "stop_request": 6,
    "methods": 5,
    "recipe": 6,
    "recipe_file": 6,
    "roll_back": 6,
    "saved": 6,
    "accumulate": 6,
    "run": 6,
    "run_data": 6,
    "step": 6,
    "feed": 6,
    "nonfinite": 6,
    "checkpoint": 6,
    "checkpoint_arrays": 6,
    "hub": 6,
    "log": 6,
    "evaluate": 6,
    "report": 6,
    "train": 7,
    "generate": 7,
    "finish": 7,
    "show": 7,
    "plan": 7,
    "serve": 7,
    "bench_serve": 7,
    "sweep": 8,
    "harness": 8,
    "cli": 10,
    "cli_bench": 8,
    "cli_data": 8,
    "cli_eval": 9,
    "cli_serve": 9,
}

OUTSIDE = ("tests", "recipes", "benchmarks")

# Slow to import and needed by few commands: they are imported by the function that needs them.
LAZY = {
    "datasets",
    "deltalake",
    "jinja2",
    "lm_eval",
    "matplotlib",
    "moto",
    "pyarrow",
    "pyspark",
    "pytest",
    "qwix",
    "sentencepiece",
    "tensorboardX",
    "yaml",
}


def modules(package: Path) -> dict[str, Path]:
    """Every module below a package by its dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: Iterable[str]) -> set[str]:
    """The modules that one module imports, anywhere in it, as far as they are known or of OUTSIDE."""
    known = set(known)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    targets: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            targets |= {nearest(alias.name, known) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - (node.level - 1)] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets |= {nearest(f"{base}.{alias.name}", known) for alias in node.names}
    return targets - {"", name}


def nearest(dotted: str, known: set[str]) -> str:
    """The longest known module that a dotted name begins with, or the name's top if that is of OUTSIDE."""
    while dotted and dotted not in known:
        if dotted in OUTSIDE:
            return dotted
        dotted = dotted.rpartition(".")[0]
    return dotted


def room(name: str) -> str:
    """`data` of `mosaicjax.data.store`; empty for the package itself."""
    return name.split(".")[1] if "." in name else ""


def violations(package: Path, floors: Mapping[str, int]) -> list[str]:
    """What is wrong with the imports of a package, one line each; empty when nothing is."""
    known = modules(package)
    arrows = {name: imported(name, path, known) for name, path in known.items()}
    found = [
        f"{name} stands on no floor: give {room(name)!r} one in tests/test_architecture.py"
        for name in known
        if room(name) and room(name) not in floors
    ]
    for name, targets in arrows.items():
        for target in sorted(targets):
            if target in OUTSIDE:
                found.append(f"{name} imports {target}/, which is no part of the package")
            elif room(name) in floors and room(target) in floors:
                here, there = floors[room(name)], floors[room(target)]
                if there > here:
                    found.append(f"{name} (floor {here}) imports {target} (floor {there}): the arrow runs up")
    inner = {name: targets - set(OUTSIDE) for name, targets in arrows.items()}
    rooms: dict[str, set[str]] = {}
    for name, targets in inner.items():
        rooms.setdefault(room(name), set()).update({room(t) for t in targets} - {room(name)})
    for graph, what in ((inner, "modules"), (rooms, "rooms")):
        found += [f"a circle of {what}: {' -> '.join([*circle, circle[0]])}" for circle in circles(graph)]
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """One circle for each place where a walk along the arrows meets itself."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append(path[path.index(name) :])
            return
        if name in done:
            return
        for target in sorted(graph.get(name, ())):
            walk(target, [*path, name])
        done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return found


def tree(root: Path, files: Mapping[str, str]) -> Path:
    package = root / "house"
    for name, text in {"__init__.py": "", **files}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


def test_arrows_run_down():
    found = violations(PACKAGE, FLOORS)
    assert not found, "\n" + "\n".join(found)


def test_heavy_libraries_wait_for_their_use():
    found = []
    for name, path in modules(PACKAGE).items():
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{name} imports {n} at its top" for n in names if n.split(".")[0] in LAZY]
    assert not found, "\n" + "\n".join(found)


UPWARD = "house.low (floor 0) imports house.high.room (floor 1): the arrow runs up"


@pytest.mark.parametrize(
    "line",
    [
        "import house.high.room",
        "from house.high import room",
        "from house.high.room import thing",
        "from .high import room",
        "def late():\n    from house.high.room import thing",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.high.room import thing",
    ],
)
def test_a_planted_upward_arrow_is_caught(tmp_path, line):
    package = tree(tmp_path, {"low.py": line, "high/__init__.py": "", "high/room.py": "thing = 1"})
    assert violations(package, {"low": 0, "high": 1}) == [UPWARD]


def test_downward_and_level_arrows_pass(tmp_path):
    package = tree(
        tmp_path,
        {
            "low.py": "import os",
            "beside.py": "from house import low",
            "high/__init__.py": "from house.high.room import thing",
            "high/room.py": "from ..low import os as thing\nfrom . import other",
            "high/other.py": "from ..beside import low",
        },
    )
    assert violations(package, {"low": 0, "beside": 0, "high": 1}) == []


def test_a_planted_circle_of_modules_is_caught(tmp_path):
    package = tree(
        tmp_path,
        {"a.py": "import house.b", "b.py": "from house.c import x", "c.py": "from . import a\nx = 1"},
    )
    found = violations(package, {"a": 0, "b": 0, "c": 0})
    assert "a circle of modules: house.a -> house.b -> house.c -> house.a" in found


def test_a_planted_circle_of_rooms_is_caught(tmp_path):
    # No module waits for itself here, but neither room can be read without the other.
    package = tree(
        tmp_path,
        {"a/one.py": "import house.b.one", "a/two.py": "", "b/one.py": "", "b/two.py": "import house.a.two"},
    )
    assert violations(package, {"a": 0, "b": 0}) == ["a circle of rooms: a -> b -> a"]


def test_a_module_on_no_floor_is_caught(tmp_path):
    package = tree(tmp_path, {"attic.py": ""})
    assert violations(package, {}) == [
        "house.attic stands on no floor: give 'attic' one in tests/test_architecture.py"
    ]


def test_leaning_on_what_is_outside_is_caught(tmp_path):
    package = tree(tmp_path, {"low.py": "from tests.helpers import x"})
    assert violations(package, {"low": 0}) == ["house.low imports tests/, which is no part of the package"]
