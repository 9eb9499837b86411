"""Runs small enough for tests: a store of a few hundred documents, a recipe, and the command."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from mosaicjax import cli
from mosaicjax.data.build import build
from mosaicjax.data.tokenizer import train_tokenizer
from tests import jobs

WORDS = "river stone größe light seven walks under the a of quiet market and runs blue".split()
VOCAB = 300
HELD_OUT = 0.1

RECIPE = '''"""A model small enough for tests."""

from mosaicjax.data.mixture import TokenStore
from mosaicjax.methods.clip import ClipGradients
from mosaicjax.models import mpt
from mosaicjax.optim import AdamW, Cosine
from mosaicjax.recipe import Eval, Recipe, Save
from mosaicjax.spec import Dtypes

recipe = Recipe(
    model=mpt.Config(layers=2, embed=32, heads=2, mlp=64, vocab=320),
    data=TokenStore({store!r}),
    seq=32,
    batch=8,
    steps=6,
    seed=3,
    optimizer=AdamW(lr=Cosine(peak=2e-3, warmup=4, final=0.1), weight_decay=1e-4),
    methods=(ClipGradients(norm=1.0),),
    dtypes=Dtypes(),
    eval=Eval(every=4, rows=8),
    save=Save(every=3),
)
'''


def write_documents(path: Path, count: int = 300) -> list[str]:
    """A JSON lines file of documents of some words each, and their texts."""
    rng = random.Random(1)
    texts = [
        f"Document {i}: " + " ".join(rng.choice(WORDS) for _ in range(rng.randint(8, 60))) + ".\n"
        for i in range(count)
    ]
    rows = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(rows), encoding="utf-8")
    return texts


def build_store(folder: Path, *, seed: int = 0) -> Path:
    """A finished store at `folder/store`, beside its documents and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_documents(folder / "documents.jsonl")
    documents = [folder / "documents.jsonl"]
    tokenizer = train_tokenizer(documents, folder / "tokenizer", vocab=VOCAB, held_out=HELD_OUT)
    build(
        documents,
        folder / "store",
        tokenizer=tokenizer,
        held_out=HELD_OUT,
        seed=seed,
        workers=1,
        progress=False,
    )
    return folder / "store"


def write_recipe(path: Path, store: Path, *, before: str = "", **replaced: str) -> Path:
    """The recipe as a file; `before` is code ahead of it, `replaced` gives fields other values as code."""
    text = RECIPE.format(store=str(store))
    for name, value in replaced.items():
        old = next(line for line in text.splitlines() if line.strip().startswith(f"{name}="))
        text = text.replace(old, f"    {name}={value},")
    path.write_text(text.replace("recipe = Recipe(", f"{before}\nrecipe = Recipe("), encoding="utf-8")
    return path


@contextlib.contextmanager
def quick():
    """Compile with few optimizations, which is most of what a tiny run takes; both sides of a test alike."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def run(*arguments: object) -> int:
    """The command in this process, on its 8 devices."""
    with quick():
        return cli.main([str(argument) for argument in arguments])


def train(recipe: object, out: object, *options: object) -> None:
    """Train in this process; it must end well."""
    assert run("train", recipe, "--out", out, *options) == 0


def launch(*arguments: object, devices: int = 1, optimised: bool = False) -> subprocess.Popen:
    """The command as a process of its own; `optimised` compiles as a user's does, which takes longer."""
    environment = jobs.environment(devices) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(not optimised))}
    return subprocess.Popen(
        [sys.executable, "-m", "mosaicjax.cli", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch_job(
    *arguments: object, count: int = 2, devices: int = 4, optimised: bool = False
) -> list[subprocess.Popen]:
    """The command as one job of several processes."""
    address = jobs.free_address()
    place = ("--processes", count, "--coordinator", address, "--cpu-devices", devices)
    return [
        launch(*arguments, *place, "--process", index, devices=1, optimised=optimised)
        for index in range(count)
    ]


def ended(processes: list[subprocess.Popen], seconds: float = 240) -> list[subprocess.CompletedProcess]:
    """What processes said, once all of them have ended."""
    try:
        said = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out, err)
        for process, (out, err) in zip(processes, said, strict=True)
    ]


def signal_after(
    processes: list[subprocess.Popen], out: Path, steps: int, number: int, to: list[int]
) -> list[subprocess.CompletedProcess]:
    """Signal some processes of a job once the run, begun or resumed by it, has logged so many new steps."""
    metrics = out / "metrics.jsonl"
    stale = inode(metrics)
    first = max(complete(out), default=0)
    while inode(metrics) in (None, stale) or last_step(metrics) < first + steps:
        try:
            processes[0].wait(timeout=0.01)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"ended before the signal: {processes[0].communicate()}")
    for index in to:
        os.kill(processes[index].pid, number)
    return ended(processes)


def inode(path: Path) -> int | None:
    """What a file is on the disk: another once it is replaced."""
    return path.stat().st_ino if path.exists() else None


def last_step(metrics: Path) -> int:
    """The step of the last whole row."""
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else -1


def complete(out: Path) -> list[int]:
    """Steps of the checkpoints on the disk, looked at without the package."""
    folder = out / "checkpoints"
    names = [path.name for path in folder.iterdir() if path.name.isdecimal()] if folder.exists() else []
    return sorted(int(name) for name in names if (folder / name / "commit_success.txt").exists())


def rows(out: Path) -> list[str]:
    """The rows of metrics as text, without what depends on the clock."""
    lines = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    parsed = [json.loads(line) for line in lines]
    return [json.dumps({key: value for key, value in row.items() if key != "time"}) for row in parsed]


def metrics(out: Path, kind: str = "train") -> list[dict]:
    """The rows of one kind."""
    return [row for row in map(json.loads, rows(out)) if row["kind"] == kind]


def losses(out: Path) -> np.ndarray:
    """The training loss of every step."""
    return np.array([row["loss"] for row in metrics(out)])


def arrays(out: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by name, read with TensorStore alone."""
    import tensorstore

    folder = Path(out) / "checkpoints" / str(step) / "state"
    found = {}
    for file in folder.rglob("zarr.json"):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{file.parent}/"}}
        found[file.parent.relative_to(folder).as_posix()] = tensorstore.open(spec).result().read().result()
    return found


def weights(out: Path, step: int) -> dict:
    """The weights of a checkpoint as a tree; lists are dicts by number."""
    tree: dict = {}
    for name, array in arrays(out, step).items():
        if name.startswith("trainable."):
            *between, last = name.split(".")[1:]
            at = tree
            for part in between:
                at = at.setdefault(int(part) if part.isdecimal() else part, {})
            at[last] = array
    return tree


def poison(out: Path, step: int, name: str, layer: int, value: float) -> None:
    """Overwrite one layer of an array of a checkpoint."""
    import tensorstore

    folder = Path(out) / "checkpoints" / str(step) / "state" / name
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    array = tensorstore.open(spec).result()
    array[layer].write(np.full(array.shape[1:], value, np.float32)).result()


def copy_run(run: Path, out: Path, *, until: int) -> Path:
    """A copy of a run as if it had been killed after its checkpoint of a step."""
    shutil.copytree(run, out)
    for step in complete(out):
        if step > until:
            shutil.rmtree(out / "checkpoints" / str(step))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def flip(path: Path, at: int = -200) -> bytes:
    """Flip one bit of a file; what it held before."""
    before = path.read_bytes()
    damaged = bytearray(before)
    damaged[at] ^= 1
    path.write_bytes(damaged)
    return before


TERM, KILL, INT = signal.SIGTERM, signal.SIGKILL, signal.SIGINT
