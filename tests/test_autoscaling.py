"""Waiting for nodes that an autoscaler brings; tests/cluster has one that does."""

from __future__ import annotations

import json

import pytest

from acestep_ray import autoscaling

BUNDLES = [{"GPU": 1, "gpu_node": 0.0001}] * 2


class Cluster:
    """Stands for Ray: what its autoscaler reports, one report after another, and what it was asked for."""

    def __init__(self, monkeypatch, reports):
        self.reports, self.asked, self.seconds = list(reports), [], 0.0
        monkeypatch.setattr(autoscaling, "nodes_starting", lambda: self.report())
        monkeypatch.setattr(autoscaling, "_has_reported", lambda: True)
        monkeypatch.setattr(autoscaling, "request_resources", lambda bundles: self.asked.append(bundles))
        monkeypatch.setattr("ray.nodes", list)
        monkeypatch.setattr("ray.is_initialized", lambda: True)
        monkeypatch.setattr("time.sleep", self.sleep)
        monkeypatch.setattr("time.monotonic", lambda: self.seconds)

    def report(self):
        return self.reports.pop(0) if len(self.reports) > 1 else self.reports[0]

    def sleep(self, seconds):
        self.seconds += seconds


def test_nodes_that_are_there_are_asked_of_nobody(monkeypatch):
    cluster = Cluster(monkeypatch, [0])
    assert autoscaling.bring_nodes(BUNDLES, lambda: True)
    assert cluster.asked == []


def test_without_an_autoscaler_nobody_waits(monkeypatch):
    cluster = Cluster(monkeypatch, [None])
    assert not autoscaling.bring_nodes(BUNDLES, lambda: False)
    assert (cluster.asked, cluster.seconds) == ([], 0)


def test_what_is_waited_for_is_told_asked_for_and_then_asked_for_no_more(monkeypatch, capsys):
    cluster = Cluster(monkeypatch, [0, 0, 2])
    assert autoscaling.bring_nodes(BUNDLES, lambda: cluster.seconds > 200)
    assert cluster.asked == [BUNDLES, []]
    first, *more, last = capsys.readouterr().err.splitlines()
    assert first == "waiting for 2 × (1 GPU, gpu_node), for which the autoscaler was asked"
    assert more == ["still waiting for 2 × (1 GPU, gpu_node): 2 nodes are starting"] * 3
    assert last.startswith("they are there after")


@pytest.mark.parametrize(("starting", "seconds"), [(0, 60), (1, 1800)])
def test_the_wait_ends_where_nothing_more_happens(monkeypatch, starting, seconds):
    cluster = Cluster(monkeypatch, [starting])
    assert not autoscaling.bring_nodes(BUNDLES, lambda: False)
    assert seconds <= cluster.seconds <= seconds + 5
    assert cluster.asked[-1] == []


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"active_nodes": {"node_ab12": 1}, "node_type_mapping": {"ab12": "node_ab12"}}, None),
        ({"active_nodes": {}, "node_type_mapping": {"ab12": "ray.head.default"}}, 0),
        (
            {
                "active_nodes": {"gpu": 1},
                "pending_nodes": [["ip", "gpu", "up"]],
                "pending_launches": {"cpu": 2},
            },
            3,
        ),
    ],
)
def test_an_autoscaler_is_told_from_a_monitor_that_only_looks(monkeypatch, report, expected):
    whole = {"node_type_mapping": None, "pending_nodes": [], "pending_launches": {}, **report}
    content = json.dumps({"autoscaler_report": whole}).encode()
    monkeypatch.setattr(autoscaling, "is_autoscaler_v2", lambda: False)
    monkeypatch.setattr(autoscaling, "_internal_kv_get", lambda key: content)
    assert autoscaling.nodes_starting() == expected


def test_a_monitor_that_has_not_looked_at_the_nodes_yet_is_waited_for(monkeypatch):
    report = {"active_nodes": {}, "node_type_mapping": {}, "pending_nodes": [], "pending_launches": {}}
    said = iter([None, b'{"load_metrics_report": {}}'])
    last = json.dumps({"autoscaler_report": report}).encode()
    monkeypatch.setattr(autoscaling.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(autoscaling, "is_autoscaler_v2", lambda: False)
    monkeypatch.setattr(autoscaling, "_internal_kv_get", lambda key: next(said, last))
    monkeypatch.setattr(autoscaling.time, "sleep", lambda seconds: None)
    assert autoscaling._has_autoscaler()
