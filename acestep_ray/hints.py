"""What a mistyped flag, setting, command or value was meant to be.

A hint names only what the command at hand takes. Where the name belongs to another command, the hint says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

_LISTED = 3
# Last words of names that say what kind of place it is: `--output_path` of one command is `--output_dir` of another.
_PLACES = ("path", "dir", "file", "folder", "uri", "url")
# For a name that another command has, only a nearly equal one of this command is meant instead.
_NEARLY_EQUAL = 0.85

Commands = Mapping[str, Sequence[str]]
"""Names of the flags of every command, such as `export merge`."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that a mistyped one is most like; never that name itself."""
    others = [one for one in known if one != name]
    word, _, kind = name.rpartition("_")
    for one in others:
        other_word, _, other_kind = one.rpartition("_")
        if word and word == other_word and {kind, other_kind} <= set(_PLACES):
            return one
    return next(iter(difflib.get_close_matches(name, others, n=1, cutoff=cutoff)), None)


def setting_hints(
    name: str, command: str, commands: Commands, *, instead: Mapping[str, str] | None = None, flag: str = "--"
) -> list[str]:
    """What to do about a setting that `command` does not have: a line each.

    `instead` says what the command has in place of settings of other commands; `flag` precedes a name as it is typed.
    """
    elsewhere = [other for other, names in commands.items() if name in names and other != command]
    hints = []
    if elsewhere:
        hints.append(
            f"`{flag}{name}` is a {'flag' if flag else 'setting'} of {_listed(elsewhere)}, not of `{command}`"
        )
    if instead and name in instead:
        return [*hints, f"`{command}` has {instead[name]}"]
    near = nearest(name, commands.get(command, ()), _NEARLY_EQUAL if elsewhere else 0.6)
    return [f"did you mean {near}?", *hints] if near else hints


def command_hints(word: str, group: str, commands: Commands) -> list[str]:
    """What to do about a command, or an action of the command `group`, that does not exist: a line each."""
    paths = [path.split() for path in commands]
    depth = len(group.split())
    here = dict.fromkeys(path[depth] for path in paths if len(path) > depth and path[:depth] == group.split())
    hints = []
    if near := nearest(word, here):
        hints.append(f"did you mean {near}?")
    elsewhere = [" ".join(path) for path in paths if path[-1] == word and word not in here]
    hints += [f"there is `acestep-ray {path}`" for path in elsewhere]
    return hints or [f"there {'are' if len(here) > 1 else 'is'} {', '.join(here)}"]


def one_of(
    value: object, choices: Iterable[str], *, elsewhere: Iterable[str] = (), separator: str = ", "
) -> str:
    """The choices that a setting has, after the one that a mistyped value is most like.

    A value that is a choice `elsewhere` is not mistyped.
    """
    choices = list(choices)
    text = str(value).strip().lower().replace("_", "-")
    same = [one for one in choices if one.lower().replace("_", "-") == text]
    begun = [one for one in choices if len(text) > 1 and (one.startswith(text) or text.startswith(one))]
    near = next(iter(same + begun), None) or nearest(text, choices)
    if value in set(elsewhere):
        near = None
    listed = separator.join(choices)
    return f"did you mean {near}? It is one of {listed}" if near else f"one of {listed}"


def _listed(commands: Sequence[str]) -> str:
    names = [f"`{name}`" for name in commands]
    if len(commands) > _LISTED + 1:
        names = names[:_LISTED]
        names.append(f"{len(commands) - _LISTED} more commands")
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
