"""WAV and its large forms, W64, AIFF, AU and CAF: where the samples are, and how many bytes of them there are.

The length in these headers is written last. It is 0 or old where a recorder lost power, wrapped beyond 4 GB, and
unknown where a program wrote into a pipe. What follows the samples shows whether it is right: other chunks, or nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from acestep_ray.data.audio_layout import ByteReader, Piece, ReadAt, tag_length

# A length in a header at or above this is written by programs that stream and do not know it.
_UNKNOWN_BYTES = 0x7FFFF000
_NONE_32 = 0xFFFFFFFF
# The chunk of the samples follows a handful of others; in damaged files, chunks of no length never end.
_MOST_CHUNKS = 1000
_KNOWN_CHUNKS = frozenset(
    b"LIST list JUNK junk PAD  FLLR fake bext iXML cue  fact smpl inst PEAK cart axml chna umid levl acid afsp DISP "
    b"labl note plst strc id3  ID3  _PMX aXML SyLp Cr8r ResU minf elm1 regn ds64 ANNO AUTH NAME (c)  MARK COMT INST "
    b"APPL AESD MIDI CHAN free uuid strg info kuki chan pakt".replace(b"  ", b" \0").split(b" ")
) | {b"PAD ", b"cue ", b"id3 ", b"ID3 ", b"(c) "}
_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0O\x8e\xdb\x8a"
_MP3_TAGS = (0x50, 0x55)


@dataclass(frozen=True)
class Samples:
    """The chunk that holds the samples."""

    start: int
    declared: int | None
    """Bytes by the header; None where it says that it does not know."""
    length: int
    """Bytes that are there."""
    is_cut_off: bool
    """Whether the header's length was right, and the file's end is missing."""
    field_warning: str
    """What of the header disagrees with the content, if something does."""
    view: tuple[Piece, ...]
    """The file with a right header."""
    is_mpeg: bool = False


@dataclass(frozen=True)
class _Found:
    """A chunk list up to the samples."""

    start: int
    declared: int | None
    whole_size: int | None
    """Size of the file by its header."""
    order: str
    """Of numbers in chunk headers, as `struct` names it."""
    wide: bool = False
    """Whether the lengths of chunks have 64 bits."""


def find_samples(read_at: ReadAt, size: int) -> Samples | None:
    """Where the samples of a file are; None for what is no such file, or has no chunk of samples."""
    head = read_at(0, 64)
    magic = head[:4]
    if magic in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _wav(read_at, size, magic)
    if magic == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _aiff(read_at, size)
    if magic in (b".snd", b"dns.") and len(head) >= 24:
        return _au(read_at, size, head)
    if magic == b"caff":
        return _caf(read_at, size)
    if head[:16] == b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00":
        return _w64(read_at, size)
    return None


def _length(read_at: ReadAt, size: int, found: _Found) -> tuple[int, bool, bool]:
    """Bytes of samples that are there, whether the end is cut off, and whether the header's length is wrong."""
    there, declared = max(0, size - found.start), found.declared
    if declared is None:
        return there, False, False
    if declared > there:
        # A header that counts the file's bytes rightly was not written for a longer one.
        is_cut_off = found.whole_size is None or abs(found.whole_size - size) > 1
        return there, is_cut_off, not is_cut_off
    if _ends_there(read_at, size, found, declared):
        return declared, False, False
    wrapped = declared + (1 << 32)
    while not found.wide and wrapped <= there:
        if _ends_there(read_at, size, found, wrapped):
            return wrapped, False, True
        wrapped += 1 << 32
    return there, False, True


def _ends_there(read_at: ReadAt, size: int, found: _Found, length: int) -> bool:
    """Whether what follows samples of this length is nothing, zeros, a tag or chunks."""
    end = found.start + length
    return any(_is_rest(read_at, size, place, found) for place in (end, end + length % 2))


def _is_rest(read_at: ReadAt, size: int, position: int, found: _Found) -> bool:
    for _ in range(_MOST_CHUNKS):
        left = size - position
        width = 12 if found.wide else 8
        if left < width:
            return True
        head = read_at(position, 12)
        name = head[:4]
        length = int.from_bytes(head[4:width], "little" if found.order == "<" else "big")
        fits = position + width + length <= size + 1
        if name in _KNOWN_CHUNKS or (fits and length > 0 and name.strip().isalnum() and name.isascii()):
            if not fits:
                return True
            position += width + length + length % 2 * (not found.wide)
            continue
        if tag_length(ByteReader(read_at, size), position):
            return True
        return name == bytes(4) and _is_zero(read_at, position, size)
    return False


def _is_zero(read_at: ReadAt, position: int, end: int) -> bool:
    while position < end:
        content = read_at(position, 1 << 20)
        if not content:
            return True
        if content.count(0) != len(content):
            return False
        position += len(content)
    return True


def _described(found: _Found, length: int, is_wrong: bool) -> str:
    if not is_wrong:
        return ""
    return f"its header counts {found.declared:,} bytes of samples, {length:,} are there"


def _wav(read_at: ReadAt, size: int, magic: bytes) -> Samples | None:
    order = ">" if magic == b"RIFX" else "<"
    whole = struct.unpack(f"{order}I", read_at(4, 4))[0] + 8
    position, large, layout, before = 12, None, b"", []
    found = None
    for _ in range(_MOST_CHUNKS):
        header = read_at(position, 8)
        if len(header) < 8:
            break
        name, length = struct.unpack(f"{order}4sI", header)
        content = position + 8
        if name == b"ds64":
            large = struct.unpack("<QQQ", read_at(content, 24).ljust(24, b"\0"))
        elif name == b"fmt ":
            layout = read_at(content, min(length, 64))
        if name == b"data" and found is None:
            declared: int | None = length
            if magic in (b"RF64", b"BW64") and length == _NONE_32:
                whole, declared = (large[0] + 8, large[1]) if large else (0, None)
            elif length >= _UNKNOWN_BYTES and length > size - content:
                declared = None
            found = _Found(content, declared, whole, order)
            if layout:
                break
        elif found is None and name != b"ds64":
            before.append((position, min(content + length + length % 2, size)))
        elif name == b"fmt ":
            before.append((position, content + length + length % 2))
            break
        position = content + length + length % 2
    if found is None or len(layout) < 16:
        return None
    length, is_cut_off, is_wrong = _length(read_at, size, found)
    tag, _, _, _, block = struct.unpack(f"{order}HHIIH", layout[:14])
    warning = _described(found, length, is_wrong)
    data: Piece = (found.start, found.start + length)
    if tag in _MP3_TAGS:
        return Samples(found.start, found.declared, length, is_cut_off, warning, (data,), is_mpeg=True)
    chunks: list[Piece] = list(before)
    if length < _NONE_32 - (1 << 20) and magic in (b"RIFF", b"RIFX"):
        total = 12 + sum(end - start for start, end in before) + length
        head = magic + struct.pack(f"{order}I", total) + b"WAVE"
        view = (head, *chunks, b"data" + struct.pack(f"{order}I", length), data)
    else:
        count = length // max(block, 1)
        sizes = struct.pack("<IQQQI", 28, length + (1 << 16), length, count, 0)
        head = b"RF64" + struct.pack("<I", _NONE_32) + b"WAVE" + b"ds64" + sizes
        view = (head, *chunks, b"data" + struct.pack("<I", _NONE_32), data)
    return Samples(found.start, found.declared, length, is_cut_off, warning, view)


def _aiff(read_at: ReadAt, size: int) -> Samples | None:
    whole = int.from_bytes(read_at(4, 4), "big") + 8
    position, found, common, before = 12, None, b"", []
    for _ in range(_MOST_CHUNKS):
        header = read_at(position, 16)
        if len(header) < 8:
            break
        name, length = struct.unpack(">4sI", header[:8])
        following = position + 8 + length + length % 2
        if name == b"SSND" and found is None:
            skipped = 8 + int.from_bytes(header[8:12], "big")
            start = position + 8 + skipped
            declared: int | None = length - skipped
            if length == 0 or (length >= _UNKNOWN_BYTES and length > size - position):
                declared = None
            elif length < skipped:
                declared = 0
            found = _Found(start, declared, whole, ">")
            if common:
                break
        elif name == b"COMM":
            common = read_at(position + 8, min(length, 64))
            before.append((position, min(following, size)))
            if found is not None:
                break
        elif found is None:
            before.append((position, min(following, size)))
        position = following
    if found is None or len(common) < 18 or found.start > size:
        return None
    length, is_cut_off, is_wrong = _length(read_at, size, found)
    warning = _described(found, length, is_wrong)
    counted = int.from_bytes(common[2:6], "big")
    width = int.from_bytes(common[:2], "big") * -(-int.from_bytes(common[6:8], "big") // 8)
    is_plain = len(common) == 18 or common[18:22] in (
        b"NONE",
        b"sowt",
        b"twos",
        b"in24",
        b"in32",
        b"fl32",
        b"FL32",
    )
    if is_plain and not is_cut_off and not warning and width and abs(counted - length // width) > 1:
        warning = f"its header counts {counted:,} samples, {length // width:,} are there"
    stored = min(length, _NONE_32 - (1 << 20))
    chunks: list[Piece] = list(before)
    total = 4 + sum(end - start for start, end in before) + 16 + stored
    head = b"FORM" + struct.pack(">I", total) + read_at(8, 4)
    sound = b"SSND" + struct.pack(">III", stored + 8, 0, 0)
    view = (head, *chunks, sound, (found.start, found.start + length))
    return Samples(found.start, found.declared, length, is_cut_off, warning, view)


def _au(read_at: ReadAt, size: int, head: bytes) -> Samples | None:
    order = ">" if head[:4] == b".snd" else "<"
    start, declared = struct.unpack(f"{order}II", head[4:12])
    if not 24 <= start < size:
        return None
    found = _Found(start, None if declared in (0, _NONE_32) else declared, None, order)
    length, is_cut_off, is_wrong = _length(read_at, size, found)
    view = (head[:8] + b"\xff" * 4, (12, start), (start, start + length))
    return Samples(start, found.declared, length, is_cut_off, _described(found, length, is_wrong), view)


def _caf(read_at: ReadAt, size: int) -> Samples | None:
    position = 8
    for _ in range(_MOST_CHUNKS):
        header = read_at(position, 16)
        if len(header) < 16:
            return None
        name, length = struct.unpack(">4sq", header[:12])
        if name == b"data":
            start = position + 16
            known = 4 < length < 1 << 62
            found = _Found(start, max(0, length - 4) if known or length == 4 else None, None, ">", wide=True)
            there, is_cut_off, is_wrong = _length(read_at, size, found)
            view = ((0, position + 4), struct.pack(">q", there + 4), (position + 12, start + there))
            warning = _described(found, there, is_wrong)
            return Samples(start, found.declared, there, is_cut_off, warning, view)
        if length < 0:
            return None
        position += 12 + length
    return None


def _w64(read_at: ReadAt, size: int) -> Samples | None:
    whole = int.from_bytes(read_at(16, 8), "little")
    position = 40
    for _ in range(_MOST_CHUNKS):
        header = read_at(position, 24)
        if len(header) < 24:
            return None
        length = int.from_bytes(header[16:], "little")
        if header[:16] == _W64_DATA:
            start, declared = position + 24, length - 24
            known = 0 < declared < 1 << 62
            there = size - start
            is_cut_off = known and declared > there and whole != size
            # libsndfile takes all that follows the header for samples, whatever its length says.
            found = _Found(start, declared if known else None, whole, "<", wide=True)
            rest = there - declared
            is_wrong = known and not is_cut_off and (rest < 0 or rest > 4096)
            view = ((0, size),)
            return Samples(start, found.declared, there, is_cut_off, _described(found, there, is_wrong), view)
        if length < 24:
            return None
        position += (length + 7) & ~7
    return None
