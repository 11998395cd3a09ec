"""What a process without the cluster's token reaches at the ports of Ray's processes."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil

# A method of each of Ray's services, with an empty message: all fields of protobuf may be left out.
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeInfoGcsService/CheckAlive",
    "/ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "/ray.rpc.ActorInfoGcsService/GetAllActorInfo",
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.InternalKVGcsService/InternalKVPut",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.NodeManagerService/RequestWorkerLease",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.rpc.LogService/ListLogs",
    "/ray.rpc.HealthzService/Check",
    "/ray.rpc.RayletDriver/Init",
    "/ray.rpc.RayletDriver/ClusterInfo",
    "/ray.rpc.events.EventAggregatorService/AddEvents",
    "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
PATHS = (
    "/",
    "/metrics",
    "/api/version",
    "/api/jobs/",
    "/api/job_agent/jobs/",
    "/api/v0/nodes",
    "/api/local_raylet_healthz",
    "/logs",
    "/nodes?view=summary",
    "/worker/traceback?pid=1",
    "/get_runtime_envs_info",
    "/events",
)
OPEN_METHODS = {
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
}
"""What Ray answers to everybody: whether a service is well, and the names of the services."""
_SECONDS = 3.0


@dataclass(frozen=True)
class Port:
    """A TCP port that a process listens on."""

    address: str
    number: int
    command: str

    @property
    def is_loopback(self) -> bool:
        return self.address.removeprefix("::ffff:").startswith("127.") or self.address == "::1"

    @property
    def host(self) -> str:
        """Where a program on this machine connects."""
        address = self.address.removeprefix("::ffff:")
        return "127.0.0.1" if address in ("::", "0.0.0.0") else address


def ports_of(processes: Iterable[psutil.Process]) -> list[Port]:
    """What processes of this machine listen on."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline()).split(" --")[0].strip().rpartition("/")[2]
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add(Port(connection.laddr.ip, connection.laddr.port, command))
    return sorted(found, key=lambda port: (port.command, port.number, port.address))


def answered_http(port: Port) -> dict[str, int]:
    """Paths that a port answers to a request without a token, with their status."""
    found = {}
    for path in PATHS:
        connection = http.client.HTTPConnection(port.host, port.number, timeout=_SECONDS)
        try:
            connection.request("GET", path)
            found[path] = connection.getresponse().status
        except (OSError, http.client.HTTPException):
            continue  # it does not speak HTTP/1, or it is closed
        finally:
            connection.close()
    return found


def answered_grpc(port: Port, token: str | None = None, methods: Sequence[str] = METHODS) -> dict[str, str]:
    """Methods of gRPC that a port answers, with the code of the answer; none where it does not speak gRPC."""
    import grpc

    found = {}
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(f"{port.host}:{port.number}", [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(_SECONDS)
        except grpc.FutureTimeoutError:
            return {}
        for method in methods:
            call = channel.unary_unary(method, lambda _: b"", lambda content: content)
            try:
                call(None, timeout=_SECONDS, metadata=metadata)
                found[method] = "OK"
            except grpc.RpcError as error:
                found[method] = error.code().name
    return found


def assert_refused(port: Port) -> None:
    """Without the token a port tells no more than that it is there."""
    statuses = answered_http(port)
    if statuses:
        told = {path for path, status in statuses.items() if status not in (401, 404)}
        assert told <= {"/api/local_raylet_healthz", *(["/"] if port.is_loopback else [])}, (port, statuses)
        assert 401 in statuses.values(), (port, statuses)
        return
    codes = answered_grpc(port)
    told = {method for method, code in codes.items() if code not in ("UNAUTHENTICATED", "UNIMPLEMENTED")}
    assert told <= OPEN_METHODS, (port, codes)
    assert "UNAUTHENTICATED" in codes.values(), (port, codes)
