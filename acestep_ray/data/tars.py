"""Files in a tar that a stranger made: read forwards, no more than the tar holds, in bounded memory.

`tarfile` believes a header: it reads a name of gigabytes into memory, follows offsets backwards for ever, and keeps
every member. The reader below it counts what it asks for.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, BinaryIO

NO_TAR = (zlib.error, lzma.LZMAError, ValueError, MemoryError, RecursionError)
"""What `tarfile` and the decompressors raise for damaged files, beside TarError, EOFError and OSError."""

_MOST_MEMBERS = 2_000_000
# Of one header: names of files have up to 4096 bytes, and extended headers some more.
_LARGEST_READ = 4 << 20
_MOST_READS_OF_A_HEADER = 2000
# Songs and texts shrink to a tenth; what shrinks to a thousandth was made for that.
_LARGEST_RATIO = 100
_SMALL_BYTES = 1 << 30
_SKIPPED_BYTES = 1 << 20
_MAGIC_BYTES = 6


class TarBombError(Exception):
    """A tar that would take far more memory, time or room than it has bytes."""


def files_of_tar(file: BinaryIO) -> Iterator[tuple[str, IO[bytes]]]:
    """Names and contents of the regular files in a tar, also a compressed one; a content is read before the next.

    Names are below the tar's root. Links, devices, hidden files and files with holes are left out.

    Raises TarBombError, and TarError, EOFError, OSError or one of `NO_TAR` for a tar that is damaged.
    """
    reader = _Forwards(file)
    source: Any = reader  # `tarfile` asks for no more methods
    with tarfile.open(fileobj=source, mode="r:") as tar:
        for count, member in enumerate(tar, start=1):
            if count > _MOST_MEMBERS:
                raise TarBombError(f"holds more than {_MOST_MEMBERS:,} files; give it in several parts")
            members: Any = tar
            members.members = []  # kilobytes each
            reader.start_member()
            name = posixpath.normpath(member.name.lstrip("/"))
            is_hidden = posixpath.basename(name).startswith(".")
            if member.isfile() and not member.issparse() and not name.startswith("..") and not is_hidden:
                content = tar.extractfile(member)
                if content is not None:
                    reader.reads_header = False
                    yield name, content
            reader.start_member()


class _Forwards:
    """The unpacked bytes of a tar, as `tarfile` reads them, with bounds."""

    def __init__(self, file: BinaryIO):
        start = file.read(_MAGIC_BYTES)
        self._size = file.seek(0, os.SEEK_END)
        file.seek(0)
        self._file: Any = _decompressed(file, start)
        self._is_packed = self._file is not file
        self._place = 0
        self._reads = 0
        self.reads_header = True

    def start_member(self) -> None:
        """Expect the header of the next file."""
        self._reads = 0
        self.reads_header = True

    def read(self, size: int) -> bytes:
        if self.reads_header:
            self._reads += 1
            if size > _LARGEST_READ or self._reads > _MOST_READS_OF_A_HEADER:
                raise TarBombError("has a header that is larger than any name of a file")
        content = self._file.read(size)
        self._place += len(content)
        if self._is_packed and self._place > max(_SMALL_BYTES, _LARGEST_RATIO * self._size):
            raise TarBombError(
                f"unpacks to more than {_LARGEST_RATIO} times its size; unpack it yourself where you trust it"
            )
        return content

    def tell(self) -> int:
        return self._place

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        """Go forwards. Raises ReadError for a place that is behind, where `tarfile` would read again for ever."""
        if whence != io.SEEK_SET or place < self._place:
            raise tarfile.ReadError("its headers lead backwards")
        if not self._is_packed:
            self._place = self._file.seek(place)
            return self._place
        while self._place < place:
            reads, self.reads_header = self.reads_header, False
            some = self.read(min(_SKIPPED_BYTES, place - self._place))
            self.reads_header = reads
            if not some:
                raise tarfile.ReadError("unexpected end of data")
        return self._place


def _decompressed(file: BinaryIO, start: bytes) -> Any:
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if start.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if start.startswith(b"\xfd7zXZ"):
        return lzma.LZMAFile(file)
    return file
