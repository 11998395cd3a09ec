"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import ray
from ray._private import ray_constants
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from acestep_ray.autoscaling import bring_nodes
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.paths import shell_command
from acestep_ray.ray_errors import check_address, explain_start
from acestep_ray.terminal import is_terminal, is_verbose, replace_unencodable, show_line
from acestep_ray.terminal.driver_stderr import filter_stderr

# Of a custom resource that only marks nodes: a node with one of it has room for thousands.
_LITTLE = 0.0001
# Prometheus's exporters ask for no token. The last two have no switch: with this port they fail, which Ray logs.
_NO_METRICS = {
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}


def connect() -> None:
    """Join the cluster of $RAY_ADDRESS, which `ray job submit` sets, else start one here; joined already, do nothing.

    A cluster that happens to run on this machine is not joined unasked: it may be another job's, and end with it.
    Raises InputError when the cluster of $RAY_ADDRESS cannot be joined, or Ray cannot be started here.
    """
    if ray.is_initialized():
        return
    # Ray's warnings about itself and what its workers print are noise to a user; what goes wrong is raised.
    verbose = is_verbose()
    logs: dict[str, Any] = {
        "logging_level": logging.INFO if verbose else logging.ERROR,
        "log_to_driver": verbose,
    }
    if not verbose:
        filter_stderr()
    if not is_terminal(sys.stderr) or os.environ.get("NO_COLOR"):
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # of what it shows of its workers
    replace_unencodable()
    address = os.environ.get("RAY_ADDRESS") or None
    if address:
        check_address(address, own_address=ray.util.get_node_ip_address)
    if address in (None, "local"):
        # Ray would write a token to the home directory, where every later `ray start` would find it and ask for it.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        logs["include_dashboard"] = False
        place: AbstractContextManager[None] = _closed_to_others()
    else:
        place = contextlib.nullcontext()
    try:
        with place:
            ray.init(address=address or "local", **logs)
    except Exception as error:  # Ray raises errors of many kinds for what the environment lacks
        with contextlib.suppress(Exception):
            ray.shutdown()
        raise explain_start(error, None if address == "local" else address) from error
    _end_in_order()


@contextmanager
def _closed_to_others() -> Iterator[None]:
    """Start a cluster whose processes listen on 127.0.0.1 alone, and none of them without the token.

    Ray listens on 127.0.0.1 on macOS and Windows. On Linux all ports are open to the network, and no option of
    `ray.init` changes that: it replaces 127.0.0.1 as the node's address. Variables that the user has set are kept.
    """
    added = {name: value for name, value in _NO_METRICS.items() if name not in os.environ}
    before = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(added)
    if ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR not in os.environ:
        ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        for name in added:
            os.environ.pop(name, None)


def _end_in_order() -> None:
    """Let SIGTERM, as of `ray job stop`, do what Ctrl-C does; Ray has made it print a stack of C++ and abort."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def share_of(resource: str | None) -> dict[str, float]:
    """What a task or an actor asks for to lie on a node with this custom resource; nothing where there is none."""
    return {} if resource is None else {resource: _LITTLE}


def nodes_with(resource: str | None, flag: str) -> list[dict[str, Any]]:
    """Ray's rows of the nodes that have this custom resource, of all nodes where there is none.

    Where no node has it, the autoscaler is asked for one. Raises InputError where that brings none.
    """

    def find() -> list[dict[str, Any]]:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        return [node for node in nodes if resource is None or node["Resources"].get(resource)]

    found = find()
    if not found and bring_nodes([share_of(resource)], lambda: bool(find())):
        return find()
    if not found:
        resources = json.dumps({resource: 1})
        raise InputError(
            "no node of the Ray cluster has this resource",
            where=f"{flag} {resource}",
            fix=f"start nodes with `{shell_command('ray', 'start', '--resources', resources)}`, or leave the flag out",
        )
    return found


def wait_for_first_node(device: str, resource: str | None = None) -> None:
    """Where no node has a GPU (or, for another device than cuda, a CPU), wait for the autoscaler to bring one.

    A job that sizes itself by the nodes that are there needs one to go by. None may come: its own checks say so.
    """
    kind = "GPU" if device == "cuda" else "CPU"

    def is_there() -> bool:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return any(node.get(kind) and (resource is None or node.get(resource)) for node in nodes)

    bring_nodes([{kind: 1, **share_of(resource)}], is_there)


def cluster_cpus() -> float:
    """CPUs of the nodes that are there now, at least one: a head without any may get nodes that have some."""
    return max(1.0, ray.cluster_resources().get("CPU", 0.0))


def beside_driver(cls: type) -> Any:
    """`cls` as an actor class whose actors lie on the driver's node: another node's loss does not end them."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
    return ray.remote(**options)(cls)


@contextmanager
def faults_explained(job: str, done: str) -> Iterator[None]:
    """Ray's errors as one message with the cause, without Ray Data's own account of them unless that is asked for.

    `done` is what the job had done with the songs that it leaves, such as "encoded".
    """
    consoles = [
        handler
        for handler in logging.getLogger("ray.data").handlers
        if isinstance(handler, logging.StreamHandler) and not is_verbose()
    ]
    for console in consoles:
        console.addFilter(_is_worth_showing)
    try:
        yield
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, InputError):
            raise cause from None
        # Ray Data adds advice on its own retries.
        told = str(cause).partition("\nFailed to apply UDF")[0]
        raise AceStepError(
            f"{job} stopped: {told}\n  → the songs that were {done} are kept; the same command goes on from there"
        ) from error
    finally:
        for console in consoles:
            console.removeFilter(_is_worth_showing)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    """Warnings, such as that of a cluster without room for the models; errors are told by what is raised.

    Not the advice on how a graph could be set up, which is ours to follow.
    """
    is_advice = "issue_detection" in record.name or record.getMessage().startswith("Progress bars disabled")
    return record.levelno == logging.WARNING and not is_advice


class _Flag:
    """An actor that somebody raises once."""

    def __init__(self) -> None:
        self.is_raised = False

    def raise_it(self) -> None:
        self.is_raised = True

    def look(self) -> bool:
        return self.is_raised


class StopSignal:
    """The driver's wish that its workers come to an end, which they look for as often as they like."""

    INTERVAL_SECONDS = 1.0

    def __init__(self) -> None:
        self._flag = beside_driver(_Flag).remote()

    def request(self) -> None:
        """Ask the workers to stop."""
        self._flag.raise_it.remote()

    @property
    def asked(self) -> Callable[[], bool]:
        """Whether the driver has asked; can be sent to a worker. It answers at once, a second old at most."""
        return _Looker(self._flag, self.INTERVAL_SECONDS)


class _Looker:
    """Looks at a flag from a thread of its own, once it is asked for the first time."""

    def __init__(self, flag: ActorHandle[Any], interval: float):
        self.flag = flag
        self.interval = interval
        self.is_raised = False
        self.thread: threading.Thread | None = None

    def __call__(self) -> bool:
        if self.thread is None:
            self.thread = threading.Thread(target=self._look, daemon=True)
            self.thread.start()
        return self.is_raised

    def _look(self) -> None:
        while not self.is_raised:
            try:
                self.is_raised = ray.get(self.flag.look.remote())
            except RayActorError:
                return  # the driver is gone, and Ray ends this process too
            time.sleep(self.interval)


class _Lines:
    """An actor that holds lines until the driver takes them."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def put(self, line: Any) -> None:
        self.lines.append(line)

    def take(self) -> list[Any]:
        lines, self.lines = self.lines, []
        return lines


class Console:
    """Lines from workers to the driver's terminal, without the rest of their output.

    Workers call `say`; the driver prints what was said, or hands it to `show`, while it is inside `with console`.
    """

    INTERVAL_SECONDS = 0.5

    def __init__(self, show: Callable[[Any], None] | None = None) -> None:
        self._show = show if show is not None else show_line
        self._lines = beside_driver(_Lines).remote()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._print_until_ended, daemon=True)

    @property
    def say(self) -> Callable[[Any], None]:
        """Takes a line, or what `show` takes; can be sent to a worker."""
        lines = self._lines
        return lambda line: ray.get(lines.put.remote(line))

    def __enter__(self) -> Console:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _print_until_ended(self) -> None:
        ended = False
        while not ended:
            # Looked at before the lines are taken: what was said before the end is printed.
            ended = self._ended.wait(self.INTERVAL_SECONDS)
            for line in ray.get(self._lines.take.remote()):
                self._show(line)
