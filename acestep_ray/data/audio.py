"""Reads audio files: the window of a song that is trained on, as 48 kHz stereo."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.transforms import Resample

from acestep_ray.data.schema import RejectReason

SAMPLE_RATE = 48_000
"""Hz of all training audio."""

MIN_SECONDS = 3.0
"""Shorter songs are padded with zeros to this length."""

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
"""Suffixes of the audio files that are read."""

UNSUPPORTED_SUFFIXES = frozenset(
    {".m4a", ".m4b", ".aac", ".alac", ".wma", ".ape", ".wv", ".mpc", ".tta", ".ac3", ".amr", ".mka"}
)
"""Suffixes of audio files that are known, and not read."""

_FORMATS = frozenset({"WAV", "WAVEX", "RF64", "W64", "FLAC", "MP3", "OGG", "AIFF", "AU", "CAF"})
_SAMPLE_RATES = (8_000, 192_000)
_MAX_CHANNELS = 8

_SILENCE = 2.0**-15  # one step of 16-bit audio

# The resampling kernel has rate · 48000 / gcd² taps: 8 GB for a rate without a common divisor, 60 MB for this one.
_RATE_STEP = 25

# A length in a header at or above this is written by programs that stream and do not know it.
_UNKNOWN_BYTES = 0x7FFFF000


class AudioError(Exception):
    """A file that is not usable audio. `reason` is what the cache stores, the text is for the user."""

    def __init__(self, reason: RejectReason, message: str):
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


def decode_window(path: str | os.PathLike[str], max_seconds: float) -> tuple[np.ndarray, int]:
    """The first `max_seconds` of an audio file; nothing beyond them is read.

    Returns float32 samples (channels, samples), in [-1, 1] for integer formats, and the sample rate in Hz
    (8000 to 192000; 1 to 8 channels). The content decides the format, not the file's suffix.

    A file cut off in the middle is used as far as it goes, if at least half of the audio that its header
    promises for the window can be decoded. Ogg files and MP3 files without a Xing header promise no length.

    Raises AudioError: MISSING, UNREADABLE, EMPTY, UNSUPPORTED or CORRUPT.
    """
    path = Path(path)
    _check_file(path)
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.SoundFileError, TypeError) as error:
        # TypeError: soundfile wants to be told the form of a `.raw` file. Its own errors cannot be pickled.
        raise _refusal(path, _decoder_text(error)) from None
    with file:
        if file.format not in _FORMATS:
            # Files named .au, .vox or .gsm without a header would be taken for headerless telephone audio.
            raise AudioError(RejectReason.UNSUPPORTED, f"no audio format that is read: {path}")
        low, high = _SAMPLE_RATES
        if not low <= file.samplerate <= high:
            raise AudioError(
                RejectReason.UNSUPPORTED,
                f"a sample rate of {file.samplerate} Hz, outside {low} to {high} Hz: {path}",
            )
        if file.channels > _MAX_CHANNELS:
            raise AudioError(
                RejectReason.UNSUPPORTED, f"{file.channels} channels, more than {_MAX_CHANNELS}: {path}"
            )
        if file.frames == 0:
            raise AudioError(RejectReason.EMPTY, f"the audio file has no samples: {path}")
        limit = math.ceil(max_seconds * file.samplerate)
        samples, failure = _read_frames(file, min(limit, file.frames))
        promised = _promised_frames(path, file)
        sample_rate = file.samplerate
    decoded = len(samples)
    if promised is not None and decoded < 0.5 * min(promised, limit):
        raise AudioError(
            RejectReason.CORRUPT,
            f"only {decoded / sample_rate:.1f} s can be decoded of the {promised / sample_rate:.1f} s "
            f"that the header promises{failure}: {path}",
        )
    if decoded == 0:
        raise AudioError(RejectReason.CORRUPT, f"no audio can be decoded{failure}: {path}")
    if not np.isfinite(samples).all():
        raise AudioError(RejectReason.CORRUPT, f"the audio holds NaN or infinite samples: {path}")
    return np.ascontiguousarray(samples.T), sample_rate


def to_training_audio(samples: np.ndarray, sample_rate: int, max_seconds: float = 240.0) -> torch.Tensor:
    """Decoded audio (channels, samples) as the models take it: float32 (2, n) at 48 kHz, in [-1, 1].

    Mono is doubled; of more than two channels the first two are taken. Resampled (the defaults of torchaudio's
    `Resample`), clamped, cut at `max_seconds`, padded at the end with zeros to 3 seconds.

    A sample rate that is no multiple of 25 Hz is taken for the nearest one that is: at most 3 cents of pitch.
    """
    wave = torch.from_numpy(samples[:2])
    if len(wave) == 1:
        wave = wave.repeat(2, 1)
    nearby_rate = round(sample_rate / _RATE_STEP) * _RATE_STEP
    if nearby_rate != SAMPLE_RATE:
        wave = Resample(nearby_rate, SAMPLE_RATE)(wave)
    wave = wave[:, : int(max_seconds * SAMPLE_RATE)].clamp(-1.0, 1.0)
    padding = int(MIN_SECONDS * SAMPLE_RATE) - wave.shape[1]
    return torch.nn.functional.pad(wave, (0, padding)) if padding > 0 else wave


def silent_fraction(samples: np.ndarray) -> float:
    """Share of the samples (channels, samples) at which every channel is below one 16-bit step, 2^-15.

    To be measured before padding, which would count as silence.
    """
    return float((np.abs(samples) < _SILENCE).all(axis=0).mean())


def audio_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises AudioError (MISSING, UNREADABLE, EMPTY, UNSUPPORTED)."""
    path = Path(path)
    _check_file(path)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise AudioError(RejectReason.UNREADABLE, f"{error.strerror}: {path}") from None
    return digest.hexdigest()


def _check_file(path: Path) -> None:
    """Raises AudioError unless `path` is a regular file with something in it that may be read."""
    try:
        if not path.exists():
            raise AudioError(RejectReason.MISSING, f"the audio file does not exist: {path}")
        if not path.is_file():
            raise AudioError(RejectReason.UNSUPPORTED, f"not a regular file: {path}")
        if path.stat().st_size == 0:
            raise AudioError(RejectReason.EMPTY, f"the audio file is empty (0 bytes): {path}")
        with path.open("rb"):
            pass
    except OSError as error:
        raise AudioError(RejectReason.UNREADABLE, f"{error.strerror}: {path}") from None


def _read_frames(file: soundfile.SoundFile, frames: int) -> tuple[np.ndarray, str]:
    """At most `frames` frames from the start, (frames, channels), and why the reading stopped early, if it did."""
    # When a decoder fails, soundfile drops the number of frames it had read; the NaNs tell where it stopped.
    buffer = np.full((frames, file.channels), np.nan, dtype=np.float32)
    try:
        return buffer[: len(file.read(out=buffer))], ""
    except soundfile.SoundFileError as error:
        unread = np.isnan(buffer[:, 0])
        decoded = int(unread.argmax()) if unread.any() else frames
        return buffer[:decoded], f" ({_decoder_text(error)})"


def _promised_frames(path: Path, file: soundfile.SoundFile) -> int | None:
    """Length in frames that the file's header declares; None where it declares none."""
    if file.format in ("WAV", "WAVEX", "AIFF"):
        # libsndfile silently shortens these to what is there.
        declared, present = _sample_chunk(path)
        return None if declared >= _UNKNOWN_BYTES else round(file.frames * declared / max(present, 1))
    if file.format == "MP3":
        return file.frames if _has_mp3_length(path) else None
    if (
        file.format == "FLAC" and file.frames < 1 << 36
    ):  # the width of the field; unknown lengths show as 2^63 - 1
        return file.frames
    return None


def _sample_chunk(path: Path) -> tuple[int, int]:
    """Declared and present bytes of the chunk that holds the samples of a WAV (`data`) or AIFF (`SSND`) file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        order = "<" if file.read(12)[:4] == b"RIFF" else ">"
        while len(header := file.read(8)) == 8:
            name, length = struct.unpack(f"{order}4sI", header)
            if name in (b"data", b"SSND"):
                return length, min(length, size - file.tell())
            file.seek(length + length % 2, os.SEEK_CUR)
    return _UNKNOWN_BYTES, 0


def _has_mp3_length(path: Path) -> bool:
    """Whether the first frame of an MP3 file carries the number of frames; if not, libsndfile guesses it."""
    with path.open("rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":
            tag_bytes = sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
            file.seek(10 + tag_bytes)
        else:
            file.seek(0)
        frame = file.read(4096)
    return any(mark in frame for mark in (b"Xing", b"Info", b"VBRI"))


def _decoder_text(error: Exception) -> str:
    return str(error).rpartition(": ")[2].rstrip(".")


def _refusal(path: Path, decoder_text: str) -> AudioError:
    """The error for a file that the decoder does not open: damaged if it starts like audio that is read."""
    with path.open("rb") as file:
        head = file.read(16)
    container = _unsupported_container(head)
    if container is not None:
        return AudioError(
            RejectReason.UNSUPPORTED, f"{container} is not read, convert the file to FLAC, WAV or MP3: {path}"
        )
    if path.suffix.lower() == ".raw":
        return AudioError(RejectReason.UNSUPPORTED, f"headerless audio (.raw) is not read: {path}")
    if _starts_like_audio(head):
        return AudioError(
            RejectReason.CORRUPT, f"the audio file is damaged or cut off ({decoder_text}): {path}"
        )
    suffix = path.suffix.lower()
    hint = f" ({suffix} files are not read)" if suffix in UNSUPPORTED_SUFFIXES else ""
    return AudioError(RejectReason.UNSUPPORTED, f"the file's content is no audio that is known{hint}: {path}")


def _unsupported_container(head: bytes) -> str | None:
    if head[4:8] == b"ftyp":
        return "MP4 audio (.m4a)"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "AAC audio (.aac)"
    starts = {
        b"ADIF": "AAC audio (.aac)",
        b"\x30\x26\xb2\x75": "Windows Media audio (.wma)",
        b"\x1a\x45\xdf\xa3": "Matroska or WebM",
        b"MAC ": "Monkey's Audio (.ape)",
        b"wvPk": "WavPack (.wv)",
        b"MPCK": "Musepack (.mpc)",
        b"TTA1": "True Audio (.tta)",
        b"\x0b\x77": "Dolby Digital (.ac3)",
        b"#!AMR": "AMR audio (.amr)",
    }
    return next((name for start, name in starts.items() if head.startswith(start)), None)


def _starts_like_audio(head: bytes) -> bool:
    if head.startswith((b"RIFF", b"RF64")):
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
