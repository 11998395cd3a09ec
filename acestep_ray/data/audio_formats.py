"""What the first bytes of an audio file tell: its kind, and the length that its header declares."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

AUDIO_SUFFIXES = frozenset(
    {
        ".wav",
        ".wave",
        ".flac",
        ".mp3",
        ".ogg",
        ".oga",
        ".opus",
        ".aiff",
        ".aif",
        ".aifc",
        ".au",
        ".caf",
        ".w64",
    }
)
"""Suffixes of the audio files that are always read."""

TORCHCODEC_SUFFIXES = frozenset(
    {
        ".m4a",
        ".m4b",
        ".aac",
        ".alac",
        ".wma",
        ".webm",
        ".mka",
        ".ape",
        ".wv",
        ".mpc",
        ".tta",
        ".ac3",
        ".dts",
        ".amr",
    }
)
"""Suffixes of the audio files that are read where torchcodec is installed."""

UNSUPPORTED_SUFFIXES = frozenset({".dsf", ".dff", ".ra"})
"""Suffixes of audio files that are known, and not read."""

SOUNDFILE_FORMATS = frozenset({"WAV", "WAVEX", "RF64", "W64", "FLAC", "MP3", "OGG", "AIFF", "AU", "CAF"})
"""libsndfile's names of the formats that are read; those without a header are not among them."""

HEAD_BYTES = 64
"""Bytes from a file's start that the functions of this module ask for."""

ReadAt = Callable[[int, int], bytes]
"""Bytes of a file: (position, length) → at most `length` bytes."""

# A length in a header at or above this is written by programs that stream and do not know it.
_UNKNOWN_BYTES = 0x7FFFF000
# The width of FLAC's field; an unknown length shows as 2^63 - 1.
_MOST_FRAMES = 1 << 36
# The chunk of the samples follows a handful of others; in damaged files, chunks of no length never end.
_MOST_CHUNKS = 1000


class Container(NamedTuple):
    """A kind of file that FFmpeg reads and libsndfile does not."""

    name: str
    declares_length: bool
    """Otherwise FFmpeg guesses the length from the bit rate."""


_MP4 = Container("MP4 audio (.m4a)", True)
_AAC = Container("AAC audio (.aac)", False)
_CONTAINERS = {
    b"ADIF": _AAC,
    b"\x30\x26\xb2\x75": Container("Windows Media audio (.wma)", True),
    b"\x1a\x45\xdf\xa3": Container("Matroska or WebM", True),
    b"MAC ": Container("Monkey's Audio (.ape)", True),
    b"wvpk": Container("WavPack (.wv)", True),
    b"MPCK": Container("Musepack (.mpc)", True),
    b"MP+": Container("Musepack (.mpc)", True),
    b"TTA1": Container("True Audio (.tta)", True),
    b"\x0b\x77": Container("Dolby Digital (.ac3)", False),
    b"\x7f\xfe\x80\x01": Container("DTS audio (.dts)", False),
    b"#!AMR": Container("AMR audio (.amr)", False),
}


def ffmpeg_container(head: bytes) -> Container | None:
    """The kind of a file that only FFmpeg reads, by its first bytes.

    FFmpeg is given no other file: it would follow a playlist to other files and into the network.
    """
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
        return _MP4
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return _AAC
    return next((container for start, container in _CONTAINERS.items() if head.startswith(start)), None)


def starts_like_audio(head: bytes) -> bool:
    """Whether a file starts like one that libsndfile reads."""
    if head.startswith((b"RIFF", b"RIFX", b"RF64")):
        return head[8:12] in (b"WAVE", b"")
    if head.startswith(b"FORM"):
        return head[8:12] in (b"AIFF", b"AIFC", b"")
    if head.startswith((b"fLaC", b"OggS", b"ID3", b"caff", b".snd", b"riff\x2e\x91\xcf\x11")):
        return True
    # MPEG frame header: 11 sync bits, layer II or III, a bit rate and a sample rate that exist.
    return (
        len(head) > 2
        and head[0] == 0xFF
        and head[1] & 0xE0 == 0xE0
        and head[1] & 0x06 in (0x02, 0x04)
        and head[2] & 0xF0 != 0xF0
        and head[2] & 0x0C != 0x0C
    )


def header_lengths(
    format_name: str, frames: int, size: int, read_at: ReadAt
) -> tuple[int | None, int | None]:
    """Frames that a file of `size` bytes has, and frames that its header promises; None for what is not known.

    `frames` is the number that libsndfile gives: what is there, what the header says, or a guess.
    """
    if frames >= _MOST_FRAMES or (format_name == "MP3" and not _has_mp3_length(read_at)):
        return None, None
    if format_name in ("WAV", "WAVEX", "AIFF"):
        # libsndfile silently shortens these to what is there.
        declared, present = _sample_chunk(size, read_at)
        promised = None if declared >= _UNKNOWN_BYTES else round(frames * declared / max(present, 1))
        return frames, promised
    return frames, frames if format_name in ("MP3", "FLAC") else None


def _sample_chunk(size: int, read_at: ReadAt) -> tuple[int, int]:
    """Declared and present bytes of the chunk that holds the samples of a WAV (`data`) or AIFF (`SSND`) file."""
    order = "<" if read_at(0, 4) == b"RIFF" else ">"
    position = 12
    for _ in range(_MOST_CHUNKS):
        header = read_at(position, 8)
        if len(header) < 8:
            break
        name, length = struct.unpack(f"{order}4sI", header)
        position += 8
        if name in (b"data", b"SSND"):
            return length, min(length, size - position)
        position += length + length % 2
    return _UNKNOWN_BYTES, 0


def _has_mp3_length(read_at: ReadAt) -> bool:
    """Whether the first frame of an MP3 file carries the number of frames; if not, libsndfile guesses it."""
    head = read_at(0, 10)
    start = 0
    if head[:3] == b"ID3" and len(head) == 10:
        start = 10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    frame = read_at(start, 4096)
    return any(mark in frame for mark in (b"Xing", b"Info", b"VBRI"))
