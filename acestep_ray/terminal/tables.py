"""Summaries and messages: small tables, the same everywhere, in colour on a terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from acestep_ray.hidden_secrets import fit_to_print
from acestep_ray.terminal.console import is_terminal, rich_console
from acestep_ray.terminal.escapes import visible, visible_line, visible_message

_NARROWEST_NAME = 7
# A name of `fact_table`, two spaces or more, and what there is to say of it.
_NAMED = re.compile(r"(?P<name>\S(?:.*?\S)?)  +\S.*")
_STYLES = {
    **dict.fromkeys(("warning", "note", "stopped"), "yellow"),
    **dict.fromkeys(("failed", "problem"), "red"),
    "ok": "green",
}


def fact_table(rows: Iterable[tuple[str, object]]) -> str:
    """Names and values as a table without lines; a row without a name goes on with the value above it."""
    texts = [(visible_line(name), visible(str(value))) for name, value in rows]
    width = max([_NARROWEST_NAME, *(len(name) for name, _ in texts)]) + 2
    lines = []
    for name, value in texts:
        first, *more = value.split("\n")
        lines += [f"{name:<{width}}{first}", *(" " * width + line for line in more)]
    return "\n".join(line.rstrip() for line in lines)


def column_table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a line of names above its rows; numbers stand below one another on the right."""
    cells = [[visible_line(cell) for cell in row] for row in (names, *rows)]
    by_column = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in by_column]
    is_number = [len(column) > 1 and all(map(_is_number, column[1:])) for column in by_column]
    lines = []
    for row in cells:
        aligned = zip(row, widths, is_number, strict=True)
        lines.append("  ".join(f"{c:>{width}}" if right else f"{c:<{width}}" for c, width, right in aligned))
    return "\n".join(line.rstrip() for line in lines)


def show_summary(text: str, stream: TextIO | None = None) -> None:
    """Print a summary; on a terminal the names of its facts are in colour. A reader may end before it does."""
    stream, text = stream if stream is not None else sys.stdout, visible(text)
    if not is_terminal(stream):
        try:
            print(text, file=stream, flush=True)
        except BrokenPipeError:  # `… | head`; what is left would be written, and fail, once more at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return
    from rich.text import Text

    shown = Text()
    for line in text.split("\n"):
        told = Text(f"{line}\n")
        if named := _NAMED.fullmatch(line):
            told.stylize(_STYLES.get(named["name"], "cyan"), 0, named.end("name"))
        shown.append_text(told)
    rich_console(stream).print(shown, end="")


def show_error(kind: str, message: str, stream: TextIO | None = None) -> None:
    """Print `kind: message` without secrets, the kind in red on a terminal."""
    from rich.text import Text

    rich_console(stream if stream is not None else sys.stderr).print(
        Text.assemble((f"{kind}:", "bold red"), f" {visible_message(fit_to_print(message))}")
    )


def show_line(text: object, stream: TextIO | None = None) -> None:
    """Print a line of a job's log, to standard output where nothing else is given."""
    print(visible_message(str(text)), file=stream if stream is not None else sys.stdout, flush=True)


def _is_number(cell: str) -> bool:
    return cell == "–" or re.fullmatch(r"[+-]?[\d.,]+(e[+-]?\d+)?", cell) is not None
