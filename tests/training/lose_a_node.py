"""Trains on two nodes and takes one away in the middle: `python -m tests.training.lose_a_node CONFIG_JSON CHECKPOINTS`.

A program of its own, for a cluster of several nodes and the one that other tests share would be in each other's way.
"""

from __future__ import annotations

import json
import os
import sys
import threading

import ray
from ray.cluster_utils import Cluster

from acestep_ray.config import TrainConfig
from acestep_ray.storage import Store
from acestep_ray.training.job import train
from acestep_ray.training.state import Checkpoints
from tests.processes import wait_until


def main() -> None:
    config = TrainConfig(**json.loads(sys.argv[1]))
    checkpoints = Checkpoints(Store.at(sys.argv[2]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    ended = threading.Event()

    def lose() -> None:
        wait_until(lambda: len(checkpoints.steps()) >= 2, ended.is_set)
        cluster.remove_node(other, allow_graceful=False)
        print("lost at step", checkpoints.steps()[-1], flush=True)

    thread = threading.Thread(target=lose)
    thread.start()
    try:
        summary = train(config)
    finally:
        ended.set()
        thread.join()
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps({"steps": summary.steps, "last": summary.last_loss}), flush=True)


if __name__ == "__main__":
    main()
