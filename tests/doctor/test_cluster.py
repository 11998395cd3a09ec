from __future__ import annotations

import os
import socket
import sys

import pytest

from acestep_ray import __version__
from acestep_ray.doctor import cluster
from acestep_ray.doctor.cluster import (
    check_cluster,
    judge_nodes,
    judge_storage,
    judge_token,
    judge_versions,
    look_around,
)
from acestep_ray.storage import Store

SEEN = {"ray": "2.60.0", "python": "3.11.2", "acestep_ray": __version__, "storage": None}
HERE = {"ray": "2.60.0", "python": "3.11.2"}


def node(name="head", *, seen=SEEN, failure="", **resources):
    return {"id": name, "name": name, "resources": resources, "seen": seen, "failure": failure}


NODES = [
    node("head", CPU=4.0, memory=8.0 * 2**30, object_store_memory=2.0 * 2**30),
    node("gpu", **{"CPU": 16.0, "GPU": 2.0, "accelerator_type:H100": 1.0, "memory": 8.0 * 2**30}),
]


def only(findings):
    (finding,) = findings
    return finding


def test_the_resources_of_all_nodes_are_one_line():
    finding = only(judge_nodes("head:6379", NODES))
    assert finding.level == "ok"
    assert finding.found == (
        "head:6379: 2 nodes, 20 CPUs, 2 GPUs (H100), 16 GiB of memory, 2 GiB of object store"
    )
    assert "no GPU" in only(judge_nodes("head:6379", NODES[:1])).found


def test_a_node_that_does_not_answer_is_named():
    silent = node("lost", seen=None, failure="a task does not come back in 30 s")
    first, second = judge_nodes("head:6379", [*NODES, silent])
    assert (first.level, second.level) == ("ok", "problem")
    assert "lost: a task does not come back" in second.found


def test_versions_are_equal_or_named():
    assert only(judge_versions(NODES, HERE)).level == "ok"
    other = node("gpu", seen={**SEEN, "python": "3.12.1"})
    finding = only(judge_versions([NODES[0], other], HERE))
    assert finding.level == "problem"
    assert "gpu has python 3.12.1, here is 3.11.2" in finding.found
    old = node("gpu", seen={**SEEN, "acestep_ray": "0.0.1"})
    assert "acestep_ray 0.0.1" in only(judge_versions([old], HERE)).found


def test_an_open_cluster_is_a_warning_where_others_reach_it():
    assert judge_token("10.0.0.1:6379", is_open=False).level == "ok"
    assert judge_token("127.0.0.1:6379", is_open=True).level == "ok"
    open_to_all = judge_token("10.0.0.1:6379", is_open=True)
    assert open_to_all.level == "warning"
    assert "RAY_AUTH_MODE=token" in open_to_all.remedy


def test_storage_that_a_node_does_not_see_is_a_problem():
    assert judge_storage("/shared", NODES, None).level == "ok"
    blind = node("gpu", seen={**SEEN, "storage": "a file of another machine is not there"})
    finding = judge_storage("/shared", [NODES[0], blind], None)
    assert finding.level == "problem"
    assert "gpu: a file of another machine is not there" in finding.found
    assert "this machine: no bucket" in judge_storage("s3://a/b", NODES, "no bucket").found


def test_a_node_without_the_shared_directory_makes_none(tmp_path):
    store = Store.at(tmp_path / "shared")
    told = look_around(store.url, "folder", "n1", "content")
    assert told["storage"] == "a file of another machine is not there"
    assert list(tmp_path.iterdir()) == []
    store.write_bytes("folder/driver", b"another")
    assert "reads differently" in look_around(store.url, "folder", "n1", "content")["storage"]
    store.write_bytes("folder/driver", b"content")
    assert look_around(store.url, "folder", "n1", "content")["storage"] is None
    assert store.read_bytes("folder/n1") == b"content"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:8265", "the dashboard's address"),
        ("127.0.0.1:9", "does not answer"),
        ("127.0.0.1:many", "is no address"),
    ],
)
def test_an_address_where_no_cluster_is_is_a_problem(address, said):
    finding = only(check_cluster(address, None))
    assert (finding.level, said in finding.found) == ("problem", True)


def test_a_server_that_listens_and_never_answers_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        finding = only(check_cluster(f"127.0.0.1:{silent.getsockname()[1]}", None, seconds=0.5))
    assert finding.level == "problem"
    assert "no answer in 0.5 s" in finding.found


def test_a_process_without_an_answer_tells_its_last_line(monkeypatch):
    process = cluster._in_process("no_such_function()", os.environ)
    answer, failure = cluster._answer_of(process, 60.0)
    assert answer is None
    assert "no_such_function" in failure
    assert process.args[0] == sys.executable


def test_the_token_is_not_given_to_the_stranger():
    environment = {"RAY_AUTH_TOKEN": "t", "RAY_AUTH_TOKEN_PATH": "p", "RAY_AUTH_MODE": "token", "PATH": "x"}
    assert cluster._without_token(environment) == {"RAY_AUTH_MODE": "disabled", "PATH": "x"}


@pytest.mark.ray
def test_a_cluster_of_one_node_is_whole(two_cpus, tmp_path):
    findings = {finding.check: finding for finding in check_cluster(two_cpus, str(tmp_path / "exps"))}
    assert {finding.level for finding in findings.values()} == {"ok"}
    assert list(findings) == ["cluster", "versions", "token", "storage"]
    assert "1 nodes, 2 CPUs" in findings["cluster"].found
    assert "takes nobody without its token" in findings["token"].found
    assert list(tmp_path.iterdir()) == []
