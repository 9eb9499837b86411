"""One process of a job that only reads: `feed_worker.py <recipe> <mesh> <coordinator> <count> <index>`."""

import json
import sys

import numpy as np

from mosaicjax import processes, recipe_file


def main() -> None:
    path, mesh, coordinator, count, index = sys.argv[1:]
    processes.start(coordinator, int(count), int(index))
    import jax

    from mosaicjax.feed import Feed
    from mosaicjax.mesh import Mesh
    from mosaicjax.run_data import open_data
    from mosaicjax.step import Step

    recipe = recipe_file.load(path).recipe
    fsdp, _, tensor = mesh.partition(" tensor ")
    layout = Mesh(fsdp=(int(fsdp),), tensor=int(tensor or 1)).build(jax.devices())
    stream = open_data(recipe).stream
    asked: set[int] = set()

    class Noting:
        """The stream, with a note of the rows that were asked for."""

        phase = stream.phase

        def rows(self, step, rows):
            asked.update(rows)
            return stream.rows(step, rows)

    with Feed(Noting(), [Step(recipe.program()[1], layout, 0)], 0, 4) as feed:
        feed.next()
        tokens = feed.next()["tokens"]
    shards = {}
    for shard in tokens.addressable_shards:
        rows = range(tokens.shape[1])[shard.index[1]]
        for row, data in zip(rows, np.asarray(shard.data)[0], strict=True):
            shards[row] = data.tolist()
    print(json.dumps({"read": sorted(asked), "shards": shards}))


if __name__ == "__main__":
    main()
