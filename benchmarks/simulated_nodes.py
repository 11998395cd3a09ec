"""Ray nodes by the dozen on one machine, for `scale.py`: each is a real raylet with its object store and its workers.

A worker that imports what it runs takes 135 MB and 2.5 s of a core, and the agents of a node 126 MB. Here one process
imports for all, and workers are forked from it when a raylet asks for one: they share its memory. Agents, which report
metrics and make environments for tasks, of which there are none, are left out but on the head.

As a script this is what a raylet starts for a worker, and, without arguments, the process that workers are forked from.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess

# An encoder, what decodes for nine, some planning and storing, and a CPU to spare: where a part of one is left on a
# node, Ray Data counts it as nothing, and with two a decoder finds no place.
CPUS_OF_NODE = 3
# Processes that a node keeps while they have nothing to do. Ray ends those beyond its CPUs after a second, and starting
# them again takes time of a core; a GPU's share of a real host has ten CPUs or more.
WORKERS_OF_NODE = 10
_ADDRESS = "ACESTEP_FORK_SERVER"
# Where a node's agents would tell their ports.
_NO_PORT = -1


@contextmanager
def cluster_of(nodes: int, environment: dict[str, str]) -> Iterator[None]:
    """A cluster of so many nodes on this machine, and its head, which this process is the driver of."""
    import ray
    from ray._private import services
    from ray.cluster_utils import Cluster

    # Raylets and workers have the environment of this process.
    os.environ |= {"RAY_AUTH_MODE": "disabled", **environment}
    head = {
        "num_cpus": 0,
        "include_dashboard": False,
        "include_log_monitor": False,
        "object_store_memory": 300_000_000,
        "setup_worker_path": __file__,
        "_system_config": {
            "num_workers_soft_limit": WORKERS_OF_NODE,
            # The driver of a run asks for those that it needs.
            "prestart_worker_first_driver": False,
            # Every process would look four times a second how late it is, which hundreds have no time for.
            "io_context_event_loop_lag_collection_interval_ms": 60_000,
        },
    }
    with _fork_server():
        cluster = Cluster(initialize_head=True, head_node_args=head)
        services.start_ray_process = _without_agents(services.start_ray_process)
        try:
            for _ in range(nodes):
                cluster.add_node(
                    wait=False,
                    num_cpus=CPUS_OF_NODE,
                    num_gpus=1,
                    object_store_memory=1_000_000_000 if nodes == 1 else 150_000_000,
                    setup_worker_path=__file__,
                )
            cluster.wait_for_nodes(timeout=120)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


def _without_agents(start: Any) -> Any:
    """Ray's function that starts its processes, and in the place of a node's agents something that waits."""
    from ray import _raylet

    ports = (
        _raylet.METRICS_AGENT_PORT_NAME,
        _raylet.METRICS_EXPORT_PORT_NAME,
        _raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME,
        _raylet.RUNTIME_ENV_AGENT_PORT_NAME,
    )

    def start_without(command: list[str], *arguments: Any, **options: Any) -> Any:
        values = dict(part.split("=", 1) for part in command if part.startswith("--") and "=" in part)
        if "--dashboard_agent_command" in values:
            for port in ports:
                _raylet.persist_port(values["--session_dir"], values["--node_id"], port, _NO_PORT)
            # A raylet wants both, and ends with them. Their input ends with the raylet.
            values |= {"--dashboard_agent_command": "cat", "--runtime_env_agent_command": "cat"}
            command = [
                f"{name}={values[name]}" if (name := part.split("=")[0]) in values else part
                for part in command
            ]
        return start(command, *arguments, **options)

    return start_without


@contextmanager
def _fork_server() -> Iterator[None]:
    """A process that workers are forked from, while the block runs."""
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory(prefix="fork-") as folder:
        os.environ[_ADDRESS] = f"{folder}/socket"
        server: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, __file__], stdout=subprocess.PIPE, text=True
        )
        assert server.stdout
        assert server.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            server.terminate()
            server.wait()


def _serve() -> None:
    """Import what workers need, and fork one for every request, until the parent is gone."""
    import gc
    import runpy
    import socketserver

    # Ray reads these as it is imported: the only job of the cluster, and whom a worker shall not outlive.
    os.environ |= {"RAY_JOB_ID": "01000000", "RAY_RAYLET_PID": str(os.getpid())}
    import simulated

    simulated.sleep_instead()
    parent = os.getppid()

    class Worker(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            """In the forked process: take the place of the script that a raylet has started."""
            _, streams, _, _ = socket.recv_fds(self.request, 1, 3)
            with self.request.makefile() as file:
                request = json.load(file)
            self.server.socket.close()
            self.request.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            os.environ.update(request["environment"])
            sys.argv = request["arguments"]
            runpy.run_path(sys.argv[0], run_name="__main__")

    class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
        max_children = 10_000
        request_queue_size = 1000

        def service_actions(self) -> None:
            super().service_actions()
            if os.getppid() != parent:
                sys.exit()

    server = Server(os.environ[_ADDRESS], Worker)
    # What is alive now would be written to, and so copied, by every worker's collection.
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    server.serve_forever()


def _hand_over() -> None:
    """Let the worker that a raylet wants be forked."""
    own = ("--language=", "--serialized-runtime-env-context=")
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith(own)]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[_ADDRESS])
        socket.send_fds(connection, [b"."], [0, 1, 2])
        connection.sendall(json.dumps({"arguments": arguments, "environment": dict(os.environ)}).encode())


if __name__ == "__main__":
    _hand_over() if len(sys.argv) > 1 else _serve()
