"""Bounded reads of files that a stranger may have made: regular files only, and never more than a limit.

A named pipe blocks whoever opens it, a device has no end, and a link may lead to either. Files are therefore opened
without blocking, and looked at after they are open, so that nothing can be exchanged in between. What is refused is an
OSError whose `strerror` completes the sentence "cannot be read (…)".
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, NamedTuple


class Limit(NamedTuple):
    """The largest size that is read of a kind of file."""

    size: int
    """Bytes."""
    kind: str
    """Plural, as a message names it."""

    def error(self, path: str) -> OSError:
        """The error of a file that is larger."""
        return OSError(errno.EFBIG, f"larger than {_size(self.size)}, the limit of {self.kind}", path)


LYRICS = Limit(1 << 20, "lyrics")
PROMPT = Limit(64 << 10, "prompts and captions")
JSON = Limit(16 << 20, "JSON files")
SETTINGS = Limit(1 << 20, "settings files")
NOTES = Limit(64 << 20, "a run's own notes")
SONG_LIST = Limit(512 << 20, "lists of songs that are read whole")
TABLE = Limit(4 << 30, "tables of songs")
LINE = Limit(4 << 20, "a table's lines")

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# What the kernel makes up: some of it has no end, some waits, some is what a process keeps to itself.
_KERNEL_FOLDERS = ("/proc/", "/sys/", "/dev/")
_MEMORY_FOLDER = "/dev/shm/"
_BLOCK_BYTES = 1 << 20


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """The file at `path` for reading; links are followed. Never waits. Raises OSError for what is no regular file."""
    name = os.fspath(path)
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # sockets cannot be opened
            raise not_regular(name, "a socket") from None
        raise
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), name) from None
    try:
        _check_regular(os.fstat(descriptor), descriptor, name)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_limited(path: str | os.PathLike[str], limit: Limit) -> bytes:
    """The content of a regular file, also of one that grows meanwhile. Raises OSError, also above the limit."""
    with open_regular(path) as file:
        return read_open(file, limit, os.fspath(path))


def read_open(file: BinaryIO, limit: Limit, name: str) -> bytes:
    """What is left of an open file. Raises OSError above the limit."""
    content = bytearray()
    while some := file.read(min(_BLOCK_BYTES, limit.size + 1 - len(content))):
        content += some
        if len(content) > limit.size:
            raise limit.error(name)
    return bytes(content)


def not_regular(path: str, kind: str) -> OSError:
    """The error of what is no regular file."""
    if kind == "a folder":
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    return OSError(errno.EINVAL, f"{kind}, not a regular file", path)


def is_of_the_kernel(path: str | Path) -> bool:
    """Whether a path leads to a file that the kernel makes up, such as `/proc/self/environ`."""
    return _is_made_up(os.path.realpath(path))


def _check_regular(status: os.stat_result, descriptor: int, name: str) -> None:
    for is_kind, kind in _KINDS:
        if is_kind(status.st_mode):
            raise not_regular(name, kind)
    if not stat.S_ISREG(status.st_mode):
        raise not_regular(name, "something of another kind")
    try:
        real = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # no /proc
        real = os.path.realpath(name)
    if _is_made_up(real):
        raise not_regular(name, "a file that the kernel makes up")


def _is_made_up(real: str) -> bool:
    return real.startswith(_KERNEL_FOLDERS) and not real.startswith(_MEMORY_FOLDER)


def _size(number: int) -> str:
    for power, unit in ((30, "GB"), (20, "MB"), (10, "KB")):
        if number >= 1 << power:
            return f"{number >> power} {unit}"
    return f"{number} bytes"
