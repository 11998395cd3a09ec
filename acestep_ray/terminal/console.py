"""Whether somebody looks at a stream, and how much they want to see."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

VERBOSE = "ACESTEP_VERBOSE"
"""Environment variable that shows what Ray logs and its workers print; `-v` sets it for the command."""


def is_verbose() -> bool:
    """Whether Ray's logs, its workers' output and Ray Data's progress are wanted."""
    return os.environ.get(VERBOSE, "") not in ("", "0")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether the stream is a terminal that can move its cursor."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def rich_console(stream: TextIO, width: int | None = None) -> Console:
    """Writes to `stream`: in colour on a terminal unless $NO_COLOR is set, plain text elsewhere.

    What is printed to it must have passed `escapes`.
    """
    from rich.console import Console

    return Console(
        file=getattr(stream, "trusted", stream),  # the console's own colours are not escaped
        width=width,
        force_terminal=is_terminal(stream),  # $FORCE_COLOR would put control characters into files
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )
