"""Paths as people write them: `~` for a home folder, lists with commas, URIs of databases; and commands to paste."""

from __future__ import annotations

import os
import re
import shlex
from urllib.parse import quote, unquote

from acestep_ray.errors import InputError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LOCAL_URI = re.compile(r"(?i)(sqlite(?:\+\w+)?:///|file:(?://)?)(?=~)")
_FILE_URI = re.compile(r"(?i)(?:file|local)://(localhost(?=/))?")


def expand_home(path: str) -> str:
    """The path with a leading `~` or `~user` replaced by that home folder, as a shell does.

    URLs, and names such as `~x` where there is no user x, are returned unchanged; `./~x` is always a file of the
    working directory. Raises InputError for `~` where no home folder is known.
    """
    if not path.startswith("~") or _URL.match(path):
        return path
    expanded = os.path.expanduser(path)
    if expanded.partition("/")[0] == "~":
        raise InputError(
            "the home folder is not known", where=path, fix="set $HOME, or write the path without `~`"
        )
    return expanded


def expand_home_in_list(paths: str) -> str:
    """`expand_home` of every path in a list with commas."""
    parts = (re.fullmatch(r"(\s*)(.*)", part, re.DOTALL) for part in paths.split(","))
    return ",".join(part[1] + expand_home(part[2]) for part in parts if part)


def expand_home_in_uri(uri: str) -> str:
    """`~/x`, `sqlite:///~/runs.db` and `file://~/x` with the home folder; other addresses are unchanged."""
    scheme = _LOCAL_URI.match(uri)
    if scheme is None:
        return expand_home(uri)
    path, mark, query = uri[scheme.end() :].partition("?")
    return scheme[1] + escape_path(expand_home(path)) + mark + query


def split_paths(paths: str) -> list[str]:
    """The paths of a list with commas; a comma that belongs to an existing path does not separate.

    Where several readings exist, the longest existing path wins. `\\,` is always a comma of a path.
    """
    parts = [part.replace("\0", ",") for part in paths.replace("\\,", "\0").split(",")]
    found: list[str] = []
    start = 0
    while start < len(parts):
        for end in range(len(parts), start, -1):
            path = ",".join(parts[start:end])
            if not os.path.lexists(expand_home(path)):
                path = path.strip()
            if end == start + 1 or os.path.lexists(expand_home(path)):
                break
        found.append(expand_home(path))
        start = end
    return [path for path in found if path]


def escape_path(path: str) -> str:
    """A path in a URI of a database: what would begin a query or an escape is escaped, all else is unchanged."""
    return path.replace("%", "%25").replace("?", "%3F")


def file_uri(path: str) -> str:
    """`file:///my%20songs` for an absolute path."""
    return f"file://{quote(os.fsencode(path))}"


def path_of_file_uri(uri: str) -> str:
    """The path that a `file://` URI names.

    Escapes are resolved, unless only the path as written exists: people also write paths unescaped.
    """
    rest = uri[match.end() :] if (match := _FILE_URI.match(uri)) else uri
    if rest.startswith("~"):
        rest = expand_home(rest)
    written = "/" + rest.lstrip("/")
    path = os.fsdecode(unquote(written, errors="surrogateescape"))
    return written if path != written and os.path.lexists(written) and not os.path.lexists(path) else path


def shell_command(*words: object) -> str:
    """A command line to paste into a shell: each word is quoted where a shell would take it apart."""
    return shlex.join(str(word) for word in words)
