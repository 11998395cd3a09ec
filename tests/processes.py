"""Processes of a Ray cluster, for tests that end some of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def worker_processes(name: str, address: str) -> list[int]:
    """Process ids of the workers of the cluster at `address` that run what `name` says."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            title = (entry / "cmdline").read_bytes().decode(errors="replace")
            if not title.startswith("ray::") or name not in title:
                continue
            parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
            raylet = Path("/proc", parent, "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if address in raylet:
            found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], bool], ended: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for a moment at which a run is to be disturbed."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert not ended(), "the run has ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
