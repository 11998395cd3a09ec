"""FLAC: the length of a file by the number of its last frame, joined files, and frames that are damaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from acestep_ray.data.audio_layout import ByteReader, Piece, ReadAt

_BLOCK_SIZES = {
    1: 192,
    **{i: 576 << (i - 2) for i in range(2, 6)},
    **{i: 256 << (i - 8) for i in range(8, 16)},
}
_RATES = (0, 88_200, 176_400, 192_000, 8_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)
_DEPTHS = (0, 8, 12, -1, 16, 20, 24, 32)
_STREAM = b"fLaC"
_STREAM_START = b"fLaC\0\0\0\x22"
_INFO_BYTES = 34
_MOST_BLOCKS = 1000
_MOST_FRAME_HEADER = 16


@dataclass(frozen=True)
class StreamInfo:
    content: bytes
    """34 bytes."""
    least_block: int
    most_block: int
    sample_rate: int
    channels: int
    depth: int
    total: int
    """Samples that the header counts; 0 for an unknown number."""


@dataclass(frozen=True)
class Part:
    """A FLAC stream in a file."""

    info: StreamInfo
    start: int
    header_end: int
    end: int


@dataclass(frozen=True)
class Frame:
    start: int
    end: int
    """Where the next one begins, or the part ends."""
    first: int
    """Number of its first sample."""
    samples: int


def _table(width: int, polynomial: int) -> list[int]:
    top, mask = 1 << (width - 1), (1 << width) - 1
    table = []
    for byte in range(256):
        value = byte << (width - 8)
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value & top else 0)) & mask
        table.append(value)
    return table


_CRC8, _CRC16 = _table(8, 0x07), _table(16, 0x8005)


def parts(read_at: ReadAt, end: int, start: int, *, joined: bool = True) -> list[Part]:
    """The streams of a file whose first one starts at `start`; with `joined=False` the first one alone."""
    reader = ByteReader(read_at, end)
    starts = [start]
    while joined:
        following = reader.find(_STREAM_START, starts[-1] + 4)
        if following < 0:
            break
        starts.append(following)
    found = []
    for place, limit in zip(starts, [*starts[1:], end], strict=True):
        part = _part(reader, place, limit)
        if part is not None:
            found.append(part)
        elif not found:
            return []
    return found


def _part(reader: ByteReader, start: int, end: int) -> Part | None:
    content = reader.bytes_at(start, 8 + _INFO_BYTES)
    if content[:4] != _STREAM or len(content) < 8 + _INFO_BYTES or content[4] & 0x7F:
        return None
    position = start + 4
    for _ in range(_MOST_BLOCKS):
        head = reader.bytes_at(position, 4)
        if len(head) < 4 or position >= end:
            return None
        position += 4 + int.from_bytes(head[1:], "big")
        if head[0] & 0x80:
            break
    return Part(stream_info(content[8:]), start, position, end)


def stream_info(content: bytes) -> StreamInfo:
    """The sizes of a stream by the 34 bytes in its header."""
    packed = int.from_bytes(content[10:18], "big")
    return StreamInfo(
        content,
        int.from_bytes(content[0:2], "big"),
        int.from_bytes(content[2:4], "big"),
        packed >> 44,
        (packed >> 41 & 7) + 1,
        (packed >> 36 & 31) + 1,
        packed & (1 << 36) - 1,
    )


def header_of(info: StreamInfo, total: int) -> bytes:
    """The start of a FLAC file with no metadata but the sizes of its stream."""
    packed = int.from_bytes(info.content[10:18], "big") >> 36 << 36 | min(total, (1 << 36) - 1)
    return b"fLaC\x80\0\0\x22" + info.content[:10] + packed.to_bytes(8, "big") + bytes(16)


def view_of(part: Part, total: int) -> tuple[Piece, ...]:
    """A FLAC file of `total` samples with the frames of a part."""
    return (header_of(part.info, total), (part.header_end, part.end))


def silent_frames(info: StreamInfo, first: int, end: int, *, is_fixed: bool) -> bytes:
    """Frames of silence for samples of a stream; with `is_fixed`, all blocks but the last of a stream are equal."""
    block = max(info.most_block, 16)
    content = []
    while first < end:
        samples = min(block - first % block if is_fixed else block, end - first)
        number = _code_number(first // block if is_fixed else first)
        head = bytes((0xFF, 0xF8 if is_fixed else 0xF9, 0x70, info.channels - 1 << 4)) + number
        head += (samples - 1).to_bytes(2, "big")
        head += bytes((_crc(_CRC8, 8, head),))
        # A constant of value 0 for each channel: eight bits of its kind, and the value.
        frame = head + bytes(-(-info.channels * (8 + info.depth) // 8))
        content.append(frame + _crc(_CRC16, 16, frame).to_bytes(2, "big"))
        first += samples
    return b"".join(content)


def _code_number(number: int) -> bytes:
    if number < 0x80:
        return bytes((number,))
    length = 2
    while number >= 1 << (5 * length + 1):
        length += 1
    coded = [number >> 6 * i & 0x3F | 0x80 for i in range(length - 1)]
    first = (0xFF00 >> length & 0xFF) | number >> 6 * (length - 1)
    return bytes((first, *reversed(coded)))


def last_frame(read_at: ReadAt, part: Part) -> Frame | None:
    """The last frame of a part; its end is that of the part."""
    step = max(1 << 16, 2 * part.info.most_block)
    high = part.end
    while high > part.header_end:
        low = max(part.header_end, high - step)
        content = read_at(low, min(part.end - low, high - low + _MOST_FRAME_HEADER))
        place = len(content)
        while (place := content.rfind(b"\xff", 0, place)) >= 0:
            found = _frame_header(content[place : place + _MOST_FRAME_HEADER], part.info)
            if found is not None and _is_plausible(found[0], part, low + place):
                return Frame(low + place, part.end, *found)
        if part.end - low > 64 * step:  # no frame is as long
            return None
        high = low
    return None


def _is_plausible(first: int, part: Part, position: int) -> bool:
    """Whether a frame with this number can be here: none has more than a few hundred thousand samples a byte."""
    return first <= (position - part.header_end) * max(part.info.most_block, 1 << 16)


def frames(read_at: ReadAt, part: Part) -> Iterator[Frame]:
    """All frames of a part whose headers are whole, in the order of their numbers."""
    reader = ByteReader(read_at, part.end)
    position, before = part.header_end, None
    while (position := reader.find(b"\xff", position)) >= 0:
        found = _frame_header(reader.bytes_at(position, _MOST_FRAME_HEADER), part.info)
        if found is not None and _is_plausible(found[0], part, position):
            if before is None:
                before = Frame(position, part.end, *found)
            elif found[0] >= before.first + before.samples:
                yield Frame(before.start, position, before.first, before.samples)
                before = Frame(position, part.end, *found)
        position += 1
    if before is not None:
        yield before


def _frame_header(head: bytes, info: StreamInfo) -> tuple[int, int] | None:
    """Number of the first sample, and samples, of the frame with this header; None for what is none."""
    if len(head) < 6 or head[0] != 0xFF or head[1] & 0xFE != 0xF8:
        return None
    size, rate, channels, depth = head[2] >> 4, head[2] & 15, head[3] >> 4, head[3] >> 1 & 7
    if size == 0 or rate == 15 or channels > 10 or depth == 3 or head[3] & 1:
        return None
    if (channels + 1 if channels < 8 else 2) != info.channels or _DEPTHS[depth] not in (0, info.depth):
        return None
    if 0 < rate < 12 and _RATES[rate] != info.sample_rate:
        return None
    coded = _coded_number(head)
    if coded is None:
        return None
    number, place = coded
    extra = {6: 1, 7: 2}.get(size, 0)
    end = place + extra + {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if len(head) <= end:
        return None
    samples = int.from_bytes(head[place : place + extra], "big") + 1 if extra else _BLOCK_SIZES[size]
    if samples > max(info.most_block, 16) or _crc(_CRC8, 8, head[:end]) != head[end]:
        return None
    return (number if head[1] & 1 else number * (info.most_block or samples)), samples


def _coded_number(head: bytes) -> tuple[int, int] | None:
    """The number in a frame's header, coded like UTF-8, and the place behind it."""
    first = head[4]
    if first < 0x80:
        return first, 5
    length = 8 - (first ^ 0xFF).bit_length()
    if not 2 <= length <= 7 or len(head) < 4 + length:
        return None
    number = first & (0x7F >> length)
    for byte in head[5 : 4 + length]:
        if byte & 0xC0 != 0x80:
            return None
        number = number << 6 | byte & 0x3F
    return number, 4 + length


def _crc(table: list[int], width: int, content: bytes) -> int:
    value, mask = 0, (1 << width) - 1
    for byte in content:
        value = (value << 8 & mask) ^ table[value >> (width - 8) ^ byte]
    return value


def is_whole(content: bytes) -> bool:
    """Whether the checksum at the end of a frame is right."""
    return len(content) > 2 and _crc(_CRC16, 16, content) == 0


def whole_frames(contents: list[bytes]) -> list[bool]:
    """`is_whole` for each of many frames, all at once."""
    if not contents:
        return []
    order = sorted(range(len(contents)), key=lambda i: -len(contents[i]))
    lengths = np.array([len(contents[i]) for i in order])
    table = np.array(_CRC16, np.uint32)
    matrix = np.zeros((len(order), int(lengths[0])), np.uint8)
    for row, i in enumerate(order):
        matrix[row, : len(contents[i])] = np.frombuffer(contents[i], np.uint8)
    columns = np.ascontiguousarray(matrix.T)
    values = np.zeros(len(order), np.uint32)
    active = np.searchsorted(-lengths, -np.arange(int(lengths[0])), side="left")
    for place, count in enumerate(active):
        some = values[:count]
        values[:count] = (some << 8 & 0xFFFF) ^ table[some >> 8 ^ columns[place, :count]]
    whole = [False] * len(contents)
    for row, i in enumerate(order):
        whole[i] = bool(values[row] == 0) and len(contents[i]) > 2
    return whole
