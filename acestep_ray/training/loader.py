"""Reads a worker's micro-batches ahead of the model, in the plan's order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(items: Iterable[Item], load: Callable[[Item], Result], threads: int) -> Iterator[Result]:
    """Yield `load(item)` for every item, in order, with up to 2 · `threads` of them under way.

    With 0 threads everything happens in the caller's. An exception of `load` is raised at its item's turn.
    """
    if threads == 0:
        yield from map(load, items)
        return
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
    try:
        for item in items:
            pending.append(pool.submit(load, item))
            if len(pending) >= 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
