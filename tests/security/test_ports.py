"""What a neighbour on the network and another user of the machine reach at Ray's ports without the token."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from cluster.local import nodes
from cluster.local.nodes import HEAD, LocalCluster, NodeSettings, may_make_namespaces, wait_for
from tests.security.neighbour import METHODS, Port, answered_grpc, assert_refused, ports_of

pytestmark = pytest.mark.ray

# In a process of its own: the tests' own cluster must not be the one that is looked at.
JOB = """
import json, os, sys
import psutil, ray
from acestep_ray.ray_runtime import connect
from tests.security.neighbour import ports_of

connect()
ray.get(ray.remote(lambda: os.getpid()).remote())
processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
print(json.dumps([vars(port) for port in ports_of(processes)]), flush=True)
sys.stdin.read()
"""


def test_a_cluster_that_connect_starts_listens_on_loopback_and_refuses_who_has_no_token():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", JOB], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        ports = [Port(**each) for each in json.loads(process.stdout.readline())]
        assert {"gcs_server", "raylet"} <= {port.command for port in ports}
        assert [port for port in ports if not port.is_loopback] == []
        for port in ports:
            assert_refused(port)
    finally:
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("own_networks", [False, True])
def test_a_neighbour_of_a_local_cluster_gets_nothing_without_its_token(own_networks, monkeypatch):
    if own_networks and not may_make_namespaces():
        pytest.skip("this user cannot make network namespaces")
    monkeypatch.setattr(nodes, "may_make_namespaces", lambda: own_networks)
    # In a network of its own, a node listens where only this cluster comes.
    others = [] if own_networks else [NodeSettings("cpu-0", 1)]
    with LocalCluster(others) as cluster:
        # The agents, which start last, have the ports that are to be looked at.
        for node in cluster.nodes.values():
            wait_for(lambda node=node: has_agents(ports_of(node.processes())), "no agents", node)
        ports = [port for node in cluster.nodes.values() for port in ports_of(node.processes())]
        (gcs,) = [port for port in ports if port.command == "gcs_server"]
        assert answered_grpc(gcs, cluster.token, METHODS[:1]) == {METHODS[0]: "OK"}
        for port in ports:
            assert_refused(port)
        if not own_networks:
            assert [port for port in ports if not port.is_loopback] == []
        (dashboard,) = ports_of(cluster.nodes[HEAD].processes("dashboard.py"))
        assert dashboard.is_loopback


def has_agents(ports: list[Port]) -> bool:
    commands = [port.command for port in ports]
    return commands.count("ray::DashboardAgent") >= 2 and "ray::RuntimeEnvAgent" in commands
