"""Several Ray nodes on this machine, each a `ray start` of its own: to try a cluster out, and to lose parts of it.

    python cluster/local/nodes.py --cpu_nodes 1 --gpu_nodes 1

A head without CPUs, nodes with the resource `cpu_node` and nodes with `gpu_node`. Token authentication is on; dashboard
and job server listen on localhost only. Where this user may make network namespaces (root on Linux), every node but the
head has one, with an address of its own; elsewhere all share 127.0.0.1. Ctrl-C ends what was started, and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

CPU_NODE, GPU_NODE = "cpu_node", "gpu_node"
"""Custom resources of the two kinds of nodes."""
HEAD = "head"

# In the environment of every process of a node: also of those that have lost their parents.
_MARK = "ACESTEP_LOCAL_NODE"
_LOCALHOST = "127.0.0.1"
# `ray start` replaces 127.0.0.1 by an address that other machines reach. Only with 127.0.0.1 do Ray's processes not
# listen on all addresses. Variable and constant are Ray's own, for macOS and Windows.
_LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_START = """
from ray._private import ray_constants, services
from ray.scripts.scripts import main
ray_constants.ENABLE_RAY_CLUSTER = True
services.resolve_ip_for_localhost = str
main()
"""
# Prometheus's exporters ask for no token and listen on all addresses. The last two have no switch: with this port they
# fail, which Ray logs.
_NO_METRICS = {
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}
# For tests of networks (RFC 2544): no home or office has these addresses.
_NETWORK = "198.18"
_START_SECONDS = 300.0
_END_SECONDS = 10.0
_POLL_SECONDS = 0.2
_LABEL = "acestep-local-node"


@dataclass(frozen=True)
class NodeSettings:
    """A node to be started."""

    name: str
    cpus: int
    resources: Mapping[str, float] = field(default_factory=dict)
    gpus: Sequence[int] = ()
    """Indices of the machine's GPUs that are this node's."""
    object_store_mb: int = 256
    own_folder: Path | None = None
    """A folder in whose place this node has one of its own, as without a shared disk; for root on Linux."""


class LocalNode:
    """A node that runs."""

    def __init__(
        self,
        settings: NodeSettings,
        label: str,
        mark: str,
        process: subprocess.Popen,
        log: Path,
        place: Namespace | None,
    ):
        self.settings = settings
        self.label = label
        self.process = process
        self.log = log
        self._mark = mark
        self._place = place

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Its processes whose command line has `title` in it."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark and title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self) -> None:
        """End it as a power cut does."""
        while running := self.processes():  # some may have started others meanwhile
            for process in running:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(running, timeout=_END_SECONDS)
        self.process.wait()
        if self._place is not None:
            self._place.remove()

    def send(self, number: signal.Signals) -> None:
        """Send all its processes a signal: SIGSTOP lets it stand still, SIGCONT lets it go on."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def cut(self) -> None:
        """Cut its network; without one of its own, let it stand still."""
        if self._place is None:
            self.send(signal.SIGSTOP)
        else:
            self._place.link("down")

    def mend(self) -> None:
        """Undo `cut`."""
        if self._place is None:
            self.send(signal.SIGCONT)
        else:
            self._place.link("up")


class Namespace:
    """A network namespace with one cable, whose other end is in the bridge."""

    INTERFACE = "eth0"

    def __init__(self, bridge: str, number: int, address: str):
        self.address = address
        self.cable = f"{bridge}n{number}"
        # Lives as long as this process, which only holds it.
        self.holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self.enter = ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net"]
        try:
            self._wire(bridge)
        except BaseException:
            self.remove()
            raise

    def _wire(self, bridge: str) -> None:
        def of(pid: int | str) -> str:
            return os.readlink(f"/proc/{pid}/ns/net")

        while of(self.holder.pid) == of("self"):
            assert self.holder.poll() is None, "unshare has ended"
            time.sleep(0.01)
        peer = ["peer", "name", self.INTERFACE, "netns", str(self.holder.pid)]
        run("ip", "link", "add", self.cable, "type", "veth", *peer)
        run("ip", "link", "set", self.cable, "master", bridge, "up")
        for arguments in (
            ["address", "add", f"{self.address}/24", "dev", self.INTERFACE],
            ["link", "set", self.INTERFACE, "up"],
            ["link", "set", "lo", "up"],
        ):
            run(*self.enter, "ip", *arguments)

    def link(self, state: str) -> None:
        """`down` pulls the cable out, `up` puts it in again."""
        run("ip", "link", "set", self.cable, state)

    def remove(self) -> None:
        """The cable goes with the namespace, and that with its last process."""
        self.holder.kill()
        self.holder.wait()


class LocalCluster:
    """A head and other nodes; to be used as a context, which ends them, the head last."""

    def __init__(self, nodes: Sequence[NodeSettings], environment: Mapping[str, str] | None = None):
        """`environment` is added to that of every node."""
        self.settings = nodes
        self.nodes: dict[str, LocalNode] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="acestep-nodes-"))  # short: sockets have long names
        self.id = self.folder.name.rpartition("-")[2]
        self.token = secrets.token_hex(32)
        token_file = self.folder / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(self.token, encoding="utf-8")
        # For `ray` commands and for programs that join.
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
        self.headers = {"Authorization": f"Bearer {self.token}"}
        self._for_nodes = dict(environment or {})
        self._bridge = f"ace{secrets.token_hex(3)}" if may_make_namespaces() else None
        if self._bridge is None:
            self.environment[_LOOPBACK_VARIABLE] = "0"
        self._subnet = f"{_NETWORK}.{secrets.randbelow(256)}"
        self._head_address = _LOCALHOST if self._bridge is None else f"{self._subnet}.1"
        self._numbers: dict[str, int] = {}
        self._starts = 0
        self._ports = free_ports(3)

    @property
    def address(self) -> str:
        """Of Ray, for programs on this machine."""
        return f"{self._head_address}:{self._ports[0]}"

    @property
    def dashboard(self) -> str:
        """Of the dashboard and the job server."""
        return f"http://{_LOCALHOST}:{self._ports[1]}"

    @property
    def has_namespaces(self) -> bool:
        """Whether nodes have a network of their own, which can be cut."""
        return self._bridge is not None

    def __enter__(self) -> LocalCluster:
        try:
            if self._bridge is not None:
                run("ip", "link", "add", self._bridge, "type", "bridge")
                run("ip", "address", "add", f"{self._head_address}/24", "dev", self._bridge)
                run("ip", "link", "set", self._bridge, "up")
            self._start_head()
            for settings in self.settings:
                self.start(settings)
            self.wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes.values()):
            node.kill()
        if self._bridge is not None:
            subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_head(self) -> None:
        gcs, dashboard, client = self._ports
        self._start(
            NodeSettings(HEAD, cpus=0),
            None,
            *("--head", "--port", gcs, "--node-ip-address", self._head_address),
            *("--dashboard-host", _LOCALHOST, "--dashboard-port", dashboard),
            *("--ray-client-server-port", client),
        )
        wait_for(lambda: listens(self._head_address, gcs), "the head does not answer", self.nodes[HEAD])

    def start(self, settings: NodeSettings) -> LocalNode:
        """Start one more node, or one again under its old name."""
        place = None
        if self._bridge is not None:
            number = self._numbers.setdefault(settings.name, len(self._numbers) + 2)
            place = Namespace(self._bridge, number, f"{self._subnet}.{number}")
        address = _LOCALHOST if place is None else place.address
        return self._start(settings, place, "--address", self.address, "--node-ip-address", address)

    def _start(self, settings: NodeSettings, place: Namespace | None, *arguments: object) -> LocalNode:
        self._starts += 1
        label = f"{settings.name}.{self._starts}"  # Ray takes a killed node for alive for a while
        mark = f"{self.id}/{label}"
        log = self.folder / f"{settings.name}.log"
        command = [
            *([] if place is None else place.enter),
            *([] if settings.own_folder is None else hiding(settings.own_folder)),
            *(sys.executable, *(["-m", "ray.scripts.scripts"] if self._bridge else ["-c", _START])),
            *("start", "--block", "--disable-usage-stats"),
            # Of its own: nodes that start at the same time would choose the same names for their sockets.
            *("--temp-dir", self.folder / settings.name, "--labels", f"{_LABEL}={label}"),
            *("--num-cpus", settings.cpus, "--num-gpus", len(settings.gpus)),
            *("--resources", json.dumps(dict(settings.resources))),
            *("--object-store-memory", settings.object_store_mb * 1_000_000),
            # Any that are free: nodes on one machine would choose the same ones.
            *("--min-worker-port", 0, "--max-worker-port", 0, "--dashboard-agent-listen-port", 0),
            *arguments,
        ]
        environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")
            },
            # Jobs call `python`.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, settings.gpus)),
            # A job that is stopped saves first; Ray would kill it after three seconds.
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
            **_NO_METRICS,
            **self.environment,
            **self._for_nodes,
            _MARK: mark,
            "RAY_raylet_start_wait_time_s": f"{_START_SECONDS:.0f}",  # half a minute is short on a busy machine
            "SPT_NOENV": "1",  # Ray writes titles of processes over their environment
        }
        if self._bridge is not None:  # gloo would take the address that belongs to the machine's name
            interface = self._bridge if place is None else place.INTERFACE
            environment["GLOO_SOCKET_IFNAME"] = environment["NCCL_SOCKET_IFNAME"] = interface
        with log.open("ab") as output:
            process = subprocess.Popen(
                list(map(str, command)), env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self.nodes[settings.name] = LocalNode(settings, label, mark, process, log, place)
        return self.nodes[settings.name]

    def rows(self, what: str) -> list[dict[str, Any]]:
        """Rows of Ray's state: `nodes`, `actors`, `tasks` or `placement_groups`."""
        request = urllib.request.Request(
            f"{self.dashboard}/api/v0/{what}?limit=10000&detail=1", headers=self.headers
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)["data"]["result"]["result"]

    def alive(self) -> dict[str, str]:
        """Ray's ids of the nodes that it takes for alive, by name."""
        return {label.partition(".")[0]: node_id for label, node_id in self._alive().items()}

    def _alive(self) -> dict[str, str]:
        """The same by label."""
        rows = self.rows("nodes")
        return {row["labels"][_LABEL]: row["node_id"] for row in rows if row["state"] == "ALIVE"}

    def wait_for_nodes(self) -> None:
        """Wait until Ray has all nodes that were started, and has noticed those that were killed."""

        def are_there() -> bool:
            with contextlib.suppress(OSError):  # the dashboard starts after Ray
                return self._alive().keys() == {node.label for node in self.nodes.values()}
            return False

        wait_for(are_there, "Ray does not have all nodes", *self.nodes.values())


def wait_for(condition: Callable[[], bool], problem: str, *nodes: LocalNode) -> None:
    """Raise RuntimeError where a node ends, or it takes too long."""
    deadline = time.monotonic() + _START_SECONDS
    while not condition():
        ended = [node for node in nodes if node.process.poll() is not None]
        if ended or time.monotonic() > deadline:
            said = [f"{node.settings.name} said: {node.log.read_text()[-2000:]}" for node in ended]
            raise RuntimeError("\n".join([problem, *said]))
        time.sleep(_POLL_SECONDS)


def listens(host: str, port: int) -> bool:
    """Whether a server takes connections there."""
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex((host, port)) == 0


def free_ports(count: int) -> list[int]:
    """Ports that no program listens on."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.socket()) for _ in range(count)]
        for server in servers:
            server.bind((_LOCALHOST, 0))
        return [server.getsockname()[1] for server in servers]


def may_make_namespaces() -> bool:
    """Whether this user may make network namespaces, and has the programs for it."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return False
    if any(shutil.which(program) is None for program in ("ip", "unshare", "nsenter")):
        return False
    probe = "ip link add acestep0 type veth peer name acestep1"
    return (
        subprocess.run(["unshare", "--net", "sh", "-c", probe], capture_output=True, check=False).returncode
        == 0
    )


def hiding(folder: Path) -> list[str]:
    """The beginning of a command that runs with an empty folder in the place of this one."""
    script = 'mount -t tmpfs none "$0" && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, str(folder)]


def run(*command: str) -> None:
    """Run a short command. Raises RuntimeError with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def kinds(cpu_nodes: int, gpu_nodes: int, cpus: int, gpus_per_node: int = 0) -> Iterator[NodeSettings]:
    """Settings of so many nodes of each kind."""
    for number in range(cpu_nodes):
        yield NodeSettings(f"cpu-{number}", cpus, {CPU_NODE: 1})
    for number in range(gpu_nodes):
        gpus = range(number * gpus_per_node, (number + 1) * gpus_per_node)
        yield NodeSettings(f"gpu-{number}", cpus, {GPU_NODE: 1}, gpus)


def main() -> None:
    parser = argparse.ArgumentParser(description="Start a Ray cluster of several nodes on this machine.")
    parser.add_argument("--cpu_nodes", type=int, default=1, help="nodes with the resource cpu_node")
    parser.add_argument("--gpu_nodes", type=int, default=1, help="nodes with the resource gpu_node")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs of each node")
    parser.add_argument("--gpus_per_node", type=int, default=0, help="real GPUs of each gpu_node")
    settings = parser.parse_args()

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, leave)
    with contextlib.suppress(KeyboardInterrupt):
        nodes = list(kinds(settings.cpu_nodes, settings.gpu_nodes, settings.cpus, settings.gpus_per_node))
        with LocalCluster(nodes) as cluster:
            for name, value in cluster.environment.items():
                print(f"export {name}={value}")
            print(f"export RAY_API_SERVER_ADDRESS={cluster.dashboard}")
            print("# ready; Ctrl-C ends it", flush=True)
            signal.pause()


if __name__ == "__main__":
    main()
