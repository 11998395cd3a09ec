"""What a run knows of its processes: how often a song was begun, and which actors hold models.

A song that ends the process which works on it would be tried without end.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError

MAX_ATTEMPTS = 3
"""Ray Data retries without end what a dead worker was doing."""


class Attempts:
    """An actor that counts how often a stage has begun a song that it did not finish: its process ended."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.holders: list[Any] = []

    def begin(self, stage: str, keys: list[str]) -> int:
        """The number of this attempt, counted from 1, of that of the songs which was tried most often."""
        self.counts.update((stage, key) for key in keys)
        return max(self.counts[stage, key] for key in keys)

    def end(self, stage: str, keys: list[str]) -> None:
        for key in keys:
            self.counts.pop((stage, key), None)

    def join(self, actor: Any) -> None:
        """Take the handle of an actor that holds models."""
        self.holders.append(actor)

    def holding(self) -> list[Any]:
        """The handles of all that have joined."""
        return self.holders


def join_run(attempts: Any) -> None:
    """Let `holders_ended` end the actor that this runs in, if it runs in one."""
    context = ray.get_runtime_context()
    if context.get_actor_id() is not None:
        attempts.join.remote(context.current_actor)


@contextlib.contextmanager
def holders_ended(attempts: Any) -> Iterator[None]:
    """Around a run: at its end, whatever that is, the actors that hold models end.

    Ray Data leaves that to the collection of garbage, which may not come as long as an error of the run is kept; the
    next run of this process would wait for their GPUs.
    """
    try:
        yield
    finally:
        with contextlib.suppress(RayError):  # what ended the run is worth more than what ends its actors
            for actor in ray.get(attempts.holding.remote()):
                ray.kill(actor)


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
