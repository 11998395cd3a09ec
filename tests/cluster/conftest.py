"""A head without CPUs, a node for decoding and one for the models, each a process tree of its own."""

from __future__ import annotations

import pytest

from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
from cluster.local.nodes import LocalCluster, kinds
from tests.cluster.jobs import Jobs
from tests.training.conftest import tiny_cache, write_tiny_cache  # noqa: F401


@pytest.fixture(scope="module")
def jobs():
    with LocalCluster(list(kinds(cpu_nodes=1, gpu_nodes=1, cpus=1))) as cluster:
        yield Jobs(cluster)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
