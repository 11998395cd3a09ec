"""MPEG audio (MP3): counts the frames of a file, and finds its parts, tags and holes, without decoding."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import lru_cache

from acestep_ray.data.audio_layout import ByteReader, Piece, ReadAt, tag_length

_KBITS = {
    # (MPEG 1, layer) → kbit/s by index; a layer is 1, 2 or 3.
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = (44_100, 48_000, 32_000)
_MARKS = (b"Xing", b"Info", b"VBRI")
# Headers in a row that are no accident.
_CHAIN = 4
# Samples that every decoder of layer III is late.
_DECODER_DELAY = 529
# Of a block that is walked, the bytes at its end that the next block shows again: a frame and its header.
_OVERLAP = 8192


@dataclass(frozen=True)
class Kind:
    """What all frames of a stream have in common."""

    mpeg1: bool
    layer: int
    sample_rate: int
    mono: bool

    @property
    def samples(self) -> int:
        """Of a frame."""
        if self.layer == 1:
            return 384
        return 1152 if self.layer == 2 or self.mpeg1 else 576

    @property
    def mark_offset(self) -> int:
        """Of the Xing mark in a frame without a checksum: behind its header and side information."""
        if self.mpeg1:
            return 4 + (17 if self.mono else 32)
        return 4 + (9 if self.mono else 17)


@dataclass
class Run:
    """Frames one behind another."""

    kind: Kind
    start: int
    end: int
    frames: int
    header: LengthHeader | None = None
    """Of the first frame, which is not among `frames`."""
    junk_before: int = 0
    """Bytes between the run before and this one that are no tag."""
    sizes: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class LengthHeader:
    """A Xing, Info or VBRI frame: no sound, but the number of the frames behind it."""

    content: bytes
    frames: int | None
    num_bytes: int | None
    count_at: int
    """Place of the number of frames in the content; 0 where it has none."""
    has_delay: bool
    """Whether the encoder's delay and padding are there, which a decoder cuts off."""
    delay_at: int
    is_vbri: bool = False


def parse_kind(header: bytes) -> tuple[Kind, int] | None:
    """Kind and length in bytes of the frame with these first four bytes; None for what is no frame."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = (header[1] >> 3) & 3, 4 - ((header[1] >> 1) & 3)
    rate, bitrate = (header[2] >> 2) & 3, header[2] >> 4
    if version == 1 or layer == 4 or rate == 3 or bitrate in (0, 15):
        return None
    sample_rate = _RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    kind = Kind(version == 3, layer, sample_rate, header[3] >> 6 == 3)
    kbits, padding = _KBITS[kind.mpeg1, layer][bitrate], (header[2] >> 1) & 1
    if layer == 1:
        return kind, (12 * kbits * 1000 // sample_rate + padding) * 4
    return kind, kind.samples // 8 * kbits * 1000 // sample_rate + padding


@lru_cache
def _lengths(kind: Kind) -> dict[int, int]:
    """Length of a frame of this kind by the second and third byte of its header."""
    lengths = {}
    for second in range(0xE0, 0x100):
        for third in range(0x100):
            found = parse_kind(bytes((0xFF, second, third, 0xC0 if kind.mono else 0)))
            if found is not None and found[0] == kind:
                lengths[second << 8 | third] = found[1]
    return lengths


class Scan:
    """The runs of frames in a range of a file."""

    def __init__(self, read_at: ReadAt, start: int, end: int):
        self.reader = ByteReader(read_at, end)
        self.start, self.end = start, end
        self.runs: list[Run] = []
        self.ends_within_frame = False
        self.leading_junk = 0
        self._marks: list[int] = []
        self._marks_of: tuple[int, int] = (-1, 0)
        self._walk()

    def _walk(self) -> None:
        position, run, junk = self.start, None, 0
        while position < self.end:
            tag = tag_length(self.reader, position)
            if tag:
                position += tag
                run = None
                continue
            found = self._frame_at(position, run)
            if found is None:
                following = self._resync(position)
                if following < 0:
                    self.ends_within_frame |= self._is_cut_frame(position)
                    break
                junk += following - position
                if run is None and not self.runs:
                    self.leading_junk += following - position
                position, run = following, None
                continue
            kind, length = found
            header = self._length_header(position, kind, length)
            if run is None or run.kind != kind or header is not None:
                run = Run(kind, position, position, 0, header, junk)
                junk = 0
                self.runs.append(run)
                if header is not None:
                    position = run.end = run.start = position + length
                    continue
            before = position
            position = self._advance(run, position)
            run.end = position
            if position == before:  # its end is missing
                self.ends_within_frame = True
                break

    def _is_cut_frame(self, position: int) -> bool:
        found = parse_kind(self.reader.bytes_at(position, 4))
        return found is not None and position + found[1] > self.end

    def _frame_at(self, position: int, run: Run | None) -> tuple[Kind, int] | None:
        found = parse_kind(self.reader.bytes_at(position, 4))
        if found is None or (run is not None and found[0] == run.kind):
            return found
        return found if self._is_chain(position) else None

    def _is_chain(self, position: int) -> bool:
        """Whether frames of one kind follow one another from here, or up to the end."""
        first = None
        for _ in range(_CHAIN):
            found = parse_kind(self.reader.bytes_at(position, 4))
            if found is None:
                at_end = position >= self.end or tag_length(self.reader, position) > 0
                return first is not None and at_end
            if first is None:
                first = found[0]
            if found[0] != first:
                return False
            position += found[1]
        return True

    def _resync(self, position: int) -> int:
        """The next place with frames or a tag; -1 if there is none."""
        position += 1
        while position < self.end:
            place = self.reader.load(position, 4)
            buffer, base = self.reader.buffer, self.reader.base
            limit = len(buffer) - 4
            sync = buffer.find(b"\xff", place)
            tags = [found for mark in (b"ID3", b"APETAGEX") if (found := buffer.find(mark, place)) >= 0]
            if base + len(buffer) >= self.end and buffer[-128:-125] == b"TAG" and len(buffer) >= 128:
                tags.append(len(buffer) - 128)
            tag = min((found for found in tags if found >= place), default=-1)
            while 0 <= sync <= limit and (tag < 0 or sync < tag):
                if buffer[sync + 1] >= 0xE0 and self._is_chain(base + sync):
                    return base + sync
                if self.reader.base != base:
                    break
                sync = buffer.find(b"\xff", sync + 1)
            if self.reader.base != base:  # the look at a chain has loaded another block
                position = base + sync + 1
                continue
            if tag >= 0:
                if tag_length(self.reader, base + tag):
                    return base + tag
                position = base + tag + 1
                continue
            position = max(position + 1, base + max(limit, 0) + 1)
        return -1

    def _advance(self, run: Run, position: int) -> int:
        """Walk over frames of the run's kind, up to the next mark; returns where it ended."""
        lengths, mono = _lengths(run.kind), run.kind.mono
        while True:
            place = self.reader.load(position, _OVERLAP)
            buffer, base = self.reader.buffer, self.reader.base
            is_last = base + len(buffer) >= self.end
            stop = self._next_mark(position, run.kind) - base
            limit = min(stop, len(buffer) - (3 if is_last else _OVERLAP))
            first, count, length = place, 0, 0
            while place < limit and buffer[place] == 0xFF:
                length = lengths.get(buffer[place + 1] << 8 | buffer[place + 2], 0)
                if not length or (buffer[place + 3] >= 0xC0) != mono:
                    break
                place += length
                count += 1
                run.sizes.add(length)
            if count and place > len(buffer) and is_last:
                place, count = place - length, count - 1
                self.ends_within_frame = True
                position, run.frames = base + place, run.frames + count
                return position
            position, run.frames = base + place, run.frames + count
            if place == first or place >= stop or is_last or place < limit:
                return position

    def _next_mark(self, position: int, kind: Kind) -> int:
        """Where the next frame with a length begins, behind `position`, if one is in the block."""
        block = (self.reader.base, len(self.reader.buffer))
        if block != self._marks_of:
            self._marks_of, self._marks = block, []
            for mark in _MARKS:
                place = self.reader.buffer.find(mark)
                while place >= 0:
                    offset = 36 if mark == b"VBRI" else kind.mark_offset
                    self._marks += [block[0] + place - offset, block[0] + place - offset - 2]
                    place = self.reader.buffer.find(mark, place + 1)
            self._marks.sort()
        return next((mark for mark in self._marks if mark > position), 1 << 62)

    def _length_header(self, position: int, kind: Kind, length: int) -> LengthHeader | None:
        if kind.layer != 3:
            return None
        content = self.reader.bytes_at(position, length)
        for offset in (kind.mark_offset, kind.mark_offset + 2):
            if content[offset : offset + 4] in (b"Xing", b"Info"):
                return _parse_xing(content, offset)
        if content[36:40] == b"VBRI" and len(content) >= 54:
            num_bytes, frames = struct.unpack(">II", content[46:54])
            return LengthHeader(content, frames, num_bytes, 50, False, 0, is_vbri=True)
        return None


def _parse_xing(content: bytes, offset: int) -> LengthHeader:
    place = offset + 8
    flags = int.from_bytes(content[offset + 4 : place], "big")
    frames = num_bytes = None
    count_at = 0
    if flags & 1:
        count_at = place
        frames = int.from_bytes(content[place : place + 4], "big")
        place += 4
    if flags & 2:
        num_bytes = int.from_bytes(content[place : place + 4], "big")
        place += 4
    place += (100 if flags & 4 else 0) + (4 if flags & 8 else 0)
    has_delay = content[place : place + 4] in (b"LAME", b"Lavf", b"Lavc", b"GOGO", b"L3.9")
    return LengthHeader(content, frames, num_bytes, count_at, has_delay, place + 21 if has_delay else 0)


def view_of(runs: list[Run], *, keep_padding: bool) -> tuple[Piece, ...]:
    """A file with these runs of one kind, whose first frame has their right length."""
    kind = runs[0].kind
    pieces: list[Piece] = [(run.start, run.end) for run in runs]
    if kind.layer != 3:
        return tuple(pieces)
    frames, header = sum(run.frames for run in runs), runs[0].header
    if header is not None and not header.is_vbri:
        delay = None
        if header.has_delay:
            delay = header.content[header.delay_at : header.delay_at + 3].ljust(3, b"\0")
            if not keep_padding:
                delay = bytes((delay[0], delay[1] & 0xF0, 0))
        return (_xing_frame(kind, frames, delay), *pieces)
    # The decoder cuts its own delay off a file with such a frame, and keeps it in one without. One frame of silence
    # more, of which it cuts off the rest, leaves what it decodes without.
    cut = kind.samples - _DECODER_DELAY
    delay = bytes((cut >> 4, cut << 4 & 0xF0, 0))
    return (_xing_frame(kind, frames + 1, delay), _frame(kind, 0), *pieces)


def _xing_frame(kind: Kind, frames: int, delay: bytes | None) -> bytes:
    """A frame that says how many frames follow; `delay` is the encoder's delay and padding, 12 bits each."""
    place = kind.mark_offset
    content = bytearray(_frame(kind, place + 160))
    content[place : place + 12] = b"Xing" + struct.pack(">II", 1, frames)
    if delay is not None:
        content[place + 12 : place + 21] = b"LAME3.100"
        content[place + 33 : place + 36] = delay
    return bytes(content)


def _frame(kind: Kind, least_bytes: int) -> bytes:
    """A silent frame of at least this size."""
    shift = 0 if kind.mpeg1 else (1 if kind.sample_rate << 1 in _RATES else 2)
    second = (0xFB, 0xF3, 0xE3)[shift]
    rate = _RATES.index(kind.sample_rate << shift)
    header, length = b"", 0
    for bitrate in range(1, 15):
        header = bytes((0xFF, second, bitrate << 4 | rate << 2, 0xC0 if kind.mono else 0x00))
        found = parse_kind(header)
        assert found is not None
        length = found[1]
        if length >= least_bytes:
            break
    return header + bytes(length - 4)
