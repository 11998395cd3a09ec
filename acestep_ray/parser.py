"""The parser of a command: no shortened flags, help in groups, and messages that say what was meant."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, TextIO

from jsonargparse import ArgumentParser, Namespace

from acestep_ray.config.groups import Groups
from acestep_ray.errors import EXIT_INPUT
from acestep_ray.hints import Commands, command_hints, setting_hints
from acestep_ray.paths import expand_home
from acestep_ray.plain_files import SETTINGS, read_limited
from acestep_ray.plain_text import decode_text
from acestep_ray.terminal import show_error
from acestep_ray.terminal.help import help_text, show_help

GROUPS = ("command", "action", "export", "checkpoint", "cache")
"""Arguments that are a command with actions, or one of these."""


class Parser(ArgumentParser):
    """A parser that takes no shortened flags, and that names the flag which a mistyped one is nearest to.

    Its help has the flags or commands in `sections`, by title, and those that are in none under "arguments".
    """

    def __init__(
        self,
        command: str = "",
        *,
        sections: Groups | None = None,
        required: Sequence[str] = (),
        instead: Mapping[str, str] | None = None,
        **options: Any,
    ):
        """`command` is what is typed after the program's name; `required` flags are named so in its help. `instead`
        says what it has in place of flags of other commands.
        """
        self.sections: Groups = sections or {}
        self.instead = instead or {}
        self.root = self
        """The parser of the whole command, once `adopt` has been called on it."""
        self.required = frozenset(required)
        self.command = f"acestep-ray {command}".rstrip()
        super().__init__(prog=self.command, allow_abbrev=False, **options)

    def parse_path(self, path: Any, *arguments: Any, **options: Any) -> Namespace:
        """Settings of a file in any encoding that its byte order mark names; the base class takes the locale's."""
        return self.parse_string(read_settings(os.fspath(path)), os.fspath(path), *arguments, **options)

    def format_help(self, *_: Any) -> str:
        return help_text(self).plain

    def print_help(self, file: TextIO | None = None) -> None:  # type: ignore[override]  # asks whether it is a terminal
        show_help(self, file if file is not None else sys.stdout)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser: Parser = getattr(ex, "subcommand_parser", None) or self
        if required := re.search(r"arguments are required: ([a-z.]+)\.\w+", message):
            words = required[1].replace(".", " ")
            parser = next((one for one in self.root.leaves() if one.words == words), parser)
        hints = _hints(message, parser)
        lines = [_as_typed(message, parser), *hints, f"{parser.command} --help tells what it takes"]
        show_error("error", "\n  → ".join(lines))
        sys.exit(EXIT_INPUT)

    @property
    def words(self) -> str:
        """What is typed after the program's name."""
        return self.command.partition(" ")[2]

    def flags(self) -> list[str]:
        """The names of its flags."""
        names = (name for action in self._actions for name in action.option_strings)
        return [name.removeprefix("--") for name in names if name.startswith("--")]

    def leaves(self) -> Iterator[Parser]:
        """The parsers of all commands without actions, and of all actions, below this one."""
        groups = [action for action in self._actions if _is_group(action)]
        if not groups:
            yield self
        for group in groups:
            for command in group.choices.values():  # type: ignore[union-attr]  # a mapping, of a group
                yield from command.leaves()

    def adopt(self) -> None:
        """Let every parser below know this one, whose other commands its messages name."""
        for action in self._actions:
            for command in action.choices.values() if _is_group(action) else ():  # type: ignore[union-attr]
                command.root = self.root
                command.adopt()

    def commands(self) -> Commands:
        """The names of the flags of every command."""
        return {parser.words: parser.flags() for parser in self.root.leaves()}

    def positionals(self) -> list[str]:
        """The names of its arguments without a flag."""
        return [
            action.dest for action in self._actions if not action.option_strings and not _is_group(action)
        ]


def read_settings(path: str) -> str:
    """The text of a settings file, a path or a URL. Raises OSError, and ValueError for what is no text."""
    if "://" not in path:
        return decode_text(read_limited(expand_home(path), SETTINGS))
    from acestep_ray.storage import StoredFile

    return decode_text(StoredFile.at(path).read_bytes(SETTINGS))


def _is_group(action: argparse.Action) -> bool:
    return isinstance(action, argparse._SubParsersAction)


def _hints(message: str, parser: Parser) -> list[str]:
    """What to do about a message of the parser: a line each."""
    words, commands, instead = parser.words, parser.commands(), parser.instead
    if match := re.search(r"argument (?:command|action): invalid choice: '(.*?)'", message):
        return command_hints(match[1], words, commands)
    if match := re.search(r"does not accept option '(\w+)'", message):
        return setting_hints(match[1], words, commands, instead=instead, flag="")
    if "unrecognized arguments: " not in message:
        return []
    given = message.partition("unrecognized arguments: ")[2].split("\n")[0].split()
    flags = [re.sub(r"=.*", "", one).lstrip("-") for one in given if re.match(r"--?[A-Za-z_]", one)]
    if not flags:
        return [
            f"put quotes around a text with spaces, and a flag before a value: {given[0]!r} belongs to none"
        ]
    hints = []
    for name in flags:
        if name in parser.positionals():
            hints.append(f"it is given without a flag: acestep-ray {words} {name.upper()}")
        elif f"-{name}" in given and name in commands.get(words, ()):
            hints.append(f"flags begin with two hyphens: --{name}")
        else:
            hints += setting_hints(name, words, commands, instead=instead)
    return list(dict.fromkeys(hints))


_ONE_OF_SEVERAL_TYPES = re.compile(
    r"Does not validate against any of the Union subtypes\s+Subtypes: \[(.*?)\]\n.*Given value: ", re.DOTALL
)


def _not_of_these_types(told: re.Match[str]) -> str:
    types = re.sub(r"<class '(\w+)'>", r"\1", told[1]).split(", ")
    return f"has to be of type {' or '.join(name for name in types if name != 'NoneType')}, and is "


def _as_typed(message: str, parser: Parser) -> str:
    """A message of the parser in the words of who types."""
    message = re.sub(
        r"Subcommand '([\w.]+)' does not accept option '(\w+)'", r"`\1` has no setting '\2'", message
    )
    message = re.sub(r'Parser key "([\w.]+)":\s*', r"--\1: ", message)
    message = re.sub(r"Expected an? <class '(\w+)'>\. Got value: ", r"has to be of type \1, and is ", message)
    message = _ONE_OF_SEVERAL_TYPES.sub(_not_of_these_types, message)
    message = re.sub(r'expected "[\w.]*?(command|action)" to be one of .*', r"no \1 is given", message)
    message = re.sub(r"argument (command|action): invalid choice: ('.*?') .*", r"there is no \1 \2", message)
    if message.startswith("the following arguments are required: "):
        start, _, names = message.partition(": ")
        given = (name.strip().rpartition(".")[2] for name in names.split(","))
        positionals = parser.positionals()
        flags = (
            name.upper() if name in positionals else name if name in GROUPS else f"--{name}" for name in given
        )
        return f"{start}: {', '.join(flags)}"
    return message
