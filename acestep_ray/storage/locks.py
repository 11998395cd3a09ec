"""Locks on this machine, which the system releases when their process ends, however that happens."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder; False where another process holds it, None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # folders on NFS, some network file systems
        return None
    return True


def is_at(descriptor: int, path: str | os.PathLike[str]) -> bool:
    """Whether an open file or folder is still the one at this path."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


class LockFile:
    """A file that one process holds at a time; it is deleted when the lock is released.

    A killed process leaves the file, unlocked: the next one takes it over.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock; False where another process has it. Raises OSError where the file cannot be opened."""
        while True:
            descriptor = self._open()
            if try_lock(descriptor) is False:
                os.close(descriptor)
                return False
            # Its last holder may have deleted it after we opened it.
            if is_at(descriptor, self.path):
                break
            os.close(descriptor)
        with contextlib.suppress(OSError):  # only for the message of a process that is refused
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Delete the file and let the lock go."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        os.close(self._descriptor)
        self._descriptor = None

    def holder(self) -> str:
        """`process 123`, of the process that holds the lock."""
        try:
            with open(self.path, "rb") as file:
                number = file.read(20).decode("ascii", errors="replace")
        except OSError:
            number = ""
        return f"process {number}" if number.isdigit() else "another process"

    def _open(self) -> int:
        flags = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(self.path, flags | os.O_RDWR, 0o666)
        except PermissionError:  # another user's, who was killed
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
