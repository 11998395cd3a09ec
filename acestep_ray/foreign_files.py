"""What a file is that is not what its name says: a Git LFS pointer, a web page, an archive, nothing at all.

For messages about files that could not be read: each of these has a remedy other than that of a damaged file.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from acestep_ray.plain_files import open_regular

FIRST_BYTES = 512
"""As many as `seems_to_be` looks at."""

_LFS = b"version https://git-lfs"
_PAGE = re.compile(rb"\s*(<!doctype\s+html|<html|<\?xml|<head|<body|<script)", re.IGNORECASE)
_ARCHIVES = (
    (b"\x1f\x8b", "gzip"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip"),
    (b"Rar!", "RAR"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
)
# JSON, an error of a server, under the name of a binary file; not of a file that is JSON.
_SERVER_ERROR = re.compile(rb'\s*\{\s*"(error|message|detail|code|status)"')


class Impostor(NamedTuple):
    """What a file seems to be instead of what was expected."""

    what: str
    """Continues "it is …"."""
    fix: str


def seems_to_be(path: str | Path) -> Impostor | None:
    """What the file at `path` seems to be, where that is none of the project's kinds of files; None where it may be."""
    try:
        with open_regular(path) as file:
            start = file.read(FIRST_BYTES)
    except OSError:
        return None
    return start_of_impostor(start, path)


def start_of_impostor(start: bytes, path: str | Path) -> Impostor | None:
    """As `seems_to_be`, of the first bytes of a file."""
    path = Path(path)
    if not start:
        return Impostor("an empty file", "copy or download it again")
    text = start.removeprefix(b"\xef\xbb\xbf")
    if text.startswith(_LFS):
        size = re.search(rb"^size (\d+)", text, re.MULTILINE)
        told = f" of {int(size[1]):,} bytes" if size else ""
        return Impostor(
            f"a Git LFS pointer to a file{told}, not the file",
            f"fetch the file: `git lfs install && git lfs pull` in {shlex.quote(str(path.parent))}, or download it",
        )
    if _PAGE.match(text):
        return Impostor(
            "a web page, not the file: a server answered with a page to log in, or with an error",
            "download it again by the link to the file itself (on the Hugging Face Hub /resolve/ in place of /blob/), "
            "logged in where that is needed",
        )
    if path.suffix != ".json" and _SERVER_ERROR.match(text):
        return Impostor("a server's error message, not the file", "read it, and download the file again")
    for magic, kind in _ARCHIVES:
        if start.startswith(magic):
            return Impostor(f"a {kind} archive", "unpack it, and give the file inside")
    if not start.strip(b"\0"):
        return Impostor(
            "nothing but zeros: a download or a copy that reserved its space and stopped",
            "copy or download it again",
        )
    return None


def explained(path: str | Path, reason: object, fix: str) -> tuple[str, str]:
    """The reason why `path` cannot be read and what to do: of an impostor its own, else those that are given."""
    found = seems_to_be(path)
    return (f"it is {found.what}", found.fix) if found is not None else (str(reason), fix)
