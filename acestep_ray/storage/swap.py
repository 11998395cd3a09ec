"""A folder put in the place of another one in one step."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

from acestep_ray.storage.files import flush_below, flush_folder

# Of Linux: AT_FDCWD and RENAME_EXCHANGE.
_CURRENT_FOLDER, _EXCHANGE = -100, 2


def put_in_place(new: Path, place: Path) -> None:
    """Rename a folder to `place`; what was there is deleted once the new one is there.

    Where the system can exchange two names there is no moment at which nothing is at `place`. Elsewhere what was there
    is `.NAME.previous` for that moment, which `restore_previous` puts back.
    """
    flush_below(new)
    previous = place.with_name(f".{place.name}.previous")
    if not os.path.lexists(place):
        new.rename(place)
    elif _exchange(new, place):
        flush_folder(place.parent)
        shutil.rmtree(new)
    else:
        _delete(previous)
        place.rename(previous)
        new.rename(place)
    flush_folder(place.parent)
    _delete(previous)


def restore_previous(place: Path) -> None:
    """Undo the first of two renames, if a failure came between them, now or in an earlier process."""
    previous = place.with_name(f".{place.name}.previous")
    if os.path.lexists(previous) and not os.path.lexists(place):
        previous.rename(place)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    names = (_CURRENT_FOLDER, os.fsencode(first), _CURRENT_FOLDER, os.fsencode(second))
    return bool(renameat2(*names, _EXCHANGE) == 0)


def _delete(folder: Path) -> None:
    if os.path.lexists(folder):
        shutil.rmtree(folder)
