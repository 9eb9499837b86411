"""One process of a job, for test_processes.py: `process_worker.py <case> <coordinator> <count> <index>`."""

import json
import sys

from mosaicjax import processes
from mosaicjax.errors import InputError


def main() -> None:
    case, coordinator, count, index = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    here = processes.start(coordinator, count, index)
    if case == "exchange":
        rounds = [
            processes.exchange(f"{here.index}:{turn}", f"turn {turn}", channel=f"channel {turn % 3}")
            for turn in range(60)
        ]
        told = processes.broadcast_text(f"from {here.index}: größer", "telling")
        import jax

        place = [here.index, here.count, here.primary, jax.process_index(), jax.process_count()]
        print(json.dumps({"rounds": rounds, "told": told, "place": place}))
    elif case == "refused":
        with processes.refused_by_all("reading data"):
            pass
        with processes.refused_by_all("reading data"):
            if here.index == 1:
                raise InputError("no shard", expected="00001.bin", got="nothing")
        print("went on")
    elif case == "defect":
        with processes.refused_by_all("reading data"):
            if here.index == 0:
                raise KeyError("tokens")
        print("went on")
    elif case == "silent" and here.index == 0:
        processes.agree(None, "the mesh", timeout_seconds=0.5)
    elif case == "astray":
        processes.agree(None, "the mesh" if here.index == 0 else "the data")


if __name__ == "__main__":
    try:
        main()
    except InputError as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(2)
