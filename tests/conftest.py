"""What all tests share."""

from __future__ import annotations

import os
import secrets
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# The files that take longest, longest first: two processes that share the tests then end at about the same time.
LONGEST = (
    "pipelines/test_road.py",
    "tuning/test_job.py",
    "training/test_job.py",
    "cache/test_faults.py",
    "cache/test_precompute.py",
    "training/test_streaming.py",
    "training/test_object_storage.py",
    "tracking/test_mlflow_server.py",
    "models/test_fused.py",
    "evaluation/test_job.py",
    "reporting/test_job.py",
    "training/test_model.py",
    "training/test_worker.py",
    "tracking/test_sender.py",
    "models/test_kernels.py",
)


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, and leave out what needs a package that is not here."""
    if find_spec("torchao") is None:
        for item in items:
            if item.get_closest_marker("torchao"):
                item.add_marker(pytest.mark.skip(reason="torchao is not installed: make test-quantisation"))
    folder = Path(__file__).parent
    ranks = {folder / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, and lose a lot where other programs use the same cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def two_cpus(s3, gcs):
    """A Ray cluster of one node with two CPUs, for all tests that ask for it; its workers reach the storage servers."""
    import ray

    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def s3():
    """A server of object storage, `s3.url(prefix)` in its bucket; Ray workers that start later reach it too."""
    from tests.s3 import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def gcs():
    """URLs of Google's storage, on a server here: `gcs(prefix)`. Ray workers that start later reach it too."""
    from tests.gcs import gcs_server

    with gcs_server() as bucket:
        yield lambda prefix: f"{bucket}/{prefix}"
