"""What `make quickstart` left behind, checked: the model against gzip, and the time to its first step.

`check_quickstart.py RUN`, after `make quickstart`; exits with 1 where something falls short.
"""

import json
import subprocess
import sys
from pathlib import Path

# Of Python 3.11's standard library; that of other versions is other text.
BITS_PER_BYTE = 1.5
FIRST_STEP_SECONDS = 30
TRAINING_SECONDS = 360


def bits_by_name(run: Path) -> dict[str, int]:
    """The bits that `mosaicjax evaluate` prints, by what used them."""
    command = [sys.executable, "-m", "mosaicjax.cli", "evaluate", str(run)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    parts = (line.split(" bits,")[0].rsplit(maxsplit=1) for line in lines if " bits," in line)
    return {name.strip(): int(bits.replace(",", "")) for name, bits in parts}


def main() -> int:
    run = Path(sys.argv[1])
    bits = bits_by_name(run)
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    summary = json.loads((run / "summary.json").read_text())
    checks = [
        ("bits of the model below gzip -9's", bits["model"], bits["gzip -9"]),
        ("seconds to the first step", first["time"]["elapsed_seconds"], FIRST_STEP_SECONDS),
        ("bits a byte of held-out files", summary["heldout"]["bits_per_byte"], BITS_PER_BYTE),
        ("seconds of training", summary["seconds"]["train"], TRAINING_SECONDS),
    ]
    for what, got, most in checks:
        print(f"{what}: {got:,.2f}, at most {most:,}: {'ok' if got < most else 'FALLS SHORT'}")
    return int(any(got >= most for _, got, most in checks[:3]))


if __name__ == "__main__":
    sys.exit(main())
