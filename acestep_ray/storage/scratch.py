"""Temporary folders that a later process removes if their own was killed.

The folder itself is locked while its process lives. Another process deletes folders whose lock it gets.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from acestep_ray.storage.disk import full_disk_explained
from acestep_ray.storage.locks import is_at, try_lock

_NAME = re.compile(r"\.acestep-ray-(?:scratch|unpacked)-(?:[0-9a-f]{32}|[a-z0-9_]{8})")


@contextlib.contextmanager
def scratch_folder(beside: Path | None = None, kind: str = "scratch") -> Iterator[Path]:
    """A new hidden folder in `beside`, or in the folder for temporary files, while inside.

    Those that killed processes left there are deleted first. Raises OSError where it cannot be made.
    """
    parent = Path(tempfile.gettempdir()) if beside is None else beside
    parent.mkdir(parents=True, exist_ok=True)
    delete_abandoned(parent)
    folder, descriptor = _locked_folder(parent, kind)
    try:
        with full_disk_explained(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def delete_abandoned(parent: Path) -> None:
    """Delete the temporary folders in `parent` that belong to no living process."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(parent):
            if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                _delete_if_abandoned(entry)


def _delete_if_abandoned(folder: os.DirEntry[str]) -> None:
    with contextlib.suppress(OSError):  # another user's, or deleted meanwhile
        if folder.stat(follow_symlinks=False).st_uid != os.geteuid():
            return
        descriptor = os.open(folder.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # Without locks nothing says whether its process lives.
            if try_lock(descriptor):
                shutil.rmtree(folder.path, ignore_errors=True)
        finally:
            os.close(descriptor)


def _locked_folder(parent: Path, kind: str) -> tuple[Path, int]:
    while True:
        folder = parent / f".acestep-ray-{kind}-{uuid.uuid4().hex}"
        folder.mkdir(mode=0o700)
        with contextlib.suppress(FileNotFoundError):  # deleted by another process before we locked it
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if try_lock(descriptor) is not False and is_at(descriptor, folder):
                return folder, descriptor
            os.close(descriptor)
