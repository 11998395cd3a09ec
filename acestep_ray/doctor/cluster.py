"""The Ray cluster: whether it answers, what its nodes have, whether they are alike and see one storage.

All that joins the cluster does so in a process of its own, which is ended when it takes too long.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from acestep_ray import __version__
from acestep_ray.doctor.finding import Finding, ok, problem, warning
from acestep_ray.doctor.output import check_output, probe_folder, store_for_probe
from acestep_ray.errors import AceStepError
from acestep_ray.storage import Store
from acestep_ray.terminal.numbers import number_text

CONNECT_SECONDS = 3.0
CLUSTER_SECONDS = 60.0
NODE_SECONDS = 30.0
_ANSWER = "cluster: "
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_GIB = 2**30
_DEFAULT_PORT = 6379
_JOIN_REMEDY = "take its Ray and Python; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN where it asks for a token"
_TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def check_cluster(address: str, place: str | None, *, seconds: float = CLUSTER_SECONDS) -> Iterator[Finding]:
    """The cluster at `address`, and whether every node reads and writes `place`, a directory or URL."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port or _DEFAULT_PORT
    except ValueError as error:
        yield problem("cluster", f"{address} is no address ({error})", "give HOST:PORT")
        return
    if parts.scheme in ("http", "https"):
        yield problem(
            "cluster",
            f"{address} is the dashboard's address, which `ray job submit --address` takes",
            f"give the cluster's own, {host}:{_DEFAULT_PORT} by default",
        )
        return
    is_open = None
    if parts.scheme == "" and address != "auto":
        failure = _connection_failure(host or "", port)
        if failure is not None:
            yield problem(
                "cluster", f"{address} does not answer ({failure})", "start it, or correct the address"
            )
            return
        # `ray.init` goes on asking for half a minute where it is refused.
        member, stranger = (
            _in_process(f"knock({address!r})", environment)
            for environment in (os.environ, _without_token(os.environ))
        )
        admitted, failure = _answer_of(member, seconds)
        is_open = _answer_of(stranger, seconds)[0] is not None
        if admitted is None:
            yield problem("cluster", f"{address} admits nobody from here ({failure})", _JOIN_REMEDY)
            return
    answer, failure = _answer_of(_in_process(f"look_and_print({address!r}, {place!r})", os.environ), seconds)
    if answer is None:
        yield problem("cluster", f"{address} cannot be joined ({failure})", _JOIN_REMEDY)
        return
    yield from judge_nodes(address, answer["nodes"])
    yield from judge_versions(answer["nodes"], {"ray": answer["ray"], "python": platform.python_version()})
    if is_open is not None:
        yield judge_token(address, is_open=is_open)
    if place is not None:
        yield judge_storage(place, answer["nodes"], answer["storage"])


def judge_nodes(address: str, nodes: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """What the nodes have, and which do not answer; a node is as `look_at_cluster` gives it."""
    totals: Counter[str] = Counter()
    for node in nodes:
        totals.update(node["resources"])
    kinds = sorted(name.partition(":")[2] for name in totals if name.startswith("accelerator_type:"))
    gpus = (
        f", {number_text(totals['GPU'])} GPUs ({', '.join(kinds) or 'of unknown kind'})"
        if totals["GPU"]
        else ", no GPU"
    )
    yield ok(
        "cluster",
        f"{address}: {len(nodes)} nodes, {number_text(totals['CPU'], 6)} CPUs{gpus}, "
        f"{totals['memory'] / _GIB:,.0f} GiB of memory, "
        f"{totals['object_store_memory'] / _GIB:.0f} GiB of object store",
    )
    for node in nodes:
        if node["failure"]:
            yield problem(
                "node",
                f"{node['name']}: {node['failure']}",
                "install this program in the node's environment, and look at the node in `ray status`",
            )


def judge_versions(nodes: Sequence[Mapping[str, Any]], here: Mapping[str, str]) -> Iterator[Finding]:
    """Whether all nodes run the Ray, the Python and the acestep-ray that this process does."""
    here = {**here, "acestep_ray": __version__}
    differing = [
        f"{node['name']} has {name} {node['seen'][name]}, here is {here[name]}"
        for node in nodes
        if node["seen"]
        for name in here
        if node["seen"][name] != here[name]
    ]
    if differing:
        yield problem("versions", "; ".join(differing), "one environment, or one image, for all nodes")
    elif any(node["seen"] for node in nodes):
        yield ok("versions", f"the same on every node: {', '.join(f'{name} {here[name]}' for name in here)}")


def judge_token(address: str, *, is_open: bool) -> Finding:
    """`is_open`: somebody without a token could join."""
    if not is_open:
        return ok("token", "the cluster takes nobody without its token")
    if urlsplit(f"//{address.rpartition('://')[2]}").hostname in _LOOPBACK:
        return ok("token", "not asked for; the cluster listens on this machine's own address")
    return warning(
        "token",
        f"not asked for: whoever reaches {address} can run code there",
        "RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN on every node, before `ray start`",
    )


def judge_storage(place: str, nodes: Sequence[Mapping[str, Any]], driver: str | None) -> Finding:
    """`driver` is what this machine could not do there; None where all went well."""
    failures = [f"this machine: {driver}"] if driver else []
    failures += [
        f"{node['name']}: {node['seen']['storage']}"
        for node in nodes
        if node["seen"] and node["seen"]["storage"]
    ]
    if failures:
        return problem(
            "storage",
            f"{place} is not one place for all ({'; '.join(failures)})",
            "a directory that all nodes mount, or a URL such as s3://BUCKET/exps with credentials on every node",
        )
    return ok("storage", f"{place} is read and written by this machine and every node")


def _without_token(environment: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in environment.items() if name not in _TOKEN_VARIABLES}
    return {**kept, "RAY_AUTH_MODE": "disabled"}


def _connection_failure(host: str, port: int) -> str | None:
    """Why nothing listens there; None where something does."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return str(error)
    return None


def _in_process(call: str, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """A process that runs a function of this module."""
    return subprocess.Popen(
        [sys.executable, "-c", f"from acestep_ray.doctor import cluster; cluster.{call}"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _answer_of(process: subprocess.Popen[str], seconds: float) -> tuple[dict[str, Any] | None, str]:
    """What the process printed, or None and why there is nothing."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None, f"no answer in {seconds:g} s"
    for line in out.splitlines():
        if line.startswith(_ANSWER):
            answer = json.loads(line.removeprefix(_ANSWER))
            return (None, answer["failure"]) if "failure" in answer else (answer, "")
    lines = err.strip().splitlines()
    return None, lines[-1] if lines else f"it ended with {process.returncode}"


# --- in the process that joins the cluster -------------------------------------------------------------------


def look_and_print(address: str, place: str | None) -> None:
    """Print what `look_at_cluster` finds, as a line of JSON."""
    _print_answer(lambda: look_at_cluster(address, place))


def knock(address: str) -> None:
    """Print whether the cluster admits who has this process's environment."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, and missing in its stub

    _print_answer(lambda: {"cluster": GcsClient(address=address).cluster_id.hex()})


def _print_answer(ask: Callable[[], dict[str, Any]]) -> None:
    try:
        answer = ask()
    except Exception as error:  # whatever Ray raises is why the cluster cannot be joined
        first = (str(error).strip().splitlines() or [""])[0].partition(". ")[0]
        answer = {"failure": f"{type(error).__name__}: {first}"}
    print(_ANSWER + json.dumps(answer), flush=True)


def look_at_cluster(address: str, place: str | None) -> dict[str, Any]:
    """Join the cluster, and look around on every node that is alive."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    store, folder, content = None, probe_folder(), secrets.token_hex(32)
    storage = None
    if place is not None:
        finding = check_output(place)
        storage = None if finding.level == "ok" else finding.found
        store = store_for_probe(place) if storage is None else None
    nodes = [node for node in ray.nodes() if node["Alive"]]
    try:
        if store is not None:
            store.write_bytes(f"{folder}/driver", content.encode())
        tasks = [
            ray.remote(num_cpus=0, max_retries=0)(look_around)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote(None if store is None else store.url, folder, node["NodeID"], content)
            for node in nodes
        ]
        ray.wait(tasks, num_returns=len(tasks), timeout=NODE_SECONDS)
        found = [_seen_by(node, task) for node, task in zip(nodes, tasks, strict=True)]
        if store is not None:
            for node in found:
                if node["seen"] and not node["seen"]["storage"]:
                    node["seen"]["storage"] = _difference(store, f"{folder}/{node['id']}", content)
    finally:
        if store is not None:
            store.delete([f"{folder}/{name}" for name in ("driver", *(node["NodeID"] for node in nodes))])
    return {"ray": ray.__version__, "nodes": found, "storage": storage}


def _seen_by(node: Mapping[str, Any], task: Any) -> dict[str, Any]:
    """A node and what its task returned, or why it returned nothing."""
    import ray

    seen, failure = None, ""
    try:
        seen = ray.get(task, timeout=0)
    except ray.exceptions.GetTimeoutError:
        failure = f"a task does not come back in {NODE_SECONDS:.0f} s"
    except ray.exceptions.RayError as error:
        failure = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
    resources = {name: value for name, value in node["Resources"].items() if not name.startswith("node:")}
    return {
        "id": node["NodeID"],
        "name": f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
        "resources": resources,
        "seen": seen,
        "failure": failure,
    }


def look_around(url: str | None, folder: str, node: str, content: str) -> dict[str, str | None]:
    """On a node: versions, and why the driver's file cannot be read there or one of its own written."""
    import ray

    storage = None
    if url is not None:
        store = Store(url)
        # A node without the shared directory must not make one.
        storage = _difference(store, f"{folder}/driver", content)
        if storage is None:
            try:
                store.write_bytes(f"{folder}/{node}", content.encode())
            except (AceStepError, OSError) as error:
                storage = str(error).splitlines()[0]
    return {
        "ray": ray.__version__,
        "python": platform.python_version(),
        "acestep_ray": __version__,
        "storage": storage,
    }


def _difference(store: Store, name: str, content: str) -> str | None:
    """Why a file that another machine has written cannot be read here; None where it can."""
    try:
        with suppress(FileNotFoundError):
            if store.read_bytes(name) == content.encode():
                return None
            return "a file of another machine reads differently"
        return "a file of another machine is not there"
    except (AceStepError, OSError) as error:
        return str(error).splitlines()[0]
