"""Paths as people write them: `~` for a home folder."""

from __future__ import annotations

import os
import re

from acestep_ray.errors import InputError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


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
