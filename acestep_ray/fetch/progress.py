"""How far a download is, told while it runs."""

from __future__ import annotations

import threading
import time
from typing import TextIO

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_REDRAWS = 0.2


class Progress:
    """How far it is: one line that is drawn again on a terminal, elsewhere a line now and then; any thread may tell."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._lock = threading.Lock()
        self._total = self._done = self._brought = 0
        self._files = self._finished = 0
        self._started = self._shown = time.monotonic()

    def begin(self, files: int, total: int, done: int) -> None:
        """So many files and bytes are wanted, and `done` bytes of them are there."""
        self._files, self._total, self._done = files, total, done
        self._started = time.monotonic()
        if files:
            self.say(f"{files} files, {size_text(total)}, of which {size_text(done)} are there")

    def add(self, num_bytes: int) -> None:
        """So many more lie on disk; fewer than none where a file begins anew."""
        with self._lock:
            self._done += num_bytes
            self._brought += max(0, num_bytes)
            pause = _SECONDS_BETWEEN_REDRAWS if self._is_terminal else _SECONDS_BETWEEN_LINES
            if time.monotonic() - self._shown >= pause:
                self._shown = time.monotonic()
                self._print(self._state(), stays=not self._is_terminal)

    def finish(self, name: str) -> None:
        """A file is there."""
        with self._lock:
            self._finished += 1
            self._print(f"{name}: whole", stays=True)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        with self._lock:
            self._print(line, stays=True)

    def end(self) -> None:
        """Leave the line of a terminal to what follows."""
        with self._lock:
            if self._is_terminal:
                self._print("", stays=False)

    def _state(self) -> str:
        rate = self._brought / max(1e-3, time.monotonic() - self._started)
        left = max(0, self._total - self._done)
        share = f"{100 * self._done / self._total:.1f} % of {size_text(self._total)}" if self._total else ""
        remaining = f", {_duration(left / rate)} left" if rate > 0 else ""
        return f"{share}, {self._finished} of {self._files} files, {size_text(rate)}/s{remaining}"

    def _print(self, line: str, *, stays: bool) -> None:
        start = "\r\x1b[K" if self._is_terminal else ""
        print(f"{start}{line}", end="\n" if stays else "", file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"


def size_text(num_bytes: float) -> str:
    """Bytes in the largest unit that fits."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"
