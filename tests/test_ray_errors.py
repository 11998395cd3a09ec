"""What keeps Ray from starting is a mistake of the environment, told with its remedy."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time

import pytest

from acestep_ray.errors import EXIT_INPUT, InputError
from acestep_ray.ray_errors import check_address, explain_start


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:8265", "dashboard.*127.0.0.1:6379"),
        ("https://head", "dashboard.*head:6379"),
        ("ray://head:10001", "Ray Client.*ray job submit"),
        ("foo", "no address.*HOST:PORT"),
        ("127.0.0.1", "no address"),
        ("::::", "no address"),
        ("host:99999999", "no address"),
        ("s3://bucket", "no address"),
        ("no-such-host.invalid:6379", "no Ray cluster answers"),
    ],
)
def test_an_address_that_is_none_of_a_cluster_is_refused_with_what_to_give(address, said):
    with pytest.raises(InputError, match=f"(?s){said}"):
        check_address(address)


def test_an_address_where_nothing_listens_is_refused_within_seconds():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = time.monotonic()
    with pytest.raises(InputError, match="no Ray cluster answers"):
        check_address(f"127.0.0.1:{port}")
    assert time.monotonic() - before < 30


def test_an_address_where_something_listens_and_those_that_ray_finds_are_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_address(f"127.0.0.1:{server.getsockname()[1]}")
    check_address("auto")
    check_address("local")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /x"),
            "RAY_TMPDIR to a short path",
        ),
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.0\n    Python: 3.9"),
            "Ray: 2.0 Python: 3.9.*the cluster's versions",
        ),
        (RuntimeError("Unauthenticated: InvalidAuthToken"), "RAY_AUTH_TOKEN"),
        (ValueError("The configured object store size exceeds /dev/shm"), "--shm-size"),
        (PermissionError(errno.EACCES, "Permission denied", "/ro/ray"), "/ro/ray.*RAY_TMPDIR"),
        (OSError(errno.ENOSPC, "No space left on device", "/t/ray"), "No space left.*make room"),
        (OSError(errno.EADDRINUSE, "Address already in use"), "port that Ray wants is taken"),
        (ConnectionError("Failed to connect"), "no Ray cluster answers"),
        (ValueError("something new"), "something new.*acestep-ray doctor"),
    ],
)
def test_each_cause_has_its_remedy(error, said):
    told = explain_start(error, "head:6379" if isinstance(error, ConnectionError) else None)
    assert told.exit_code == EXIT_INPUT
    import re

    assert re.search(said, str(told), re.DOTALL), str(told)


def test_a_temporary_path_that_is_too_long_ends_with_its_remedy(tmp_path):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    code = "from acestep_ray.ray_runtime import connect; connect()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(long), "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "InputError: the temporary folder's path is too long" in done.stderr
