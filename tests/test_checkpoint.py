"""Checkpoints on this machine and on an object store: equal to the bit, atomic, restored onto any mesh."""

import http.server
import json
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mosaicjax import storage
from mosaicjax.checkpoint import (
    FORMAT,
    Checkpoints,
    checkpoints_dir,
    complete_steps,
    read_about,
    restore_params,
)
from mosaicjax.errors import InputError
from tests import checkpoint_worker, jobs, object_store


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    optimizer: Any
    program: Any


@pytest.fixture(params=["local", "s3"])
def run_dir(request, tmp_path, monkeypatch):
    return (
        str(tmp_path / "run") if request.param == "local" else object_store.new_bucket(monkeypatch) + "/run"
    )


def make_mesh(*sizes: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, ("rows", "columns")[: len(sizes)])


def sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Two dimensions over two axes, one over both, scalars nowhere: another layout for every mesh."""
    names = mesh.axis_names
    if len(shape) == 2 and len(names) == 2:
        return NamedSharding(mesh, PartitionSpec(names[1], names[0]))
    return NamedSharding(mesh, PartitionSpec(names) if shape else PartitionSpec())


def spread(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(mesh, leaf.shape)), tree)


def make_state(seed: int = 0, width: int = 16) -> State:
    """All that a training state may hold: nested names, three dtypes, masked and empty optimizer states."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "block": [
            {"w": jax.random.normal(keys[0], (width, 8))},
            {"w": jax.random.normal(keys[1], (width, 8))},
        ],
        "embed": jax.random.normal(keys[2], (width, 16), jnp.bfloat16),
        "odd.name": jax.random.normal(keys[3], (8,)),
    }
    mask = {"block": [{"w": True}, {"w": False}], "embed": False, "odd.name": True}
    transform = optax.chain(optax.clip(1.0), optax.masked(optax.adam(1e-3), mask))
    grads = jax.tree.map(jnp.cos, params)
    # optax raises floats to integer powers, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        _, optimizer = transform.update(grads, transform.init(params), params)
    program = {"ema": None, "counts": jnp.arange(8, dtype=jnp.uint32), "on": jnp.array(True)}
    return State(jnp.int32(seed), params, optimizer, program)


def abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def bits(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(leaf.dtype.name, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def entries(run_dir: str) -> list[str]:
    """What lies in the directory of the checkpoints, complete or not."""
    return storage.list_dir(checkpoints_dir(run_dir))


def test_restores_onto_other_meshes_to_the_bit(run_dir):
    state = spread(make_state(), make_mesh(8))
    with Checkpoints(run_dir) as checkpoints:
        checkpoints.save(3, state, {"data_step": 3, "skips": [1, 2], "phase": "main", "tokens": 2**40})
    for mesh in (make_mesh(4, 2), make_mesh(1), make_mesh(8)):
        target = abstract(spread(make_state(seed=1), mesh))
        restored = Checkpoints(run_dir).restore(3, target)
        assert bits(restored) == bits(state)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert [leaf.sharding for leaf in jax.tree.leaves(restored)] == [
            leaf.sharding for leaf in jax.tree.leaves(target)
        ]
    cursor = Checkpoints(run_dir).cursor(3)
    assert cursor == {"data_step": 3, "skips": [1, 2], "phase": "main", "tokens": 2**40}


def test_the_state_may_be_donated_right_after_save(run_dir):
    mesh = make_mesh(8)
    start = jax.device_put(jnp.arange(2**20, dtype=jnp.float32), sharding(mesh, (2**20,)))
    expected = np.arange(2**20, dtype=np.float32)
    advance = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    with Checkpoints(run_dir, keep=9) as checkpoints:
        state = start
        for step in range(4):
            checkpoints.save(step, {"x": state}, {})
            state = advance(state)
        target = {"x": jax.ShapeDtypeStruct((2**20,), jnp.float32, sharding=sharding(mesh, (2**20,)))}
        for step in range(4):
            np.testing.assert_array_equal(np.asarray(checkpoints.restore(step, target)["x"]), expected)
            expected = expected * 2 + 1


def test_numbers_that_are_no_arrays_become_arrays(run_dir):
    mesh = make_mesh(8)
    state = {"w": spread(jnp.arange(8.0), mesh), "count": 5, "rate": np.float32(0.1), "host": np.arange(3)}
    with Checkpoints(run_dir) as checkpoints:
        checkpoints.save(1, state, {})
        target = {"w": abstract(state["w"]), "count": 0, "rate": np.float32(0), "host": np.zeros(3, np.int32)}
        restored = checkpoints.restore(1, target)
    assert restored["count"].dtype == jnp.int32 and int(restored["count"]) == 5
    assert restored["rate"].dtype == jnp.float32 and np.asarray(restored["rate"]) == np.float32(0.1)
    assert np.asarray(restored["host"]).tolist() == [0, 1, 2]


def test_no_save_is_skipped_while_another_runs(run_dir):
    with Checkpoints(run_dir, keep=9) as checkpoints:
        for step in range(5):
            checkpoints.save(step, {"w": jnp.full((200_000,), step, jnp.float32)}, {})
    assert complete_steps(run_dir) == [0, 1, 2, 3, 4]
    with pytest.raises(InputError, match="^step 4 is saved already in "):
        checkpoints.save(4, {"w": jnp.zeros(1)}, {})


@settings(max_examples=5)
@given(
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True).map(sorted),
    keep=st.integers(1, 3),
    keep_every=st.none() | st.integers(1, 10),
)
def test_retention(tmp_path_factory, steps, keep, keep_every):
    run_dir = tmp_path_factory.mktemp("run")
    with Checkpoints(run_dir, keep=keep, keep_every=keep_every) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"w": jnp.float32(step)}, {})
    kept = [
        step
        for place, step in enumerate(steps)
        if place >= len(steps) - keep or (keep_every and step % keep_every == 0)
    ]
    assert checkpoints.steps() == kept
    assert checkpoints.latest() == steps[-1]
    assert sorted(map(int, entries(str(run_dir)))) == kept


def test_retention_on_s3_leaves_no_objects(monkeypatch):
    run_dir = object_store.new_bucket(monkeypatch) + "/run"
    with Checkpoints(run_dir, keep=1, keep_every=4) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, {"w": jnp.float32(step)}, {})
    assert checkpoints.steps() == [4, 6]
    assert {key.split("/")[2] for key in object_store.keys(run_dir)} == {"4", "6"}


def test_an_empty_run_has_no_checkpoints(run_dir):
    checkpoints = Checkpoints(run_dir)
    assert checkpoints.steps() == [] and checkpoints.latest() is None
    with pytest.raises(
        InputError, match=r"^no complete checkpoint of step 7 in .*/run; expected one of \[\]$"
    ):
        checkpoints.cursor(7)


@pytest.mark.parametrize(("keep", "keep_every", "name"), [(0, None, "keep"), (1, 0, "keep_every")])
def test_wrong_retention_is_refused(keep, keep_every, name):
    with pytest.raises(InputError, match=f"^wrong {name} of checkpoints; expected at least 1; got 0$"):
        Checkpoints("run", keep=keep, keep_every=keep_every)


def test_unfinished_checkpoints_do_not_count_and_are_swept(run_dir):
    with Checkpoints(run_dir) as checkpoints:
        checkpoints.save(1, {"w": jnp.float32(1)}, {})
        checkpoints.save(2, {"w": jnp.float32(2)}, {})
    root = checkpoints_dir(run_dir)
    # A removal or an upload that was cut off, and a local save that was.
    storage.remove_tree(storage.join(root, "2", "commit_success.txt"))
    storage.write_text(storage.join(root, "5.orbax-checkpoint-tmp", "state", "d"), "half")
    later = Checkpoints(run_dir)
    assert later.latest() == 1
    with pytest.raises(InputError, match=r"^no complete checkpoint of step 2 in .*; expected one of \[1\]$"):
        later.restore(2, {"w": jnp.float32(0)})
    assert entries(run_dir) == ["1", "2", "5.orbax-checkpoint-tmp"]
    later.save(2, {"w": jnp.float32(20)}, {})
    later.close()
    assert entries(run_dir) == ["1", "2"]
    assert float(later.restore(2, {"w": jnp.float32(0)})["w"]) == 20


def test_another_model_is_refused_in_one_line(run_dir):
    with Checkpoints(run_dir) as checkpoints:
        state = {
            "params": {"a": jnp.zeros((4, 2)), "b": jnp.zeros(3), "c": jnp.zeros(1)},
            "step": jnp.int32(1),
        }
        checkpoints.save(1, state, {})
        target = {"params": {"a": jnp.zeros((4, 3)), "b": jnp.zeros(3, jnp.bfloat16), "d": jnp.zeros(1)}}
        with pytest.raises(InputError) as refusal:
            checkpoints.restore(1, target)
        assert str(refusal.value) == (
            f"checkpoint {checkpoints_dir(run_dir)}/1 holds other arrays than this program needs: "
            "params.a, params.b, params.d and 2 more; "
            "expected float32[4,3], bfloat16[3], float32[1]; got float32[4,2], float32[3], no such array"
        )
        with pytest.raises(InputError) as refusal:
            restore_params(run_dir, 1, state["params"] | {"a": jnp.zeros((2, 4))})
        assert str(refusal.value).endswith(": params.a; expected float32[2,4]; got float32[4,2]")


def test_a_newer_format_is_refused(run_dir):
    with Checkpoints(run_dir) as checkpoints:
        checkpoints.save(1, {"w": jnp.float32(1)}, {})
    path = storage.join(checkpoints_dir(run_dir), "1", "about", "data.json")
    saved = json.loads(storage.read_text(path))
    assert saved["format"] == FORMAT == 1
    storage.write_text(path, json.dumps(saved | {"format": 2}))
    for read in (lambda: checkpoints.cursor(1), lambda: checkpoints.restore(1, {"w": jnp.float32(0)})):
        with pytest.raises(InputError) as refusal:
            read()
        assert str(refusal.value) == (
            f"{checkpoints_dir(run_dir)}/1 was written by a newer mosaicjax; "
            "expected checkpoint format 1 or older; got 2; fix: upgrade mosaicjax"
        )


def test_what_json_cannot_hold_is_refused_before_writing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(1, {"w": jnp.float32(1)}, {"step": jnp.int32(1)})
    checkpoints.save(1, {"w": jnp.float32(1)}, {"step": 1})
    checkpoints.close()
    assert checkpoints.cursor(1) == {"step": 1}


def test_the_arrays_are_listed_by_path(run_dir):
    with Checkpoints(run_dir) as checkpoints:
        checkpoints.save(1, make_state(width=24), {})
    listed = {name: str(info) for name, info in read_about(run_dir, 1).arrays.items()}
    weights = {name: text for name, text in listed.items() if name.startswith("params.")}
    assert weights == {
        "params.block.0.w": "float32[24,8]",
        "params.block.1.w": "float32[24,8]",
        "params.embed": "bfloat16[24,16]",
        "params.odd.name": "float32[8]",
    }
    # Adam's two moments of the two unmasked weights, its count, step, counts, on: and the weights.
    assert len(listed) == 4 + 2 * 2 + 1 + 3


def test_params_alone_need_no_optimizer_on_s3(monkeypatch):
    run_dir = object_store.new_bucket(monkeypatch) + "/run"
    state = spread(make_state(), make_mesh(8))
    with Checkpoints(run_dir) as checkpoints:
        checkpoints.save(1, state, {})
    bucket = run_dir.removeprefix("s3://").split("/")[0]
    others = [key for key in object_store.keys(run_dir) if "/state/" in key and "/state/params." not in key]
    assert len(others) > 8
    for key in others:
        object_store.client().delete_object(Bucket=bucket, Key=key)
    target = abstract(spread(make_state(seed=1).params, make_mesh(4, 2)))
    assert bits(restore_params(run_dir, 1, target)) == bits(state.params)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes read in Linux's /proc/self/io")
def test_params_alone_read_no_optimizer_on_disk(tmp_path):
    weights = {"w": jnp.arange(1000.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": weights, "optimizer": jnp.ones((10_000_000,))}, {})

    def bytes_read() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    before = bytes_read()
    restored = restore_params(tmp_path, 1, {"w": jnp.zeros(1000)})
    assert bytes_read() - before < 2_000_000
    assert bits(restored) == bits(weights)


def test_a_lost_shard_is_an_error_and_not_zeros(monkeypatch):
    run_dir = object_store.new_bucket(monkeypatch) + "/run"
    state = {"w": spread(jnp.zeros((8, 8)), make_mesh(8))}
    with Checkpoints(run_dir) as checkpoints:
        checkpoints.save(1, state, {})
    bucket, key = run_dir.removeprefix("s3://").split("/")[0], "run/checkpoints/1/state/w/c/5/0"
    assert key in object_store.keys(run_dir)
    object_store.client().delete_object(Bucket=bucket, Key=key)
    with pytest.raises(InputError, match="^cannot read s3://.*/checkpoints/1/state: .*missing"):
        checkpoints.restore(1, abstract(state))


def test_a_missing_bucket_is_refused_and_not_made(monkeypatch):
    object_store.new_bucket(monkeypatch)
    checkpoints = Checkpoints("s3://no-such-bucket-here/run")
    with pytest.raises(InputError, match="^cannot write s3://no-such-bucket-here/run/checkpoints/"):
        checkpoints.save(1, {"w": jnp.float32(1)}, {})
    assert "no-such-bucket-here" not in [
        each["Name"] for each in object_store.client().list_buckets()["Buckets"]
    ]


def test_a_full_disk_is_one_line_and_spares_the_others(tmp_path):
    # A limit on the size of files: what a quota or a full disk looks like to the writer.
    command = jobs.command("checkpoint_worker.py", "full", tmp_path, 2**20)
    result = subprocess.run(command, env=jobs.environment(2), capture_output=True, text=True)
    assert result.stdout.splitlines() == ["[1]", "[1, 3]"], result.stderr
    refusals = [line for line in result.stderr.splitlines() if line.startswith("cannot ")]
    assert len(refusals) == 1
    assert refusals[0].startswith(f"cannot write {tmp_path}/checkpoints/2")
    assert "File too large" in refusals[0]
    for step in (1, 3):
        expected = checkpoint_worker.values(step, 64)
        target = checkpoint_worker.abstract(checkpoint_worker.place(expected))
        checkpoint_worker.check(Checkpoints(tmp_path).restore(step, target), expected)


@pytest.mark.slow
def test_killed_while_saving(run_dir):
    """Twice: a process that saves in a loop gets SIGKILL, and the next one goes on from what is whole."""
    elements = 2**20 if storage.is_remote(run_dir) else 2**22
    newest = 0
    for until in (4, 7):
        command = jobs.command("checkpoint_worker.py", "train", run_dir, elements)
        process = subprocess.Popen(command, env=jobs.environment(4), stdout=subprocess.PIPE, text=True)
        try:
            # The step is printed while its save runs in the background.
            for line in process.stdout:
                if int(line) == until:
                    break
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == -9
        steps = complete_steps(run_dir)
        assert newest < until - 1 <= steps[-1]
        newest = steps[-1]
        for step in steps:
            expected = checkpoint_worker.values(step, elements)
            target = checkpoint_worker.abstract(checkpoint_worker.place(expected))
            checkpoint_worker.check(Checkpoints(run_dir).restore(step, target), expected)
            assert Checkpoints(run_dir).cursor(step) == {"data_step": step}
    with Checkpoints(run_dir) as checkpoints:
        checkpoints.save(100, {"w": jnp.float32(1)}, {})
    assert checkpoints.latest() == 100
    assert sorted(map(int, entries(run_dir))) == checkpoints.steps()


def test_two_processes_save_and_one_restores(run_dir):
    run_two("save", run_dir)
    checkpoint_worker.restore(run_dir)
    assert Checkpoints(run_dir).cursor(3) == {"data_step": 3, "by": 2}


def test_one_process_saves_and_two_restore(run_dir):
    checkpoint_worker.save(run_dir)
    run_two("restore", run_dir)


def run_two(case: str, run_dir: str) -> None:
    """Two processes with 4 devices each, where this one has 8."""
    for result in jobs.run_job("checkpoint_worker.py", case, run_dir, count=2, devices=4):
        assert result.returncode == 0, result.stderr[-3000:]


class Refusing(http.server.BaseHTTPRequestHandler):
    """A store that allows nothing."""

    def refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = refuse

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_a_shard_that_cannot_be_written_is_never_committed(run_dir):
    """Of two processes one loses its store in the midst: both say so, and the step does not exist."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        # On this machine it is a limit on the size of files instead.
        endpoint = f"http://127.0.0.1:{elsewhere.server_port}" if storage.is_remote(run_dir) else ""
        results = jobs.run_job("checkpoint_worker.py", "lose", run_dir, endpoint, devices=4)
        elsewhere.shutdown()
    for result in results:
        assert result.returncode == 0, result.stderr[-3000:]
        refusals = [line for line in result.stderr.splitlines() if "checkpoints/2" in line]
        assert len(refusals) == 1
        assert refusals[0].startswith(f"process 1: cannot write {run_dir}/checkpoints/2")
    assert complete_steps(run_dir) == [1]
