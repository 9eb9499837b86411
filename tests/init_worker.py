"""One process of a job, for test_spec.py: draws MPT-125M over all devices, prints its memory.

`init_worker.py <coordinator> <count> <index>`
"""

import json
import sys
from pathlib import Path

import jax

from mosaicjax import processes
from mosaicjax.mesh import Mesh, shardings
from mosaicjax.models import mpt
from mosaicjax.spec import Param

CONFIG = mpt.Config(layers=12, embed=768, heads=12, mlp=3_072, vocab=50_368)


def memory_bytes(name: str) -> int:
    """A line of this process's status, such as VmRSS (now) or VmHWM (the most so far)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def largest_temporary_bytes(spec, layout) -> int:
    """The most work space of the programs that draw the weights."""

    def one(param: Param) -> int:
        place = layout.weight_sharding(param)
        draw = jax.jit(spec.drawer(param, "float32", place), out_shardings=place)
        return draw.lower(jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes

    return max(jax.tree.leaves(spec.map(one)))


def main() -> None:
    coordinator, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    processes.start(coordinator, count, index)
    spec, layout = CONFIG.build().spec(), Mesh().build(jax.devices())
    places = shardings(spec, layout)
    # The compiler's own code is loaded at its first use: it is no part of what a model takes.
    jax.block_until_ready(jax.jit(jax.random.normal)(jax.random.key(0)))
    before = memory_bytes("VmRSS")
    weights = spec.init(jax.random.key(0), "float32", places)
    after, peak = memory_bytes("VmRSS"), memory_bytes("VmHWM")
    temporary = largest_temporary_bytes(spec, layout)
    print(
        json.dumps(
            {
                "devices": jax.device_count(),
                "tree": spec.nbytes("float32"),
                "held": sum(
                    s.data.nbytes for leaf in jax.tree.leaves(weights) for s in leaf.addressable_shards
                ),
                "grown": after - before,
                "peak": peak - before,
                "temporary": temporary,
            }
        )
    )


if __name__ == "__main__":
    main()
