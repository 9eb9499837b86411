"""Run a stored result again, from its own commit, and say whether it lies within the spread that it recorded.

    python benchmarks/reproduce.py benchmarks/cost_per_token.124M.json
    python benchmarks/reproduce.py benchmarks/cost_per_token.124M.json -- --rounds 1 --peers PyTorch

A result names its script, the script's arguments and its commit. That commit is laid out beside this tree,
its script is run with the packages of this environment, and each figure recorded as a median with a least and
a most is compared: the new median must lie between them, give or take `--slack`. What comes after `--` is
added to the recorded arguments; figures that are then not measured are counted as such. Ends with 0 where all
lie within, with 1 where one does not, with 2 where the result cannot be run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine  # noqa: E402 after the path, for a call as a script
from mosaicjax.errors import InputError  # noqa: E402

SPREAD = {"median", "least", "most"}


def spreads(found: Any, name: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    """Figures recorded with their spread, by their path in the result."""
    if isinstance(found, dict):
        if SPREAD <= found.keys():
            yield name, found
            return
        for key, value in found.items():
            yield from spreads(value, f"{name}/{key}" if name else str(key))


def compare(before: Any, now: Any, slack: float) -> tuple[list[str], int, int]:
    """A line a figure, how many lie outside, and how many were not measured again.

    `slack` is the share of a recorded bound by which a figure may pass it.
    """
    fresh = dict(spreads(now))
    lines, outside, missing = [], 0, 0
    for name, old in spreads(before):
        if name not in fresh:
            missing += 1
            continue
        new = fresh[name]["median"]
        within = old["least"] * (1 - slack) <= new <= old["most"] * (1 + slack)
        outside += not within
        lines.append(
            f"{'within ' if within else 'OUTSIDE'}  {name}: {new:.4g}; recorded"
            f" {old['median']:.4g} ({old['least']:.4g} to {old['most']:.4g})"
        )
    return lines, outside, missing


def recorded(path: Path) -> tuple[dict[str, Any], str, list[str], str]:
    """A result, its script, its arguments and its commit.

    Raises:
        InputError: no such file, or no record of how it was made.
    """
    if not path.is_file():
        raise InputError("no such result", got=path, fix="`ls benchmarks/*.json` lists them")
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is no JSON", got=str(error)) from None
    if not isinstance(found, dict) or "script" not in found:
        raise InputError(f"{path} does not say what made it", expected="script, arguments and machine")
    commit = str(found["machine"]["commit"])
    if not commit or commit.endswith("+changes"):
        raise InputError(
            f"{path} was measured on a tree that is in no commit",
            expected="a commit",
            got=commit or "none",
            fix="measure it again from a clean tree",
        )
    return found, found["script"], list(found["arguments"]), commit


def git(*arguments: str) -> None:
    """Run git here.

    Raises:
        InputError: it failed.
    """
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise InputError(f"git {arguments[0]} failed", got=said[-1] if said else "nothing said")


def rerun(path: Path, more: Sequence[str], slack: float) -> int:
    """Measure again, print, and give the exit code."""
    before, script, arguments, commit = recorded(path)
    with tempfile.TemporaryDirectory() as scratch:
        tree, out = Path(scratch) / "tree", Path(scratch) / "out.json"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            command = [sys.executable, str(tree / script), *arguments, *more, "--out", str(out)]
            code = subprocess.run(command, cwd=ROOT).returncode
        finally:
            git("worktree", "remove", "--force", str(tree))
        if code or not out.is_file():
            raise InputError(f"{script} at {commit[:12]} ended without a result", got=f"exit code {code}")
        now = json.loads(out.read_text())
    here = machine(tuple(before["machine"]["packages"]))
    for part in ("cpu", "cores", "python", "packages"):
        if here[part] != before["machine"][part]:
            print(f"differs  {part}: {here[part]}; recorded {before['machine'][part]}")
    lines, outside, missing = compare(before, now, slack)
    print("\n".join(lines))
    print(f"{len(lines)} figures, {outside} outside their spread, {missing} not measured again")
    return 1 if outside else 0


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--slack", type=float, default=0.02, help="(default: 0.02)")
    parser.add_argument("more", nargs="*", help="arguments for the script, after --")
    options = parser.parse_args(argv)
    try:
        return rerun(options.result, options.more, options.slack)
    except InputError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
