"""Standard error of a driver, without lines of Ray's C++ code that say nothing to a user.

Python's own stream keeps the terminal or file that it had, so that progress bars and tracebacks go there directly.
What else is written to file descriptor 2, by C++ code or by a crash, passes `stderr_filter`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
from pathlib import Path

from acestep_ray.terminal.streams import Guarded

_STDERR = 2
_SECONDS_TO_END = 0.5
_FILTER = Path(__file__).with_name("stderr_filter.py")


class _FilteredStderr:
    """File descriptor 2 led through the filter, until `end`."""

    def __init__(self) -> None:
        sys.stderr.flush()
        self._direct = os.dup(_STDERR)
        source, target = os.pipe()
        try:
            self._filter = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_FILTER)],
                stdin=source,
                stdout=self._direct,
                stderr=self._direct,
            )
            os.dup2(target, _STDERR)  # inherited by the processes that it starts, as before
        except OSError:
            os.close(self._direct)
            raise
        finally:
            os.close(source)
            os.close(target)
        before = sys.stderr
        sys.stderr = Guarded(
            os.fdopen(self._direct, "wb", buffering=0, closefd=False),
            encoding=before.encoding,
            errors=before.errors,
            line_buffering=True,
            write_through=True,
        )

    def end(self) -> None:
        """Lead file descriptor 2 where it led before, when all that is on its way has arrived."""
        with contextlib.suppress(OSError):
            os.dup2(self._direct, _STDERR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._filter.wait(_SECONDS_TO_END)


_installed: list[_FilteredStderr] = []


def filter_stderr() -> None:
    """Keep noise of Ray's C++ code out of standard error from now on; once in a process.

    Nothing changes where Python's stream is another one than file descriptor 2, as in a notebook or a test.
    """
    if _installed:
        return
    try:
        if sys.stderr.fileno() != _STDERR:
            return
        _installed.append(_FilteredStderr())
    except (
        OSError,
        ValueError,
        AttributeError,
    ):  # no stream, or no process to be had: then the line is shown
        return
    atexit.register(_installed[0].end)
