"""Ogg (Vorbis, Opus, FLAC): the links of a chain, and the pages that are damaged or missing, without decoding."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from acestep_ray.data.audio_layout import ByteReader, Piece, ReadAt

_CONTINUED, _FIRST, _LAST = 1, 2, 4
_HEADER_BYTES = 27
_MOST_PAGE_BYTES = 27 + 255 + 255 * 255
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass
class Page:
    start: int
    end: int
    flags: int
    granule: int
    serial: int
    number: int


@dataclass
class Link:
    """One stream of a chain, or several that lie within one another."""

    start: int
    end: int
    serials: set[int]
    codec: str
    """"vorbis", "opus", "flac" or ""."""
    granule_rate: int
    header_end: int
    """End of the pages before the first one with sound."""
    runs: list[list[Page]] = field(default_factory=list)
    """Pages with sound, one behind another; between two runs, some are lost. First and last page of each run."""
    has_end: bool = False
    head: bytes = b""
    """Of the first packet."""
    bodies: list[tuple[int, int]] = field(default_factory=list)
    """Of a FLAC stream: where the content of each page with sound is. Together they are a FLAC file's frames."""


def page_checksum(page: bytes) -> int:
    """Ogg's CRC-32 of a page. It is that of zlib with all bits in the other order and without its complements."""
    content = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED)
    value = zlib.crc32(content, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)


def scan(read_at: ReadAt, end: int, start: int = 0) -> list[Link]:
    """The links of an Ogg file, in their order."""
    reader = ByteReader(read_at, end)
    links: list[Link] = []
    position, before = start, None
    packets = wanted = 0
    while True:
        page = _page_at(reader, position)
        if page is None:
            following = reader.find(b"OggS", position + (1 if before is None or position > before.end else 0))
            if following == position:
                following = reader.find(b"OggS", position + 1)
            if following < 0:
                break
            position = following
            continue
        if page.flags & _FIRST:
            if before is None or not before.flags & _FIRST:
                links.append(_open_link(reader, page))
                packets, wanted = 0, _header_packets(reader, page)
            link = links[-1]
            link.serials.add(page.serial)
            link.header_end = page.end
            packets += _packets(reader, page)
        elif links:
            link = links[-1]
            if len(link.serials) == 1 and page.serial in link.serials:
                if packets < wanted:
                    packets += _packets(reader, page)
                    link.header_end = page.end
                else:
                    _add(link, page)
                    if link.codec == "flac":
                        segments = reader.bytes_at(page.start + 26, 1)[0]
                        link.bodies.append((page.start + _HEADER_BYTES + segments, page.end))
            link.has_end |= bool(page.flags & _LAST)
        if links:
            links[-1].end = page.end
        before, position = page, page.end
    return links


def _add(link: Link, page: Page) -> None:
    if link.runs:
        first, last = link.runs[-1][0], link.runs[-1][-1]
        if page.number == (last.number + 1) & 0xFFFFFFFF and page.start == last.end:
            link.runs[-1] = [first, page]
            return
        if page.number == (last.number + 1) & 0xFFFFFFFF and not page.flags & _CONTINUED:
            # Something that is no page lies between two that follow one another.
            link.runs.append([page, page])
            return
    link.runs.append([page, page])


def _page_at(reader: ByteReader, position: int) -> Page | None:
    """The page that begins here; None if there is none, or its checksum is wrong."""
    head = reader.bytes_at(position, _HEADER_BYTES)
    if len(head) < _HEADER_BYTES or head[:5] != b"OggS\0":
        return None
    page = reader.bytes_at(position, _MOST_PAGE_BYTES)
    lacing = page[27 : 27 + head[26]]
    length = _HEADER_BYTES + head[26] + sum(lacing)
    if len(page) < length:
        return None
    if page_checksum(page[:length]) != int.from_bytes(head[22:26], "little"):
        return None
    return Page(
        position,
        position + length,
        head[5],
        int.from_bytes(head[6:14], "little", signed=True),
        int.from_bytes(head[14:18], "little"),
        int.from_bytes(head[18:22], "little"),
    )


def _content(reader: ByteReader, page: Page, length: int) -> bytes:
    segments = reader.bytes_at(page.start + 26, 1)[0]
    return reader.bytes_at(page.start + _HEADER_BYTES + segments, length)


def _packets(reader: ByteReader, page: Page) -> int:
    """Packets that end in a page."""
    segments = reader.bytes_at(page.start + 26, 1)[0]
    return sum(length < 255 for length in reader.bytes_at(page.start + _HEADER_BYTES, segments))


def _open_link(reader: ByteReader, page: Page) -> Link:
    head = _content(reader, page, 64)
    codec, rate = "", 0
    if head[:7] == b"\x01vorbis":
        codec, rate = "vorbis", int.from_bytes(head[12:16], "little")
    elif head[:8] == b"OpusHead":
        codec, rate = "opus", 48_000
    elif head[:5] == b"\x7fFLAC":
        codec, rate = "flac", int.from_bytes(head[27:30], "big") >> 4
    return Link(page.start, page.end, {page.serial}, codec, rate, page.end, head=head)


def _header_packets(reader: ByteReader, page: Page) -> int:
    head = _content(reader, page, 16)
    if head[:7] == b"\x01vorbis":
        return 3
    if head[:8] == b"OpusHead":
        return 2
    return 1 + int.from_bytes(head[7:9], "big") if head[:5] == b"\x7fFLAC" else 1


def view_of(link: Link, run: list[Page] | None = None) -> tuple[Piece, ...]:
    """A file with one link of a chain, or with one run of its pages."""
    if run is None:
        return ((link.start, link.end),)
    return ((link.start, link.header_end), (run[0].start, run[-1].end))
