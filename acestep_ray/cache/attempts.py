"""How often a song was begun: one that ends the process which works on it would be tried without end."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import ray

MAX_ATTEMPTS = 3
"""Ray Data retries without end what a dead worker was doing."""


class Attempts:
    """An actor that counts how often a stage has begun a song that it did not finish: its process ended."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def begin(self, stage: str, keys: list[str]) -> int:
        """The number of this attempt, counted from 1, of that of the songs which was tried most often."""
        self.counts.update((stage, key) for key in keys)
        return max(self.counts[stage, key] for key in keys)

    def end(self, stage: str, keys: list[str]) -> None:
        for key in keys:
            self.counts.pop((stage, key), None)


@contextlib.contextmanager
def counted(attempts: Any, stage: str, keys: list[str]) -> Iterator[int]:
    """The number of this attempt at these songs, by the actor `attempts`.

    What raises has not ended its process, and counts as finished.
    """
    number = ray.get(attempts.begin.remote(stage, keys))
    try:
        yield number
    finally:
        attempts.end.remote(stage, keys)
