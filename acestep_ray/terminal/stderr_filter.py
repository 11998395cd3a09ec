"""Copies standard input to standard output, without the lines that say nothing to a user.

Run as a separate program by `driver_stderr`, without the package and without site-packages, so that it starts in
milliseconds. A process rather than a thread: what a crash of the driver writes last still arrives.
"""

from __future__ import annotations

import os
import re
import select
import signal
from collections.abc import Callable

# Ray Data gives each actor of a pool two references that it holds itself as long as the pool lives, and Ray's core
# worker warns that they could be lost (https://github.com/ray-project/ray/issues/53727).
NOISE = re.compile(
    rb"(\x1b\[[0-9;]*m)*\[[\d :,.-]+ [EW] \d+ \d+\] core_worker\.cc:\d+: Actor with class name: '[^\n]*' and ID: '\w+' "
    rb"has constructor arguments in the object store and max_restarts > 0\.[^\n]*"
)
# As `escapes`, in bytes; colours, carriage returns of progress bars and damaged UTF-8 stay.
_UNSEEN = re.compile(
    rb"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]|\x1b(?!\[[0-9;]*m)|\xc2[\x80-\x9f]"
    rb"|\xe2\x80[\x8b-\x8f\xa8-\xae]|\xe2\x81[\xa0-\xaf]|\xef\xbb\xbf"
)
_NOISE_STARTS = (b"[", b"\x1b")
# A line that may become noise waits for its end so long; the line is written in one piece, within microseconds.
SECONDS_FOR_A_LINE = 0.2
_LOOKS_FOR_PARENT_SECONDS = 1.0
_CHUNK = 65536


def _code(match: re.Match[bytes]) -> bytes:
    return b"".join(b"\\x%02x" % byte for byte in match[0])


class LineFilter:
    """Passes bytes on at once, but for a line that begins as noise does, which is looked at when it is whole."""

    def __init__(self, write: Callable[[bytes], None]):
        self._write = write
        self._held = b""
        self._at_line_start = True

    @property
    def holds(self) -> bool:
        """Whether the start of a line waits for its end."""
        return bool(self._held)

    def feed(self, content: bytes) -> None:
        """Take what was written."""
        content, self._held = self._held + content, b""
        passed = []
        for line in content.splitlines(keepends=True):
            is_whole = line.endswith((b"\n", b"\r"))
            may_be_noise = self._at_line_start and line.startswith(_NOISE_STARTS)
            if may_be_noise and not is_whole:
                self._held = line
                break
            if not (may_be_noise and NOISE.fullmatch(line.rstrip(b"\r\n"))):
                passed.append(line)
                self._at_line_start = is_whole
        if passed:
            self._write(_UNSEEN.sub(_code, b"".join(passed)))

    def flush(self) -> None:
        """Pass on what is held: no end of its line has come."""
        if self._held:
            self._at_line_start = False
            held, self._held = self._held, b""
            self._write(_UNSEEN.sub(_code, held))


def main(source: int = 0, target: int = 1) -> None:
    """Filter until the end of `source`, or until the parent process is gone and nothing is left to read."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
        signal.signal(
            number, signal.SIG_IGN
        )  # Ctrl-C goes to the whole group; the driver decides when it ends

    def write(content: bytes) -> None:
        while content:
            content = content[os.write(target, content) :]

    parent = os.getppid()
    lines = LineFilter(write)
    while True:
        wait = SECONDS_FOR_A_LINE if lines.holds else _LOOKS_FOR_PARENT_SECONDS
        if select.select([source], [], [], wait)[0]:
            content = os.read(source, _CHUNK)
            if not content:
                break
            lines.feed(content)
        else:
            lines.flush()
            if os.getppid() != parent:  # processes that it has left behind may hold the other end
                break
    lines.flush()


if __name__ == "__main__":
    main()
