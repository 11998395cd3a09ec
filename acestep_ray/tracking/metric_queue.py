"""Metrics that wait for MLflow: in memory, and in a file that outlives the process."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

REQUEST_METRICS = 1000
# May wait in memory, where the disk fails too.
MEMORY_METRICS = 50_000

Say = Callable[[str], None]


class Metric(NamedTuple):
    """A value by the step that it belongs to."""

    step: int
    name: str
    value: float
    time_ms: int
    """Since 1970."""


class MetricQueue:
    """Metrics that are not sent yet, oldest first: those in a file of JSON lines, then those in memory.

    For one thread at a time. The file is deleted when all of it is sent; while it takes nothing, metrics stay in
    memory, up to a bound.
    """

    def __init__(self, path: Path, first_step: int, say: Say):
        """Takes over what an earlier run has left in the file, of the steps before `first_step`."""
        self.lost = 0
        """Metrics for which there was no place."""
        self._path = path
        self._memory: deque[Metric] = deque()
        self._in_file = self._start = self._end = 0
        """How many metrics in the file are not sent; their first byte, and the one after their last."""
        self._usable = True
        try:
            self._take_over(first_step)
        except OSError as error:
            self._usable = False
            say(f"warning: the metrics in {path} cannot be read, and MLflow does not get them ({error})")

    def __len__(self) -> int:
        return self._in_file + len(self._memory)

    def add(self, metrics: Iterable[Metric]) -> None:
        """Note the newest; beyond what memory takes they go to the file."""
        for metric in metrics:
            if len(self._memory) >= MEMORY_METRICS and not self.spill():
                self.lost += 1
            else:
                self._memory.append(metric)

    def first(self) -> list[Metric]:
        """The oldest, as many as one request takes."""
        if self._in_file:
            lines = self._lines(min(self._in_file, REQUEST_METRICS))
            metrics = [metric for line in lines if (metric := _parsed(line)) is not None]
            if len(metrics) == len(lines):
                return metrics
            self._forget_file()
        return list(itertools.islice(self._memory, REQUEST_METRICS))

    def remove(self, count: int) -> None:
        """Forget the oldest, which were sent; they may have come to the file since `first`."""
        if not self._in_file:
            for _ in range(count):
                self._memory.popleft()
            return
        lines = self._lines(count)
        if b"" in lines:
            self._forget_file()
            return
        self._start += sum(map(len, lines))
        self._in_file -= count
        if not self._in_file:
            self._start = self._end = 0
            with contextlib.suppress(OSError):  # then they are sent once more, to no harm
                self._path.unlink(missing_ok=True)

    def spill(self) -> bool:
        """Move what is in memory to the file; False where that fails, and nothing was moved."""
        if not self._memory:
            return True
        if self._in_file and not self._lines(1)[0]:
            self._forget_file()
        if not self._usable:
            return False
        content = b"".join(map(_line, self._memory))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab") as file:
                file.truncate(self._end)  # an attempt that failed may have left a part
                file.write(content)
        except OSError:
            return False
        self._in_file += len(self._memory)
        self._end += len(content)
        self._memory.clear()
        return True

    def keep(self) -> int:
        """Leave in the file what is not sent, and only that; returns how many. What it does not take is lost."""
        if not self.spill():
            self.lost += len(self._memory)
            self._memory.clear()
        if self._start and self._in_file:
            with contextlib.suppress(OSError):  # then some are sent once more, to no harm
                self._rewrite(filter(None, map(_parsed, self._lines(self._in_file))))
        return self._in_file

    def _take_over(self, first_step: int) -> None:
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            # A line that a kill has cut is none.
            metrics = filter(None, map(_parsed, file))
            self._rewrite(metric for metric in metrics if metric.step < first_step)

    def _rewrite(self, metrics: Iterable[Metric]) -> None:
        """Write the file anew; where there are no metrics, there is no file."""
        unfinished = self._path.with_suffix(".tmp")
        count = size = 0
        with open(unfinished, "wb") as file:
            for metric in metrics:
                count += 1
                size += file.write(_line(metric))
        os.replace(unfinished, self._path)
        if not count:
            self._path.unlink()
        self._in_file, self._start, self._end = count, 0, size

    def _lines(self, count: int) -> list[bytes]:
        """The first lines that are not sent; empty ones where the file has been damaged or deleted."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._start)
                return [file.readline() for _ in range(count)]
        except OSError:
            return [b""]

    def _forget_file(self) -> None:
        """Go on without a file that somebody has damaged or deleted."""
        self.lost += self._in_file
        self._in_file = self._start = self._end = 0
        self._usable = not self._path.exists()


def _line(metric: Metric) -> bytes:
    return json.dumps(metric._asdict()).encode() + b"\n"


def _parsed(line: bytes) -> Metric | None:
    """The metric of a line; None for what is none."""
    try:
        values = json.loads(line)
        return Metric(
            int(values["step"]), str(values["name"]), float(values["value"]), int(values["time_ms"])
        )
    except (ValueError, TypeError, KeyError):
        return None
