"""Where the bytes of an audio file come from: a path, memory, or ranges of an object in storage."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import posixpath
import stat
from typing import Any, BinaryIO

from acestep_ray.data.schema import RejectReason
from acestep_ray.plain_files import is_of_the_kernel, open_regular
from acestep_ray.storage import StorageError, StoredFile, is_url

_HASH_BLOCK_BYTES = 1 << 20


class AudioError(Exception):
    """A file that is not usable audio. `reason` is what the cache stores, the text is for the user."""

    def __init__(self, reason: RejectReason, message: str):
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


class AudioSource:
    """The bytes of an audio file: a local path, an object held in memory, or one that is read by ranges.

    Raises AudioError unless it is a regular file with something in it that may be read.
    """

    def __init__(self, file: StoredFile | str | os.PathLike[str], whole_fetch_bytes: int):
        if not isinstance(file, StoredFile) and is_url(os.fspath(file)):
            file = StoredFile.at(file)
        self._place: str | StoredFile
        """A path, or an object."""
        if not isinstance(file, StoredFile):
            self._place = self.name = os.fspath(file)
        elif file.local_path is not None:
            self._place = self.name = str(file.local_path)
        else:
            self._place, self.name = file, file.url
        self.suffix = posixpath.splitext(self.name)[1].lower()
        self.content = b""
        """Of an object that is held in memory."""
        self._ranges: WatchedFile | None = None
        self._descriptor: int | None = None
        self._failure: Exception | None = None
        try:
            if isinstance(self._place, str):
                self.size = self._check_path(self._place)
            else:
                self.size = self._open_object(self._place, whole_fetch_bytes)
        except (OSError, ValueError, StorageError) as error:
            raise self._error(error) from None
        if self.size == 0:
            raise AudioError(RejectReason.EMPTY, f"the audio file is empty (0 bytes): {self.name}")

    @property
    def path(self) -> str | None:
        """Of a file on this machine."""
        return self._place if isinstance(self._place, str) else None

    def reader(self) -> str | WatchedFile:
        """What a decoder opens: the path, or a file at its start. The one before is no longer to be used."""
        if isinstance(self._place, str):
            return self._place
        if self._ranges is None:
            return WatchedFile(io.BytesIO(self.content))
        self._ranges.seek(0)
        return self._ranges

    def read_at(self, position: int, length: int) -> bytes:
        """At most `length` bytes from `position`; decoders that are reading do not notice."""
        if not 0 <= position < self.size or length <= 0:
            return b""
        if isinstance(self._place, str):
            try:
                if self._descriptor is None:
                    self._descriptor = os.open(self._place, os.O_RDONLY)
                return os.pread(self._descriptor, length, position)
            except OSError as error:
                raise self._error(error) from None
        if self._ranges is not None:
            place = self._ranges.tell()
            self._ranges.seek(position)
            found = self._ranges.read(length)
            self._ranges.seek(place)
            self.raise_failure()
            return found
        return self.content[position : position + length]

    def sha256(self) -> str:
        if self.content:
            return hashlib.sha256(self.content).hexdigest()
        digest = hashlib.sha256()
        try:
            with open_regular(self._place) if isinstance(self._place, str) else self._place.open() as file:
                while block := file.read(_HASH_BLOCK_BYTES):
                    digest.update(block)
        except (OSError, StorageError) as error:
            raise self._error(error) from None
        return digest.hexdigest()

    @property
    def is_at_hand(self) -> bool:
        """Whether a look at all bytes costs no requests to storage."""
        return self._ranges is None

    def note_failure(self, error: Exception) -> None:
        """Keep for `raise_failure` what storage said to code that a decoder called."""
        self._failure = self._failure or error

    def raise_failure(self) -> None:
        """Raise as AudioError what storage said while a decoder, which cannot pass it on, was reading."""
        if self._failure is not None:
            raise self._failure if isinstance(self._failure, AudioError) else self._error(self._failure)
        if self._ranges is not None and self._ranges.failure is not None:
            raise self._error(self._ranges.failure)

    def close(self) -> None:
        if self._ranges is not None:
            self._ranges.close()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _check_path(self, path: str) -> int:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or is_of_the_kernel(path):
            raise AudioError(RejectReason.UNSUPPORTED, f"not a regular file: {self.name}")
        with open_regular(path):
            return status.st_size

    def _open_object(self, file: StoredFile, whole_fetch_bytes: int) -> int:
        status = file.status()
        if status is None:
            raise FileNotFoundError(self.name)
        if 0 < status.size <= whole_fetch_bytes:
            self.content = file.read_bytes()
            return len(self.content)
        if status.size:
            self._ranges = WatchedFile(file.open())
        return status.size

    def _error(self, error: Exception) -> AudioError:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)) or (
            isinstance(error, OSError) and error.errno == errno.ELOOP
        ):
            return AudioError(RejectReason.MISSING, f"{self._why_missing()}: {self.name}")
        text = getattr(error, "strerror", None) or str(error)
        return AudioError(RejectReason.UNREADABLE, f"{text}: {self.name}")

    def _why_missing(self) -> str:
        target = ""
        with contextlib.suppress(OSError, ValueError):
            target = os.readlink(self._place) if isinstance(self._place, str) else ""
        if "/annex/objects/" in target:
            return "git-annex has not fetched the audio that this link leads to: run `git annex get`"
        if target:
            return f"the audio file does not exist, it is a link to {target}"
        return "the audio file does not exist"


class WatchedFile:
    """A file for decoders written in C, which ask for impossible places and lose exceptions: it keeps them."""

    def __init__(self, file: BinaryIO):
        self._file: Any = file  # `BinaryIO` has no `readinto`, though these files do
        self.failure: Exception | None = None

    def readinto(self, buffer: Any) -> int:
        try:
            return self._file.readinto(buffer)
        except Exception as error:  # whatever the client of the storage raises
            self.failure = error
            return 0

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:
            self.failure = error
            return b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        # Damaged headers point before the start of the file: such a seek stays where it is.
        with contextlib.suppress(ValueError, OSError, OverflowError):
            self._file.seek(offset, whence)
        return self._file.tell()

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
