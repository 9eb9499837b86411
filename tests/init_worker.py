"""One process of a job, for test_spec.py: compiles MPT-125M as `train` does, draws it, prints its memory.

`init_worker.py <coordinator> <count> <index>`
"""

import json
import sys
from pathlib import Path

import jax

from mosaicjax import processes
from mosaicjax.data.mixture import TokenStore
from mosaicjax.host_memory import own_pages
from mosaicjax.mesh import Mesh, shardings
from mosaicjax.models import mpt
from mosaicjax.recipe import Recipe
from mosaicjax.spec import Dtypes, Param
from mosaicjax.step import Step

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
    layout = Mesh().build(jax.devices())
    recipe = Recipe(model=CONFIG, data=TokenStore("none"), seq=64, batch=8, dtypes=Dtypes())
    program = recipe.program()[1]
    spec, key = program.trainable, jax.random.key(recipe.seed)
    places = shardings(spec, layout)
    step = Step(program, layout, recipe.seed).lower().compile()
    # What compiling left behind goes first, lest the weights take its place and seem to need none.
    with own_pages() as give_back:
        give_back()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_bytes("VmRSS")
    weights = spec.init(key, "float32", places)
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
                "step_arguments": step.memory_analysis().argument_size_in_bytes,
            }
        )
    )


if __name__ == "__main__":
    main()
