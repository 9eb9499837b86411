"""`mosaicjax plan` in a process of its own: libtpu in a test's process has brought later tests down."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def planned(folder, recipe, *options):
    """The command's exit code, what it printed, its errors, and its JSON."""
    out = folder / "plan.json"
    words = [str(recipe), *options, "--json", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "mosaicjax.cli", "plan", *words],
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("mosaicjax:")]
    return done.returncode, done.stdout, errors, json.loads(out.read_text()) if out.exists() else None
