"""The help of a command: its flags in groups, each with what it does and its default."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from acestep_ray.terminal.console import VERBOSE, rich_console

if TYPE_CHECKING:
    from rich.text import Text

_INDENT = 2
_WIDEST = 110
# A flag that is longer has its text in the next line.
_FLAG_WIDTH = 26
_UNBROKEN = "\xa0"
_OTHERS = "arguments"
_ALWAYS = "with every command"
_EXIT_CODES = (
    "Exit codes: 0 done, 1 a fault, 2 a mistake in the input or the flags, 130 interrupted (Ctrl-C)."
)
_SWITCHES = (
    ("-v, --verbose", f"Show what Ray logs and what its workers print; {VERBOSE}=1 does the same."),
    ("--debug", "Show the traceback of an error."),
    ("-h, --help", "Show this."),
)
_KINDS = {"int": "N", "float": "X", "bool": "true|false"}


@dataclass(frozen=True)
class Entry:
    """A flag, a positional argument or a subcommand."""

    name: str
    shown: str
    """As it is typed."""
    about: str
    note: str = ""
    """Its default, or that it is required."""


def help_text(parser: Any, width: int = 80) -> Text:
    """The help of a `Parser`, for a terminal of `width` columns."""
    from rich.text import Text

    text = Text()
    text.append("usage: ", "bold").append(f"{parser.usage}\n\n").append(
        _wrapped(parser.description, width, 0)
    )
    left = {entry.name: entry for entry in _entries(parser)}
    general = [left.pop(name) for name in ("config", "print_config", "version") if name in left]
    sections = {
        title: [left.pop(name) for name in names if name in left] for title, names in parser.sections.items()
    }
    sections[_OTHERS] = list(left.values())
    sections[_ALWAYS] = [*general, *(Entry(shown, shown, about) for shown, about in _SWITCHES)]
    longest = max(len(entry.shown) for entries in sections.values() for entry in entries)
    for title, entries in sections.items():
        _add_section(text, title, entries, width, column=_INDENT + min(longest, _FLAG_WIDTH) + 2)
    text.append("\n")
    for paragraph in f"{parser.epilog}\n{_EXIT_CODES}".split("\n"):
        text.append(_wrapped(paragraph, width, 0))
    return text


def show_help(parser: Any, stream: TextIO) -> None:
    """Print the help, as wide as the terminal is, up to 110 columns."""
    console = rich_console(stream)
    console.print(help_text(parser, min(console.width, _WIDEST)), end="")


def _entries(parser: Any) -> Iterator[Entry]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield Entry(name, name, command.description)
        elif "--print_config" in action.option_strings:
            yield Entry("print_config", "--print_config", "Print all settings as YAML, and end.")
        elif action.dest != "help" and action.help != argparse.SUPPRESS:
            yield _entry(action, is_required=action.dest in parser.required)


def _entry(action: argparse.Action, is_required: bool) -> Entry:
    about = " ".join((action.help or "").split())
    if not action.option_strings:
        return Entry(action.dest, action.dest.upper(), about)
    flag = next(name for name in action.option_strings if name.startswith("--"))
    if action.nargs == 0:
        return Entry(action.dest, flag, about)
    if action.dest == "config":
        return Entry(action.dest, f"{flag} FILE", about)
    note = "required" if is_required else f"default: {_shown(action.default)}"
    return Entry(action.dest, f"{flag} {_kind(action)}", about, note)


def _kind(action: argparse.Action) -> str:
    """What follows a flag: N and X for numbers, PATH, TEXT."""
    types = re.findall(r"\w+", str(getattr(action, "_typehint", action.type)).replace("class", ""))
    known = [_KINDS[name] for name in types if name in _KINDS]
    if known and "str" not in types:
        return known[0]
    return "PATH" if re.search(r"(_dir|_path|^songs)$", action.dest) else "TEXT"


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return '""' if default == "" else str(default)


def _add_section(text: Text, title: str, entries: list[Entry], width: int, column: int) -> None:
    if not entries:
        return
    text.append(f"\n{title}\n", "bold")
    for entry in entries:
        note = entry.note.replace(" ", _UNBROKEN)
        about = f"{entry.about} [{note}]" if note else entry.about
        told = _wrapped(about, width, column)
        text.append(" " * _INDENT).append(entry.shown, "cyan")
        room = column - _INDENT - len(entry.shown)
        text.append(told[column - room :] if room >= 2 else f"\n{told}")


def _wrapped(text: str, width: int, indent: int) -> str:
    """The text in lines of `width` columns, `indent` of them empty."""
    import textwrap

    room = max(width, indent + 20)
    space = " " * indent
    lines = textwrap.wrap(
        text,
        room,
        initial_indent=space,
        subsequent_indent=space,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines).replace(_UNBROKEN, " ") + "\n"
