"""What figures were measured on and with, and how they are summed up; what every benchmark's JSON holds."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GIGA = 10**9


def commit() -> str:
    """What is checked out, and whether it was changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")


def machine(packages: Iterable[str]) -> dict[str, Any]:
    """Processor, cores, memory, load, system, versions, commit and date."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    memory = Path("/proc/meminfo").read_text().splitlines()[0].split()[1]
    return {
        "cpu": next(
            (line.split(":")[1].strip() for line in info if line.startswith("model name")), "unknown"
        ),
        "cores": os.cpu_count(),
        "memory_gb": round(int(memory) * 1024 / GIGA, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "load_average": os.getloadavg()[0],
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
