"""SHA-256 of files; those of large files that do not change are noted, so that a later process need not read them.

The notes lie in `acestep-ray/sha256` of the user's cache folder ($XDG_CACHE_HOME, else ~/.cache), one for each path.
They are only ever a shortcut: where none can be read or written, the file itself is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from functools import lru_cache
from pathlib import Path

# Smaller files are read faster than notes are worth.
NOTED_BYTES = 16 << 20
# A file that was written so lately could change again without its time being another.
SETTLED_SECONDS = 2.0


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex; a file that has not changed is read once in a process."""
    return _sha256_of(str(path.resolve()), *_version(path.stat()))


def noted_sha256(path: Path) -> str:
    """SHA-256 of a file in hex; a large file that has not changed is read once on a machine.

    It has changed if its size, a time, or its inode has.
    """
    status = path.stat()
    if status.st_size < NOTED_BYTES:
        return file_sha256(path)
    path = path.resolve()
    version = _version(status)
    note = notes_folder() / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
    sha256 = _read_note(note, version)
    if sha256 is None:
        started = time.time()
        sha256 = file_sha256(path)
        is_settled = max(status.st_mtime, status.st_ctime) < started - SETTLED_SECONDS
        if is_settled and _version(path.stat()) == version:
            _write_note(note, path, version, sha256)
    return sha256


def notes_folder() -> Path:
    """Where the notes of this user lie."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "acestep-ray" / "sha256"


def _version(status: os.stat_result) -> tuple[int, ...]:
    """What is another number for a file that was changed or replaced, also by a copy that keeps its time."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _read_note(note: Path, version: tuple[int, ...]) -> str | None:
    """The SHA-256 that was noted for this version of a file; None where there is none."""
    try:
        values = json.loads(note.read_bytes())
        return str(values["sha256"]) if values["version"] == list(version) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_note(note: Path, path: Path, version: tuple[int, ...], sha256: str) -> None:
    unfinished = note.with_suffix(f".{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):  # then the file is read again the next time
        note.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps({"path": str(path), "version": version, "sha256": sha256}))
        unfinished.replace(note)


@lru_cache(maxsize=256)
def _sha256_of(path: str, *_version: int) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(1 << 20)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()
