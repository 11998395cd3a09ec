"""Clients that give up quickly, on a way to the S3 server on which requests fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from acestep_ray.storage import Store, clients
from tests.s3 import Faults, S3Server, faulty


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Short waits, and one attempt of the client in each of ours."""
    with pytest.MonkeyPatch.context() as patch:
        config = {"connect_timeout": 5, "read_timeout": 20, "retries": {"total_max_attempts": 1}}
        patch.setattr(clients, "S3_CONFIG", config)
        patch.setattr(clients, "RETRY_AFTER_SECONDS", (0.01, 0.01, 0.01))
        yield


@pytest.fixture(scope="module")
def faulty_way(s3: S3Server, quick) -> Iterator[Faults]:
    with faulty(s3) as faults:
        yield faults


@pytest.fixture
def faults(faulty_way: Faults) -> Iterator[Faults]:
    """All tests of a module share a way, on which nothing fails before a test says so."""
    yield faulty_way
    faulty_way.fails = lambda method, path: None
    faulty_way.requests.clear()


@pytest.fixture(params=["local", "memory", "s3"])
def store(request, tmp_path) -> Store:
    """An empty store of each kind."""
    if request.param == "local":
        return Store.at(tmp_path / "store")
    if request.param == "memory":
        return Store.at(f"memory://{tmp_path.name}/store")
    return Store.at(request.getfixturevalue("s3").fresh())
