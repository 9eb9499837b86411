"""What an optimizer adds to a sharded step: memory, messages and time beside Adam's, as compiled for TPUs.

    python benchmarks/optimizers.py

One Llama of 1.1 billion weights, sharded over 256 chips of v5e, its step compiled with each optimizer by
`mosaicjax plan` (libtpu, no TPU). Units: bytes a chip, bytes on the wire a chip and step, FLOPs a chip and
step, seconds a step.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine  # noqa: E402 after the path, for a call as a script

RESULT = ROOT / "benchmarks" / "optimizers.json"
TOPOLOGY = "v5e:16x16"
OPTIMIZERS = {
    "AdamW": "AdamW(lr=Cosine(peak=3e-4))",
    "Muon": "Muon(lr=Cosine(peak=3e-4))",
}
RECIPE = """\
from mosaicjax.data.mixture import TokenStore
from mosaicjax.mesh import Mesh
from mosaicjax.models import llama
from mosaicjax.models.decoder import Remat
from mosaicjax.muon import Muon
from mosaicjax.optim import AdamW, Cosine
from mosaicjax.recipe import Recipe
recipe = Recipe(
    model=llama.Config(layers=16, embed=2048, heads=16, mlp=7168, vocab=32000, remat=Remat.FULL),
    data=TokenStore("none"), seq=2048, batch=1024, steps=1000,
    optimizer={optimizer},
    mesh=Mesh(fsdp=(16, 16)),
)
"""


def planned(optimizer: str, folder: Path) -> dict[str, Any]:
    """What the plan of the step with this optimizer says."""
    recipe, out = folder / "recipe.py", folder / "plan.json"
    recipe.write_text(RECIPE.format(optimizer=optimizer))
    command = [sys.executable, "-m", "mosaicjax.cli", "plan", str(recipe), "--topology", TOPOLOGY]
    subprocess.run([*command, "--json", str(out)], cwd=ROOT, check=True)
    found = json.loads(out.read_text())
    return {
        "program": found["program"],
        "memory_bytes": found["memory"]["needed"],
        "state_bytes": found["memory"]["arguments"],
        "wire_bytes": found["wire_bytes"],
        "hbm_bytes": found["hbm_bytes"],
        "flops": found["flops"]["compiled"],
        "step_seconds": found["step_seconds"]["expected"],
        "versions": found["versions"],
    }


def main() -> int:
    """Plan each and write the result."""
    result: dict[str, Any] = {"machine": machine(("jax", "optax")), "topology": TOPOLOGY, "recipe": RECIPE}
    with tempfile.TemporaryDirectory() as folder:
        result["optimizers"] = {name: planned(text, Path(folder)) for name, text in OPTIMIZERS.items()}
    base = result["optimizers"]["AdamW"]
    for name, mine in result["optimizers"].items():
        shares = ", ".join(
            f"{figure.replace('_', ' ')} {mine[figure]:.4g} ({mine[figure] / base[figure]:.3f} of AdamW's)"
            for figure in ("memory_bytes", "state_bytes", "wire_bytes", "flops", "step_seconds")
        )
        print(f"{name}: {shares}")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
