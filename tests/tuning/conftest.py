"""A tiny checkpoint and a made problem of which the best rank and rate are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
from tests.tuning.problem import write_problem


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> CheckpointDir:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def problem(tmp_path_factory) -> Path:
    return write_problem(tmp_path_factory.mktemp("problem") / "cache", songs=18)
