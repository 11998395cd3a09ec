"""A command in a terminal of its own, and what it writes there."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
from dataclasses import dataclass


@dataclass(frozen=True)
class Shown:
    """What a command wrote, and its exit code."""

    code: int
    text: str


def on_terminal(
    command: list[str], *, columns: int = 100, interrupt_at: str | None = None, **variables: str
) -> Shown:
    """Run a command whose three streams are a terminal; Ctrl-C is typed once `interrupt_at` is on it."""
    outside, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    unset = ("NO_COLOR", "FORCE_COLOR", "COLUMNS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    process = subprocess.Popen(
        command,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env={**environment, "TERM": "xterm-256color", **variables},
        start_new_session=True,
    )
    os.close(inside)
    shown = b""
    while True:
        try:
            shown += os.read(outside, 65536)
        except OSError:  # its other end is closed
            break
        if interrupt_at is not None and interrupt_at.encode() in shown:
            os.killpg(process.pid, signal.SIGINT)
            interrupt_at = None
    os.close(outside)
    return Shown(process.wait(timeout=60), shown.decode())
