"""Fills the object stores of all nodes twice over, for as long as it runs: `python fill_store.py MEGABYTES`."""

from __future__ import annotations

import sys
import time

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PIECE_MB = 20
HELD_SECONDS = 600


@ray.remote(num_cpus=0)
def fill(megabytes: int) -> None:
    """Hold twice as much in this node's store as it has room for."""
    held = [ray.put(np.ones(PIECE_MB * 1_000_000, np.uint8)) for _ in range(2 * megabytes // PIECE_MB)]
    time.sleep(HELD_SECONDS)
    del held


def main() -> None:
    ray.init(log_to_driver=False)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    running = [fill.options(scheduling_strategy=place).remote(int(sys.argv[1])) for place in places]
    print("filling", flush=True)
    ray.get(running)


if __name__ == "__main__":
    main()
