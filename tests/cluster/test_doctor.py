"""The doctor on several nodes: what it says of each, and of a folder that not all of them see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from acestep_ray.errors import EXIT_FAULT
from cluster.local.nodes import LocalCluster, NodeSettings, kinds, may_make_namespaces

pytestmark = [
    pytest.mark.ray,
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not may_make_namespaces(), reason="a node with a disk of its own takes root on Linux"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A folder that one node does not share with the others."""
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def cluster(own) -> Iterator[LocalCluster]:
    alone = NodeSettings("alone", cpus=1, own_folder=own)
    with LocalCluster([*kinds(cpu_nodes=1, gpu_nodes=0, cpus=2), alone]) as nodes:
        yield nodes


def diagnose(cluster: LocalCluster, *flags: object) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code of the doctor, and its findings by check."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "acestep_ray", "doctor", "--json", "--address", cluster.address),
            *map(str, flags),
        ],
        env={**os.environ, **cluster.environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    findings = json.loads(done.stdout)["findings"]
    return done.returncode, {finding["check"]: finding for finding in findings}


def test_all_nodes_are_looked_at_and_leave_nothing_in_a_folder_that_they_share(cluster, shared):
    _, findings = diagnose(cluster, "--exp_dir", shared)
    assert f"{cluster.address}: 3 nodes, 3 CPUs, no GPU" in findings["cluster"]["found"]
    assert findings["versions"]["level"] == findings["storage"]["level"] == findings["token"]["level"] == "ok"
    assert f"{shared} is read and written by this machine and every node" in findings["storage"]["found"]
    assert "node" not in findings  # a finding of nodes that do not answer
    assert list(shared.iterdir()) == []


def test_a_node_that_does_not_see_the_folder_is_named_with_the_remedy(cluster, own):
    code, findings = diagnose(cluster, "--exp_dir", own)
    nodes = {row["labels"]["acestep-local-node"].partition(".")[0]: row for row in cluster.rows("nodes")}
    place = {name: f"({row['node_ip']})" for name, row in nodes.items()}
    storage = findings["storage"]
    assert (code, storage["level"]) == (EXIT_FAULT, "problem")
    assert f"{place['alone']}: a file of another machine is not there" in storage["found"]
    assert place["cpu-0"] not in storage["found"]
    assert "a directory that all nodes mount" in storage["remedy"]
    assert list(own.iterdir()) == []
