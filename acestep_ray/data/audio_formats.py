"""What the first bytes of an audio file tell: its kind, or what it is that is no audio."""

from __future__ import annotations

import json
from typing import NamedTuple

from acestep_ray.data.audio_layout import ReadAt
from acestep_ray.data.schema import RejectReason

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
        ".rf64",
        ".bw64",
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

UNSUPPORTED_SUFFIXES = frozenset({".dsf", ".dff", ".ra", ".m4p"})
"""Suffixes of audio files that are known, and not read."""

SOUNDFILE_FORMATS = frozenset({"WAV", "WAVEX", "RF64", "W64", "FLAC", "MP3", "OGG", "AIFF", "AU", "CAF"})
"""libsndfile's names of the formats that are read; those without a header are not among them."""

HEAD_BYTES = 64
"""Bytes from a file's start that the functions of this module ask for."""


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


_POINTERS = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a pointer of Git LFS stands in the place of the audio: run `git lfs pull` in its repository",
    ),
    (
        b"/annex/objects/",
        "a pointer of git-annex stands in the place of the audio: run `git annex get` in its repository",
    ),
)
_PAGES = (b"<!doctype html", b"<html", b"<?xml", b"<head", b"<error")
HALF_DOWNLOADED = frozenset(
    {".part", ".crdownload", ".download", ".partial", ".opdownload", ".!ut", ".aria2"}
)
"""Suffixes of files that a browser or another program is still downloading."""

_MOST_ATOMS, _MOST_MOOV = 100, 16 << 20
_ZERO_BLOCK = 1 << 20


def not_audio(head: bytes, size: int, read_at: ReadAt) -> tuple[RejectReason, str] | None:
    """What people have under a song's name that is none, and what to do; None for what may be audio."""
    text = read_at(0, 512) if size < 1 << 16 else head
    for start, message in _POINTERS:
        if text.startswith(start) or (
            start.startswith(b"/") and size < 4096 and start in text.split(b"\n")[0]
        ):
            return RejectReason.UNSUPPORTED, message
    stripped = read_at(0, 512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if stripped.startswith(_PAGES):
        return (
            RejectReason.UNSUPPORTED,
            "the file is a web page or an error page, as a failed download leaves it: download the song again",
        )
    if stripped[:1] in (b"{", b"[") and _is_json(read_at, size):
        return (
            RejectReason.UNSUPPORTED,
            "the file is JSON, as a failed download leaves it: download the song again",
        )
    if not head.strip(b"\0") and _is_zero(read_at, size):
        return (
            RejectReason.EMPTY,
            f"the file is {size:,} zero bytes, as a failed copy or download leaves it: copy it again",
        )
    return None


def _is_json(read_at: ReadAt, size: int) -> bool:
    if size > 1 << 16:
        return False
    try:
        json.loads(read_at(0, size).decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _is_zero(read_at: ReadAt, size: int) -> bool:
    for position in range(0, size, _ZERO_BLOCK):
        content = read_at(position, min(_ZERO_BLOCK, size - position))
        if content.count(0) != len(content):
            return False
    return True


def is_protected(head: bytes, size: int, read_at: ReadAt) -> bool:
    """Whether the sound of an MP4 file is encrypted (`drms`, `enca`)."""
    if head[4:8] != b"ftyp":
        return False
    position = 0
    for _ in range(_MOST_ATOMS):
        atom = read_at(position, 16)
        if len(atom) < 8:
            return False
        length = int.from_bytes(atom[:4], "big")
        if length == 1:
            length = int.from_bytes(atom[8:16], "big")
        if atom[4:8] == b"moov":
            content = read_at(position, min(length, size, _MOST_MOOV))
            stsd = content.find(b"stsd")
            return stsd >= 0 and content[stsd + 16 : stsd + 20] in (b"drms", b"enca")
        if length < 8:
            return False
        position += length
    return False
