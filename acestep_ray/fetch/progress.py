"""How far a download is, told while it runs."""

from __future__ import annotations

import threading
from typing import TextIO

from acestep_ray import terminal
from acestep_ray.units import size_text


class Progress:
    """How far a download of many files is; any thread may tell."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._lock = threading.Lock()
        self._bar: terminal.Progress | None = None
        self._done = self._files = self._finished = 0

    def begin(self, files: int, total: int, done: int) -> None:
        """So many files and bytes are wanted, and `done` bytes of them are there."""
        if not files:
            return
        self.say(f"{files} files, {size_text(total)}, of which {size_text(done)} are there")
        self._files, self._done = files, done
        self._bar = terminal.Progress("downloading", total, "", amount=size_text, stream=self._stream)
        self._bar.start()
        self._bar.update(done, self._state())

    def add(self, num_bytes: int) -> None:
        """So many more lie on disk; fewer than none where a file begins anew."""
        with self._lock:
            self._done += num_bytes
            if self._bar is not None:
                self._bar.update(self._done, self._state())

    def finish(self, name: str) -> None:
        """A file is there."""
        with self._lock:
            self._finished += 1
            if self._bar is not None:
                self._bar.update(self._done, self._state())
        self.say(f"{name}: whole")

    def say(self, line: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            self._bar.say(line)
        else:
            terminal.show_line(line, self._stream)

    def end(self) -> None:
        """Leave the terminal to what follows."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _state(self) -> str:
        return f"{self._finished} of {self._files} files"
