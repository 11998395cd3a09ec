from __future__ import annotations

import pytest

from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> CheckpointDir:
    """A tiny checkpoint that no test changes."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
