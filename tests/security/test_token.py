"""A cluster that a job starts for itself admits nobody without its token, which other users of the machine lack."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# `connect` in a process of its own: the tests' own cluster must not be the one that is looked at.
JOB = """
import os, sys
import ray
from acestep_ray.doctor import cluster
from acestep_ray.ray_runtime import connect

connect()
address = ray.get_runtime_context().gcs_address
member = cluster._in_process(f"knock({address!r})", os.environ)
strangers = [
    cluster._in_process(f"knock({address!r})", {**cluster._without_token(os.environ), **given})
    for given in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64})
]
print("member", cluster._answer_of(member, 60.0))
for stranger in strangers:
    print("stranger", cluster._answer_of(stranger, 60.0))
print("dashboard", ray._private.worker._global_node.webui_url)
print("token", os.environ["RAY_AUTH_TOKEN"])
"""


@pytest.mark.ray
def test_a_process_without_the_token_cannot_join_the_cluster_that_connect_started(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", JOB],
        env={**environment, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    answers = [rest for name, _, rest in lines if name in ("member", "stranger")]
    assert len(answers) == 3
    assert answers[0].startswith("({'cluster': "), answers[0]
    for refused in answers[1:]:
        assert refused.startswith("(None, "), refused
        assert "nauthenticated" in refused or "token" in refused.lower(), refused
    ends = {name: rest for name, _, rest in lines}
    assert ends["dashboard"] in ("", "None")
    assert ends["token"] not in done.stderr + "".join(answers)
    assert not (tmp_path / ".ray").exists(), "every later `ray start` would find the token there"
