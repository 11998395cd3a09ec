"""A disk that takes no more, as one message: what, where, and how much is free."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from acestep_ray.errors import AceStepError, InputError
from acestep_ray.units import size_text

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Libraries in Rust and C++ have errors of their own, which hold the system's text or number.
_TEXTS = {
    errno.ENOSPC: re.compile(r"No space left on device|os error 28\b|\[Errno 28\]"),
    errno.EDQUOT: re.compile(r"Disk quota exceeded|os error 122\b|\[Errno 122\]"),
    errno.EFBIG: re.compile(r"File too large|os error 27\b|\[Errno 27\]"),
}


class DiskFullError(AceStepError, OSError):
    """The disk, the quota or the limit for a file's size takes no more. Nothing half-written was put in place."""

    def __init__(self, message: str, number: int, place: str):
        OSError.__init__(self, number, os.strerror(number), place)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return DiskFullError, (self.message, self.errno, self.filename)


def disk_is_full(number: int, place: str) -> DiskFullError:
    """The error for the system's `number`, at a path; at the empty one, where that is not known."""
    free = free_bytes(place) if place and number != errno.EFBIG else None
    where = f": {place}" if place else ""
    facts = "" if free is None else f" ({size_text(free)} are free)"
    return DiskFullError(
        f"no room on the disk ({os.strerror(number)}){where}{facts}\n"
        "  → make room there and run the same command again",
        number,
        place,
    )


def free_bytes(place: str | os.PathLike[str]) -> int | None:
    """What is free on the disk of a path, or of the nearest folder above it that exists; None where that is unknown."""
    path = Path(os.path.abspath(place))
    for folder in (path, *path.parents):
        try:
            return shutil.disk_usage(folder).free
        except FileNotFoundError:
            continue
        except OSError:
            break
    return None


def full_disk_of(error: BaseException) -> int | None:
    """The number of the system's error, where an error or one of its causes is that of a full disk; else None."""
    seen: BaseException | None = error
    while seen is not None:
        number = getattr(seen, "errno", None)
        if number in NO_ROOM:
            return int(number)
        for number, text in _TEXTS.items():
            if text.search(str(seen)):
                return number
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


@contextlib.contextmanager
def full_disk_explained(place: str | os.PathLike[str]) -> Iterator[None]:
    """Raise DiskFullError that names `place` for an error of the block that a full disk has caused."""
    try:
        yield
    except (DiskFullError, InputError):
        raise
    except Exception as error:
        number = full_disk_of(error)
        if number is None:
            raise
        raise disk_is_full(number, os.fspath(place)) from error


def check_room(place: str | os.PathLike[str], needed: int, where: str) -> None:
    """Raise InputError where the disk of a folder to write has less than `needed` bytes free."""
    free = free_bytes(place)
    if free is not None and needed > free:
        raise InputError(
            f"not enough space on the disk: {size_text(needed)} are to be written, {size_text(free)} are free",
            where=where,
            fix="make room, or give a directory on a larger disk",
        )
