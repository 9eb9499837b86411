"""Training from an object store: a run that outlives the server's absence, and one that asks for nothing."""

import shutil
import socket
import threading
from dataclasses import replace

import numpy as np
import pytest

from mosaicjax.data.arrays import create_array
from mosaicjax.data.manifest import NAME, Counts, Layout, record_file, write_json
from mosaicjax.data.rows import PLACE_TOKENS
from mosaicjax.data.store import Store
from tests import object_store, tiny

PLACES = 130
SEQ, BATCH, STEPS = 64, 64, 40
FIRST_WINDOW = PLACES // 2 * PLACE_TOKENS // SEQ // BATCH
"""Steps that the first half of the places lasts."""


@pytest.fixture(scope="module")
def large_store(tiny_store, tmp_path_factory):
    """Two windows of random tokens: what the second holds is read in the middle of training."""
    folder = tmp_path_factory.mktemp("large") / "store"
    shutil.copytree(tiny_store, folder)
    shutil.rmtree(folder / "train")
    manifest = Store.open(tiny_store).manifest
    count = PLACES * PLACE_TOKENS + 1
    tokens = np.random.default_rng(0).integers(0, manifest.tokenizer.size, count).astype(np.uint16)
    shard, chunk = 2**23, 2**16
    array = create_array(
        folder / "train" / "tokens", dtype="uint16", shape=(count,), shard=shard, chunk=chunk
    )
    array.write(tokens).result()
    documents = create_array(
        folder / "train" / "documents", dtype="int64", shape=(1, 2), shard=2**20, chunk=2**13
    )
    documents.write(np.array([[1, count]])).result()
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != NAME]
    write_json(
        folder / NAME,
        replace(
            manifest,
            settings=replace(manifest.settings, layout=Layout(shard_tokens=shard)),
            splits={**manifest.splits, "train": Counts(1, count, count)},
            files={path.relative_to(folder).as_posix(): record_file(path) for path in sorted(paths)},
        ),
    )
    return folder


@pytest.mark.slow
def test_a_server_that_is_away_costs_no_sample(large_store, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAICJAX_CACHE_DIR", str(tmp_path / "cache"))
    there = object_store.new_bucket(monkeypatch) + "/store"
    server = object_store.serve()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    Store.open(large_store).copy(there)
    fields = {"seq": SEQ, "batch": BATCH, "steps": STEPS, "save": "Save(every=0)", "eval": "Eval(every=0)"}
    # Steps of the first half are left out, so that the second is reached soon.
    skips = f"    seed=3,\n    skips={tuple(range(STEPS // 2, FIRST_WINDOW - 2))},"
    mine, theirs = tmp_path / "here.py", tmp_path / "there.py"
    for path, store in ((mine, large_store), (theirs, there)):
        tiny.write_recipe(path, store, **{name: str(value) for name, value in fields.items()})
        path.write_text(path.read_text().replace("    seed=3,", skips))
    expected = tmp_path / "expected"
    here = tiny.launch("train", mine, "--out", expected)
    out = tmp_path / "out"
    asked, stopped = threading.Event(), threading.Event()
    app, requests = server._server.app, []

    def dies_in_the_middle(environ, start_response):
        path = environ["PATH_INFO"]
        if "/train/tokens/c/" in path and (out / "metrics.jsonl").exists() and last_step(out) > 3:
            # All of the first half is read by then.
            asked.set()
            stopped.wait()
            # As the kernel does for a process that was killed.
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError
        requests.append(path)
        return app(environ, start_response)

    server._server.app = dies_in_the_middle
    process = tiny.launch("train", theirs, "--out", out)
    assert asked.wait(120), tiny.ended([process])
    object_store.stop(server)
    stopped.set()
    said = []
    while not said or "for 20 s: still trying" not in said[-1]:
        said.append(process.stderr.readline())
        assert said[-1], said
    assert STEPS // 2 - 5 <= last_step(out) < STEPS // 2 + 3
    server = object_store.serve(port)
    for done in tiny.ended([process, here]):
        assert done.returncode == 0, done.stderr
    assert tiny.rows(out) == tiny.rows(expected)
    object_store.stop(server)

    # Once more, by a new process: all that it reads lies here.
    server, requests = object_store.serve(port), []
    app = server._server.app
    server._server.app = lambda environ, answer: requests.append(environ["PATH_INFO"]) or app(environ, answer)
    (done,) = tiny.ended([tiny.launch("train", theirs, "--out", tmp_path / "again")])
    assert done.returncode == 0, done.stderr
    assert tiny.rows(tmp_path / "again") == tiny.rows(expected)
    assert requests and not [path for path in requests if "/tokens/" in path or "/documents/" in path]
    object_store.stop(server)


def last_step(out):
    return tiny.last_step(out / "metrics.jsonl")
