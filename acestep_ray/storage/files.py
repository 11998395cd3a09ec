"""Files on this machine written whole, and objects read in blocks."""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
import stat
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from acestep_ray.storage.disk import full_disk_explained
from acestep_ray.storage.locks import is_at, try_lock

BLOCK_BYTES = 4 * 2**20
BLOCKS_KEPT = 8

UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.tmp")
"""Names of files that are being written."""
LOCK = ".lock"
"""The file in a folder that is locked, or leased, by the process that writes to the folder."""


@dataclass(frozen=True, slots=True)
class FileStatus:
    """What is known of a file without reading it."""

    size: int
    """Bytes."""
    version: str
    """Changes when the content changes: times of a local file, the entity tag of an object."""


def status_of_local(status: os.stat_result) -> FileStatus | None:
    """None for what is no file."""
    if not stat.S_ISREG(status.st_mode):
        return None
    return FileStatus(status.st_size, f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}")


def status_of(info: dict[str, Any]) -> FileStatus | None:
    """Status from what a client tells of a file; None for a directory."""
    if info["type"] != "file":
        return None
    names = ("ETag", "etag", "blob_id", "xet_hash", "generation", "created", "mtime", "LastModified")
    tag = next((info[name] for name in names if info.get(name)), "")
    if isinstance(tag, datetime):  # listings have it as a number
        tag = tag.timestamp()
    return FileStatus(info["size"], f"{info['size']}-{tag}".replace('"', ""))


def walk(root: Path, folder: str, suffix: str) -> Iterator[tuple[str, FileStatus]]:
    """The files in or below a folder of `root`, by name relative to it, but those that are being written."""
    for directory, _, files in os.walk(root / folder):
        for file in files:
            if not file.endswith(suffix) or UNFINISHED.fullmatch(file):
                continue
            path = os.path.join(directory, file)
            with contextlib.suppress(FileNotFoundError):  # another process has deleted or renamed it
                status = status_of_local(os.stat(path))
                if status is not None:
                    yield os.path.relpath(path, root), status


def delete_local(root: Path, names: list[str]) -> None:
    """Delete files below `root`, and folders that are then empty; what is not there is no error."""
    for name in names:
        (root / name).unlink(missing_ok=True)
    for folder in sorted({posixpath.dirname(name) for name in names}, key=len, reverse=True):
        while folder:
            try:
                os.rmdir(root / folder)
            except OSError:
                break
            folder = posixpath.dirname(folder)


def unfinished_below(root: Path) -> list[Path]:
    """What writers have left that were killed in the middle."""
    return [
        Path(directory, name)
        for directory, _, names in os.walk(root)
        for name in names
        if UNFINISHED.fullmatch(name)
    ]


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which is at `path` once the block has ended well; else what was there stays."""
    with full_disk_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _delete_abandoned_once(str(path.parent))
        file = _open_unfinished(path.parent)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                # Before it is closed, which lets the lock go.
                os.replace(file.name, path)
            flush_folder(path.parent)
        finally:
            Path(file.name).unlink(missing_ok=True)


def _open_unfinished(folder: Path) -> BinaryIO:
    """A new file that is locked, so that no other process takes it for one that was left."""
    while True:
        unfinished = folder / f".{uuid.uuid4().hex}.tmp"
        file = open(unfinished, "xb")  # noqa: SIM115  # the caller closes it
        if try_lock(file.fileno()) is not False and is_at(file.fileno(), unfinished):
            return file
        file.close()


@lru_cache(maxsize=4096)
def _delete_abandoned_once(folder: str) -> None:
    """Delete what killed writers have left in a folder, the first time that this process writes to it."""
    with contextlib.suppress(OSError):
        names = [entry.name for entry in os.scandir(folder) if UNFINISHED.fullmatch(entry.name)]
        for name in names:
            delete_if_abandoned(Path(folder, name))


def delete_if_abandoned(unfinished: Path) -> bool:
    """Delete a file that was being written, unless its writer lives; returns whether it was deleted."""
    try:
        with open(unfinished, "rb") as file:
            if try_lock(file.fileno()) is False:
                return False
            unfinished.unlink()
    except OSError:  # its writer has renamed it, or it is another user's
        return False
    return True


def flush_below(folder: Path) -> None:
    """Make the files in a folder and below, and their names, survive a loss of power."""
    for directory, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # links to nothing, files that may not be read
                descriptor = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_NONBLOCK)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        flush_folder(Path(directory))


def flush_folder(folder: Path) -> None:
    """Make the names in a local folder survive a loss of power, where its system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders, some network file systems flush none
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class ObjectReader(io.RawIOBase):
    """An object as a file: fetched in blocks, of which the last few are kept."""

    def __init__(self, read_range: Callable[[int, int], bytes], size: int):
        """`read_range(start, length)` gives bytes of the object."""
        self._read_range = read_range
        self._size = size
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"position {start + offset} is before the start of the file")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._position >= self._size:
            return 0
        index, offset = divmod(self._position, BLOCK_BYTES)
        part = self._block(index)[offset : offset + len(view)]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def readall(self) -> bytes:
        content = self._read_range(self._position, max(0, self._size - self._position))
        self._position += len(content)
        return content

    def _block(self, index: int) -> bytes:
        if index not in self._blocks:
            if len(self._blocks) == BLOCKS_KEPT:
                self._blocks.popitem(last=False)
            self._blocks[index] = self._read_range(index * BLOCK_BYTES, BLOCK_BYTES)
        self._blocks.move_to_end(index)
        return self._blocks[index]
