"""Where the sound of a file is: stretches of its bytes that a decoder reads one after another, and what is lost.

A decoder believes the length in a file's header, and guesses one where there is none. A layout says what is there. Each
stretch is presented to the decoder as a separate file with a corrected header, so that one decoder reads them all.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

ReadAt = Callable[[int, int], bytes]
"""Bytes of a file: (position, length) → at most `length` bytes."""

Piece = bytes | tuple[int, int]
"""Bytes of a view: given, or a range (start, end) of the file."""


@dataclass(frozen=True)
class Span:
    """A stretch of audio that the decoder reads as a separate file."""

    frames: int
    sample_rate: int
    channels: int
    pieces: tuple[Piece, ...] = ()
    """Bytes of that file; none for sound that is lost, which silence of the same length replaces."""
    silences: tuple[tuple[int, int], ...] = ()
    """Where silence replaces what is lost within that file: first frame and number of frames of each."""


@dataclass(frozen=True)
class Layout:
    """The sound of a file from its start to its end."""

    spans: list[Span]
    missing_seconds: float = 0.0
    """Promised by the header, beyond the end of a file that was cut off."""
    warnings: list[str] = field(default_factory=list)
    """Where header and content disagree."""


class Decoded(NamedTuple):
    """What a decoder makes of a window."""

    samples: np.ndarray
    """float32 (channels, n), contiguous."""
    lost: int = 0
    """Frames of the window that cannot be decoded."""
    missing: int = 0
    """Those of them that were to follow the last sample; silence replaces the others."""
    lost_at: int = 0
    """The first of them, counted from the start of the file."""
    failure: str = ""
    """What the decoder said of it, in brackets; or ""."""


class ByteReader:
    """Reads a file from its start on, with a look at any place near."""

    BLOCK = 1 << 20

    def __init__(self, read_at: ReadAt, end: int):
        self._read_at, self.end = read_at, end
        self.base, self.buffer = 0, b""

    def load(self, position: int, length: int) -> int:
        """Have `length` bytes from `position` in `buffer`, or those up to the end; returns their place there."""
        have = self.base + len(self.buffer)
        if not self.base <= position <= have or (position + length > have and have < self.end):
            self.base = position
            wanted = min(max(length, self.BLOCK), max(0, self.end - position))
            self.buffer = self._read_at(position, wanted) if wanted > 0 else b""
        return position - self.base

    def bytes_at(self, position: int, length: int) -> bytes:
        place = self.load(position, length)
        return self.buffer[place : place + min(length, max(0, self.end - position))]

    def find(self, needle: bytes, position: int) -> int:
        """The next place of `needle` from `position` on; -1 if there is none."""
        while position + len(needle) <= self.end:
            place = self.load(position, len(needle))
            found = self.buffer.find(needle, place)
            if found >= 0:
                return self.base + found if self.base + found + len(needle) <= self.end else -1
            following = self.base + len(self.buffer) - len(needle) + 1
            if following <= position:
                return -1
            position = following
        return -1


class View:
    """A file made of pieces, for decoders written in C: it raises nothing, and keeps the first failure."""

    def __init__(self, read_at: ReadAt, pieces: Sequence[Piece], on_failure: Callable[[Exception], None]):
        self._read_at, self._pieces, self._on_failure = read_at, pieces, on_failure
        self._starts: list[int] = []
        self.size = 0
        for piece in pieces:
            self._starts.append(self.size)
            self.size += len(piece) if isinstance(piece, bytes) else max(0, piece[1] - piece[0])
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        wanted = max(0, self.size - self._position)
        wanted = wanted if size < 0 else min(size, wanted)
        parts: list[bytes] = []
        try:
            while wanted > 0:
                part = self._part(wanted)
                if not part:
                    break
                parts.append(part)
                wanted -= len(part)
                self._position += len(part)
        except Exception as error:  # whatever the client of the storage raises; C would lose it
            self._on_failure(error)
        return b"".join(parts)

    def _part(self, wanted: int) -> bytes:
        from bisect import bisect_right

        number = bisect_right(self._starts, self._position) - 1
        piece, offset = self._pieces[number], self._position - self._starts[number]
        if isinstance(piece, bytes):
            return piece[offset : offset + wanted]
        start = piece[0] + offset
        return self._read_at(start, min(wanted, piece[1] - start))

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        # Damaged headers point before the start of the file: such a seek stays where it is.
        if 0 <= base + offset <= 1 << 62:
            self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        pass


def tag_length(reader: ByteReader, position: int) -> int:
    """Bytes of a tag that MP3 and other files have before, behind or between their sound; 0 where there is none."""
    head = reader.bytes_at(position, 32)
    if head[:3] == b"ID3" and len(head) >= 10 and max(head[6:10]) < 0x80 and head[3] < 0xFF:
        length = 10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        return length + (10 if head[5] & 0x10 else 0)
    if head[:3] == b"TAG":
        if head[:4] == b"TAG+" and reader.bytes_at(position + 227, 3) == b"TAG":
            return 227
        return 128
    if head[:8] == b"APETAGEX" and len(head) == 32:
        is_header = head[23] & 0x20
        return 32 + (int.from_bytes(head[12:16], "little") if is_header else 0)
    if head[:11] == b"LYRICSBEGIN":
        for mark in (b"LYRICS200", b"LYRICSEND"):
            found = reader.find(mark, position)
            if 0 <= found - position < 1 << 20:
                return found + 9 - position
    return 0


def seconds_text(seconds: float) -> str:
    return f"{seconds:.1f} s"
