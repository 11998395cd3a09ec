"""Nodes that are not there yet: asked of the cluster's autoscaler, and waited for before a job sizes itself by them."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray._private import ray_constants
from ray.autoscaler.sdk import request_resources
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_get

from acestep_ray.terminal import show_line
from acestep_ray.terminal.numbers import number_text

# A cluster's monitor reports for the first time some seconds after the head has started, later on a busy machine.
_REPORT_SECONDS = 60.0
# An autoscaler looks at what is asked for every few seconds.
_BEGIN_SECONDS = 60.0
# While nodes start: a GPU machine takes minutes, and a cloud may have none for a while.
_PATIENCE_SECONDS = 1800.0
_POLL_SECONDS = 1.0
_SECONDS_BETWEEN_LINES = 60.0
# Ray's names for the nodes of a cluster that no autoscaler has made begin so.
_UNMANAGED = "node_"


def bring_nodes(bundles: Sequence[Mapping[str, float]], are_there: Callable[[], bool]) -> bool:
    """Ask the autoscaler for room for all these bundles at a time, and wait until `are_there`; whether they are then.

    False at once where the cluster has no autoscaler, and later where it does not begin to start nodes.
    """
    if are_there():
        return True
    if not _has_autoscaler():
        return False
    _say(f"waiting for {describe(bundles)}, for which the autoscaler was asked")
    request_resources(bundles=[dict(bundle) for bundle in bundles])
    try:
        return _wait(bundles, are_there)
    finally:
        # It would hold for as long as the cluster: from here on, tasks and actors ask by themselves.
        request_resources(bundles=[])


def _wait(bundles: Sequence[Mapping[str, float]], are_there: Callable[[], bool]) -> bool:
    began = told = changed = time.monotonic()
    before = None
    while not are_there():
        now, state = time.monotonic(), (nodes_starting() or 0, len(ray.nodes()))
        if state != before:
            before, changed = state, now
        if now - changed > (_PATIENCE_SECONDS if state[0] else _BEGIN_SECONDS):
            return False
        if now - told > _SECONDS_BETWEEN_LINES:
            told = now
            _say(f"still waiting for {describe(bundles)}: {state[0]} nodes are starting")
        time.sleep(_POLL_SECONDS)
    _say(f"they are there after {time.monotonic() - began:.0f} s")
    return True


def _has_autoscaler() -> bool:
    """Waits for the first report of one that has just begun."""
    if not ray.is_initialized():  # Ray would start a cluster to ask
        return False
    deadline = time.monotonic() + _REPORT_SECONDS
    while (starting := nodes_starting()) is None and not _has_reported() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return starting is not None


def _has_reported() -> bool:
    return is_autoscaler_v2() or _report() is not None


def _report() -> dict[str, Any] | None:
    """What the cluster's monitor says of its autoscaler; None until it has looked at the nodes for the first time."""
    content = _internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS)
    return json.loads(content).get("autoscaler_report") if content else None


def nodes_starting() -> int | None:
    """How many nodes the autoscaler is starting; None where there is no autoscaler."""
    if is_autoscaler_v2():
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        if not any(node.ray_node_type_name for node in [*status.active_nodes, *status.idle_nodes]):
            return None
        return len(status.pending_nodes) + sum(launch.count for launch in status.pending_launches)
    report = _report()
    if report is None:
        return None
    kinds = {*report["active_nodes"], *(report["node_type_mapping"] or {}).values()}
    if kinds and all(kind.startswith(_UNMANAGED) for kind in kinds):
        return None
    return len(report["pending_nodes"]) + sum(report["pending_launches"].values())


def describe(bundles: Sequence[Mapping[str, float]]) -> str:
    """What is asked for in words, such as `8 × (1 GPU, gpu_node)`; of a resource that marks nodes, its name."""
    shapes = Counter(
        ", ".join(
            name if amount < 1 else f"{number_text(amount)} {name}" for name, amount in sorted(bundle.items())
        )
        for bundle in bundles
    )
    return " and ".join(f"{count} × ({shape})" for shape, count in shapes.items())


def _say(line: str) -> None:
    show_line(line, sys.stderr)
