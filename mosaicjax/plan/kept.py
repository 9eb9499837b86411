"""Plans kept beside the compiled programs, found again by the program that a run lowers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mosaicjax.report.summary import Planned


def cache_dir() -> Path:
    """Where programs and plans are kept: under XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "mosaicjax" / "plan"


def keep(cache: Path, plan: dict[str, Any]) -> None:
    """Keep what a run may set its own figures beside: a plan's JSON, if it has a bill."""
    if "usd_per_million_tokens" not in plan:
        return
    path = _path(cache, plan["program"], plan["topology"]["name"].partition(":")[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(plan, allow_nan=False))
    os.replace(part, path)


def planned(program: str, chip: str) -> Planned | None:
    """What was planned last for this program on this kind of chip, None where nothing was here."""
    path = _path(cache_dir(), program, chip)
    if not path.exists():
        return None
    plan = json.loads(path.read_text())
    return Planned(plan["topology"]["name"], plan["tokens_per_second"], plan["usd_per_million_tokens"])


def _path(cache: Path, program: str, chip: str) -> Path:
    return cache / "bills" / f"{program}-{chip}.json"
