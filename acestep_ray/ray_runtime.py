"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import logging
import os

import ray


def connect() -> None:
    """Join the cluster that RAY_ADDRESS or `ray job submit` names, else start one here; nothing when already joined."""
    if ray.is_initialized():
        return
    # Warnings of Ray about itself are noise to a user; what goes wrong is raised.
    ray.init(
        logging_level=logging.ERROR, include_dashboard=False if "RAY_ADDRESS" not in os.environ else None
    )


def has_gpus() -> bool:
    """Whether the joined cluster has GPUs."""
    return ray.cluster_resources().get("GPU", 0) > 0
