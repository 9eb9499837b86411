"""One process of a job that imports a model.

`hub_worker.py <source> <out> <expected> <coordinator> <count> <index>`
"""

import sys

import jax
import numpy as np

from mosaicjax import processes
from mosaicjax.hub import import_model, start
from mosaicjax.hub.foreign_dir import open_model
from mosaicjax.mesh import Mesh, shardings


def main() -> None:
    source, out, expected, coordinator, count, index = sys.argv[1:]
    processes.start(coordinator, int(count), int(index))
    import_model(source, out)
    spec = open_model(source).spec
    layout = Mesh(data=2, fsdp=(2,), tensor=2).build(jax.devices())
    abstract = spec.abstract("bfloat16", shardings(spec, layout))
    bits = np.load(expected)
    for path in (out, source):
        loaded = start.weights(path, start.NEWEST, abstract)
        for (name, _), leaf in zip(spec.items(), jax.tree.leaves(loaded), strict=True):
            for shard in leaf.addressable_shards:
                mine = bits[name.replace("/", ".")][shard.index]
                np.testing.assert_array_equal(np.asarray(shard.data).view(np.uint16), mine, err_msg=name)
    processes.stop()


if __name__ == "__main__":
    main()
