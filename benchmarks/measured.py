"""Seconds and memory of a case of `scale.py`, which has a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEGABYTE = 1e6


def resident_mb() -> float:
    """The most memory that this process has had; Linux."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / MEGABYTE


@contextmanager
def timed(figures: dict[str, Any], name: str) -> Iterator[None]:
    """Adds the seconds of the block to `figures`, under `name`."""
    started = time.perf_counter()
    yield
    figures[name] = round(figures.get(name, 0) + time.perf_counter() - started, 2)


def timed_calls(figures: dict[str, Any], owner: Any, *names: str) -> None:
    """Let functions of a module, or of a class, add their seconds to `figures`."""

    def timing(name: str) -> Callable[..., Any]:
        function = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with timed(figures, f"{name.removeprefix('_')}_s"):
                return function(*arguments, **options)

        return call

    for name in names:
        setattr(owner, name, timing(name))


def in_process(measure: Callable[..., dict], *arguments: Any) -> dict[str, Any]:
    """What `measure` returns in a process of its own, and the most memory that it had."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        figures = pool.submit(measure, *arguments).result()
        return {**figures, "rss_mb": round(pool.submit(resident_mb).result())}
