"""Import and export of checkpoints: seconds, GB/s and memory, beside the safetensors library's own reading.

    python benchmarks/hub.py speed --gigabytes 1.5 --rounds 5   # rounds, one after the other of each kind
    python benchmarks/hub.py memory    # Llama-2-7B's shapes, 13.5 GB: needs 30 GB disk, 20 GB memory

Each measurement is a process of its own. `load` is the reading onto a device (here the CPU, whose memory is
the host's), `import` a run directory on the disk, `export` the way back. Memory is the process's largest
resident set, mapped pages of files among it (`VmHWM`), and its largest anonymous part, watched every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import GIGA, machine, spread  # noqa: E402 after the path, for a call as a script

RESULT = Path(__file__).with_suffix(".json")
PACKAGES = ("jax", "jaxlib", "numpy", "tensorstore", "orbax-checkpoint", "safetensors")
SHARD_BYTES = 5 * GIGA


def family(layers: int) -> Any:
    """Llama-2-7B with so many of its 32 layers."""
    from mosaicjax.layers.norm import RmsNorm
    from mosaicjax.layers.position import Rotary
    from mosaicjax.models import llama

    return llama.Config(
        layers=layers,
        embed=4_096,
        heads=32,
        kv_heads=32,
        head_dim=128,
        mlp=11_008,
        vocab=32_000,
        position=Rotary(theta=10_000.0),
        norm=RmsNorm(eps=1e-5),
    )


def write_checkpoint(folder: Path, layers: int) -> int:
    """A random bfloat16 checkpoint in shards, by the writer of exports; its bytes."""
    import numpy as np

    from mosaicjax.hub.safetensors_file import header_bytes, write_tensor
    from mosaicjax.hub.stored import numpy_dtype
    from mosaicjax.models.names import foreign_tensors

    model = family(layers)
    config = model.to_hf(4_096) | {"dtype": "bfloat16"}
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    shards: list[list[Any]] = [[]]
    size = 0
    for foreign in foreign_tensors(model.decoder(), model.names()):
        nbytes = 2 * math.prod(foreign.shape)
        if size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(foreign)
        size += nbytes
    places: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with open(folder / name, "wb") as file:
            file.write(header_bytes([(foreign.name, "bfloat16", foreign.shape) for foreign in shard]))
            for foreign in shard:
                # Random bits below the exponent's top: numbers of every size, none of them infinite.
                bits = rng.integers(0, 2**15, foreign.shape, np.uint16) & 0xBFFF
                write_tensor(file, bits.view(numpy_dtype("bfloat16")))
                places[foreign.name] = name
                total += bits.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def anonymous_bytes() -> int:
    """This process's anonymous resident memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class Watched:
    """The largest anonymous memory while a block runs."""

    def __enter__(self) -> Watched:
        self.largest, self._stop = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.largest = max(self.largest, anonymous_bytes())

    def __exit__(self, *unused: object) -> None:
        self._stop.set()
        self._thread.join()


def do_load(source: str, out: str) -> None:
    """Onto one device."""
    import jax

    from mosaicjax.hub.foreign_dir import open_model
    from mosaicjax.hub.read import load
    from mosaicjax.mesh import Mesh, shardings

    model = open_model(source)
    layout = Mesh(fsdp=(1,)).build(jax.devices()[:1])
    jax.block_until_ready(load(model, model.spec.abstract(model.dtype, shardings(model.spec, layout))))


def do_import(source: str, out: str) -> None:
    from mosaicjax.hub import import_model

    import_model(source, out)


def do_export(source: str, out: str) -> None:
    from mosaicjax.hub import export_model

    export_model(source, out)


def do_library(source: str, out: str) -> None:
    """Every tensor by `safe_open`, as numpy arrays that stay."""
    from safetensors import safe_open

    kept = []
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, "np") as opened:
            kept += [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118 no mapping


def do_library_file(source: str, out: str) -> None:
    """Every file by `load_file`."""
    from safetensors.numpy import load_file

    kept = [load_file(path) for path in sorted(Path(source).glob("*.safetensors"))]
    assert kept


def do_library_copy(source: str, out: str) -> None:
    """`safe_open`, and each tensor copied in the order of axes that our weights have."""
    import numpy as np
    from safetensors import safe_open

    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, "np") as opened:
            for name in opened.keys():  # noqa: SIM118 no mapping
                tensor = opened.get_tensor(name)
                np.ascontiguousarray(tensor.T)


WORKS = {
    "load": do_load,
    "import": do_import,
    "export": do_export,
    "safetensors safe_open": do_library,
    "safetensors load_file": do_library_file,
    "safetensors safe_open, transposed by numpy": do_library_copy,
}


def measure(work: str, source: Path, out: Path) -> dict[str, float]:
    """One piece of work in a process of its own."""
    command = [sys.executable, __file__, "work", work, str(source), str(out)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{work} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def work(name: str, source: str, out: str) -> None:
    """Do it, and print what it took; libraries are imported before the clock starts."""
    import jax
    import safetensors.numpy  # noqa: F401

    import mosaicjax.hub  # noqa: F401

    jax.devices()
    before = anonymous_bytes()
    began = time.perf_counter()
    with Watched() as watched:
        WORKS[name](source, out)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "anonymous": watched.largest, "before": before}))


def speed(folder: Path, gigabytes: float, rounds: int) -> dict[str, Any]:
    """All kinds of work in turn, round by round; the files are in the system's cache."""
    table = 2 * 2 * 32_000 * 4_096
    layer = 2 * (4 * 4_096 * 4_096 + 3 * 4_096 * 11_008 + 2 * 4_096)
    layers = max(1, round((gigabytes * GIGA - table) / layer))
    source, run, back = folder / "hf", folder / "run", folder / "back"
    nbytes = write_checkpoint(source, layers)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in WORKS}
    for number in range(rounds + 1):
        for name in WORKS:
            for path in (run, back):
                if name == "import" or path == back:
                    shutil.rmtree(path, ignore_errors=True)
            place = (run, back) if name == "export" else (source, run)
            result = measure(name, *place)
            if number:
                # The first round fills caches and counts for nothing.
                taken[name].append(result)
            print(f"round {number} {name}: {nbytes / GIGA / result['seconds']:.2f} GB/s", flush=True)
    return {
        "gigabytes": nbytes / GIGA,
        "layers": layers,
        "rounds": rounds,
        "gb_per_second": {
            name: spread([nbytes / GIGA / result["seconds"] for result in results])
            for name, results in taken.items()
        },
        "peak_gb": {name: max(each["peak"] for each in results) / GIGA for name, results in taken.items()},
    }


def memory(folder: Path, layers: int) -> dict[str, Any]:
    """Import, load and export once each, with the memory that each took."""
    source, run = folder / "hf", folder / "run"
    nbytes = write_checkpoint(source, layers)
    model = family(layers)
    found: dict[str, Any] = {
        "gigabytes": nbytes / GIGA,
        "layers": layers,
        "parameters": model.decoder().spec().count(),
        "largest_tensor_gb": 2 * model.vocab * model.embed / GIGA,
    }
    # An export needs as much disk again: what it was imported from is not needed any more.
    for name, paths in {
        "load": (source, run),
        "import": (source, run),
        "export": (run, folder / "back"),
    }.items():
        if name == "export":
            shutil.rmtree(source)
        result = measure(name, *paths)
        found[name] = {
            "seconds": result["seconds"],
            "gb_per_second": nbytes / GIGA / result["seconds"],
            "peak_resident_gb": result["peak"] / GIGA,
            "peak_anonymous_gb": result["anonymous"] / GIGA,
            "anonymous_before_gb": result["before"] / GIGA,
        }
        print(name, json.dumps(found[name]), flush=True)
    return found


def main() -> None:
    if sys.argv[1:2] == ["work"]:
        return work(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=["speed", "memory"])
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32, help="of the 7B's")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where there is room")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="mosaicjax-hub-") as made:
        folder = Path(made)
        if options.kind == "speed":
            found = speed(folder, options.gigabytes, options.rounds)
        else:
            found = memory(folder, options.layers)
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    results[options.kind] = {**found, "machine": machine(PACKAGES)}
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
