"""Processes that save and restore, for test_checkpoint.py: `checkpoint_worker.py <case> <run_dir> ...`.

train <run_dir> <elements>                                  save step after step until killed
full <run_dir> <limit_bytes>                                save with files limited in size
save|restore <run_dir> <coordinator> <count> <index>        one process of a job
"""

import os
import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mosaicjax import processes
from mosaicjax.checkpoint import Checkpoints, restore_params
from mosaicjax.errors import InputError


def values(step: int, elements: int) -> dict[str, np.ndarray]:
    """What a state of this step holds: a formula, so that the tests know it without the process."""
    base = np.arange(elements, dtype=np.float32)
    return {"params": base * (1 + step), "moment": -base - step, "step": np.int32(step)}


def place(tree: dict[str, np.ndarray], rows: int = 0, columns: int = 1) -> dict[str, jax.Array]:
    """Spread a state over all devices of all processes; what has no rows to spread is replicated."""
    mesh = Mesh(np.array(jax.devices()).reshape(rows or len(jax.devices()), columns), ("rows", "columns"))

    def put(value: np.ndarray) -> jax.Array:
        spec = PartitionSpec(("columns", "rows")) if value.ndim else PartitionSpec()
        return jax.make_array_from_callback(
            value.shape, NamedSharding(mesh, spec), lambda index: value[index]
        )

    return {name: put(np.asarray(value)) for name, value in tree.items()}


def abstract(state: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def check(restored: dict[str, jax.Array], expected: dict[str, np.ndarray]) -> None:
    """Compare the shards that this process holds with the values they must have."""
    assert restored.keys() == expected.keys()
    for name, array in restored.items():
        assert array.shape == np.shape(expected[name])
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(expected[name])[shard.index])


def train(run_dir: str, elements: int) -> None:
    with Checkpoints(run_dir, keep=3) as checkpoints:
        step = checkpoints.latest() or 0
        while True:
            step += 1
            checkpoints.save(step, place(values(step, elements)), {"data_step": step})
            print(step, flush=True)


def full(run_dir: str, limit_bytes: int) -> None:
    checkpoints = Checkpoints(run_dir)
    checkpoints.save(1, place(values(1, 64)), {})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    try:
        checkpoints.save(2, place(values(2, limit_bytes)), {})
        checkpoints.wait()
    except InputError as refusal:
        print(refusal, file=sys.stderr)
    print(checkpoints.steps(), flush=True)
    checkpoints.save(3, place(values(3, 64)), {})
    checkpoints.close()
    print(checkpoints.steps(), flush=True)


def save(run_dir: str) -> None:
    with Checkpoints(run_dir, keep=2) as checkpoints:
        for step in (1, 2, 3):
            # An array of one process's own device, as every process makes it, counts as replicated.
            state = place(values(step, 4096)) | {"step": jnp.int32(step)}
            checkpoints.save(step, state, {"data_step": step, "by": processes.current().count})


def restore(run_dir: str) -> None:
    checkpoints = Checkpoints(run_dir)
    assert checkpoints.steps() == [2, 3]
    target = abstract(place(values(0, 4096), rows=len(jax.devices()) // 2, columns=2))
    check(checkpoints.restore(3, target), values(3, 4096))
    params = restore_params(run_dir, 3, target["params"])
    check({"params": params}, {"params": values(3, 4096)["params"]})


def job(case: str, run_dir: str, coordinator: str, count: int, index: int) -> None:
    processes.start(coordinator, count, index)
    {"save": save, "restore": restore}[case](run_dir)
    processes.agree(None, "the end")
    processes.stop()


def lose(run_dir: str, other_endpoint: str, coordinator: str, count: int, index: int) -> None:
    processes.start(coordinator, count, index)
    checkpoints = Checkpoints(run_dir)
    checkpoints.save(1, place(values(1, 64)), {})
    checkpoints.wait()
    if index == 1 and other_endpoint:
        os.environ["AWS_ENDPOINT_URL"] = other_endpoint
    elif index == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        checkpoints.save(2, place(values(2, 2**14)), {})
        checkpoints.wait()
    except InputError as refusal:
        print(refusal, file=sys.stderr)
    processes.agree(None, "the end")
    processes.stop()


def main() -> None:
    case, run_dir, *rest = sys.argv[1:]
    if case == "train":
        train(run_dir, int(rest[0]))
    elif case == "full":
        full(run_dir, int(rest[0]))
    elif case == "lose":
        lose(run_dir, rest[0], rest[1], int(rest[2]), int(rest[3]))
    else:
        job(case, run_dir, rest[0], int(rest[1]), int(rest[2]))


if __name__ == "__main__":
    main()
