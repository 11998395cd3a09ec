"""How far a run over many songs is, told as it goes."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """How far the songs are: a line that rewrites itself on a terminal, else a line every 30 seconds."""

    def __init__(
        self, total: int, unchanged: int, stream: TextIO | None = None, seconds_between_lines: float = 30
    ):
        self.total = total
        self.stream = stream if stream is not None else sys.stderr
        self.is_terminal = self.stream.isatty()
        self.interval = 0.2 if self.is_terminal else seconds_between_lines
        self.shown = time.monotonic()
        # The rate is counted from the first song: before it the models were loaded.
        self.first: tuple[int, float] | None = None
        if unchanged:
            print(f"{unchanged} songs are in the cache already", file=self.stream, flush=True)
        if total:
            print(f"encoding {total} songs", file=self.stream, flush=True)

    def show(self, done: int, rejected: int) -> None:
        """Tell of `done` songs, if the last line is old enough or the songs are all done."""
        now = time.monotonic()
        if self.first is None:
            self.first = done, now
        if now - self.shown < self.interval and done < self.total:
            return
        self.shown = now
        text = f"{done}/{self.total} songs, {rejected} rejected"
        if now > self.first[1]:
            rate = (done - self.first[0]) / (now - self.first[1])
            left = round((self.total - done) / rate)
            text += f", {rate:.2f} songs/s, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        start, end = ("\r\x1b[K", "") if self.is_terminal else ("", "\n")
        print(f"{start}{text}", end=end, file=self.stream, flush=True)

    def close(self) -> None:
        """End the line."""
        if self.is_terminal and self.total:
            print(file=self.stream, flush=True)
