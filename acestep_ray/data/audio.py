"""Reads audio files, local or in object storage: the window of a song that is trained on, as 48 kHz stereo."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np
import soxr

from acestep_ray.data.audio_decoders import open_decoder
from acestep_ray.data.audio_formats import AUDIO_SUFFIXES, TORCHCODEC_SUFFIXES, UNSUPPORTED_SUFFIXES
from acestep_ray.data.audio_layout import Decoded
from acestep_ray.data.audio_level import FLOAT_SUBTYPES, Level, measure
from acestep_ray.data.audio_source import AudioError, AudioSource
from acestep_ray.data.loudness import integrated_loudness
from acestep_ray.data.schema import RejectReason
from acestep_ray.storage import StoredFile

__all__ = [
    "AUDIO_SUFFIXES",
    "MIN_DECODED",
    "MIN_SECONDS",
    "RESAMPLER",
    "SAMPLE_RATE",
    "TORCHCODEC_SUFFIXES",
    "UNSUPPORTED_SUFFIXES",
    "AudioError",
    "AudioFile",
    "audio_sha256",
    "decode_window",
    "probe_seconds",
    "silent_fraction",
    "to_training_audio",
]

SAMPLE_RATE = 48_000
"""Hz of all training audio."""

MIN_SECONDS = 3.0
"""Shorter songs are padded with zeros to this length."""

RESAMPLER = "soxr-hq"
"""How training audio is resampled; part of what a cached row was made from."""

MIN_DECODED = 0.95
"""Share of the expected audio that must decode, unless it is chosen otherwise."""

# The end of a lossy file may be off by a frame or two.
_TOLERATED_SECONDS = 0.1
# A stretch that is resampled may be off by a sample or two.
_TOLERATED_SILENCE = 0.001
_LEVEL_BLOCK_SAMPLES = 1 << 20

WHOLE_FETCH_BYTES = 64 << 20
"""An object up to this size is fetched whole, in one request; of a larger one, only the ranges that are decoded."""

_SOXR_QUALITY = "HQ"
# Samples of a channel at once: what a core's cache holds.
_PART_SAMPLES = 1 << 16
_SAMPLE_RATES = (8_000, 192_000)
_MAX_CHANNELS = 8

_SILENCE = 2.0**-15  # one step of 16-bit audio


class AudioFile:
    """An open audio file, of which windows are decoded. A context manager.

    The content decides the format, not the suffix. WAV, FLAC, MP3, Ogg (Vorbis, Opus), AIFF, AU, CAF and W64 are read
    by libsndfile; MP4 (m4a), AAC, WMA, Matroska and WebM and others by FFmpeg, where torchcodec is installed.
    Symbolic links are followed. An object in storage of up to 64 MB is fetched whole, once.

    Raises AudioError when opened: MISSING, UNREADABLE, EMPTY, UNSUPPORTED or CORRUPT.
    """

    sample_rate: int
    """Hz, 8000 to 192000."""
    channels: int
    """1 to 8."""
    decoded_share: float | None
    """Of the window that was read last; None where all of it decodes."""

    def __init__(
        self,
        file: StoredFile | str | os.PathLike[str],
        *,
        fetch_whole: bool = True,
        min_decoded: float | None = None,
    ):
        """`fetch_whole=False` reads an object of any size by ranges and believes its header: for a look at that.

        `min_decoded` is the share of a window that must decode, 0 to 1, by a flag of this name, which the error then
        names; None takes `MIN_DECODED`.
        """
        self._source = AudioSource(file, WHOLE_FETCH_BYTES if fetch_whole else 0)
        self._headers_only = not fetch_whole
        self._min_decoded = MIN_DECODED if min_decoded is None else min_decoded
        self._limit = f"{MIN_DECODED:.0%} must" if min_decoded is None else f"--min_decoded is {min_decoded}"
        self._level: Level | None = None
        self._damage = ""
        self.decoded_share = None
        try:
            self._decoder = open_decoder(self._source, headers_only=not fetch_whole)
            self.sample_rate, self.channels = self._decoder.sample_rate, self._decoder.channels
            self._check_format()
        except BaseException:
            self.close()
            raise

    @property
    def duration_seconds(self) -> float | None:
        """Length of what is there, counted where the header may be wrong; None where only decoding would tell.

        With `fetch_whole=False`, what the header says.
        """
        frames = self._decoder.claimed_frames if self._headers_only else self._decoder.frames
        return None if frames is None else frames / self.sample_rate

    @property
    def is_counted(self) -> bool:
        """Whether `duration_seconds` was counted, not read from the header."""
        return self._decoder.is_surveyed

    @property
    def warnings(self) -> list[str]:
        """What disagrees in the file, and what was done about it in the window that was read last."""
        level = self._level.warning if self._level is not None else ""
        return [text for text in (*self._decoder.warnings, self._damage, level) if text]

    def read(self, start_seconds: float, seconds: float) -> np.ndarray:
        """The audio from `start_seconds` on, at most `seconds` of it; nothing beyond is decoded.

        Returns float32 (channels, n), in [-1, 1] for integer formats and for float ones (see `audio_level`); n is 0
        past the end of the audio.

        Silence of the same length replaces what is damaged, so that what follows stays at its place. The window is
        used if at least the share `min_decoded` of what is expected of it decodes; `decoded_share` and `warnings`
        then tell of it.

        Raises AudioError: CORRUPT, or UNREADABLE if storage failed.
        """
        rate, source = self.sample_rate, self._source
        start, limit = round(start_seconds * rate), math.ceil(seconds * rate)
        found = self._decoder.read(start, limit)
        source.raise_failure()
        samples = found.samples
        self.channels = self._decoder.channels
        self._note_damage(start, found)
        if samples.shape[1] == 0 and (start == 0 or found.failure):
            raise AudioError(RejectReason.CORRUPT, f"no audio can be decoded{found.failure}: {source.name}")
        if not _is_finite(samples):
            raise AudioError(RejectReason.CORRUPT, f"the audio holds NaN or infinite samples: {source.name}")
        return self._scaled(samples, start)

    def _note_damage(self, start: int, found: Decoded) -> None:
        """Raises AudioError where too little of a window decodes."""
        rate = self.sample_rate
        self.decoded_share, self._damage = None, ""
        expected = found.samples.shape[1] + found.missing
        silenced = found.lost - found.missing
        at_the_end = min(_TOLERATED_SECONDS * rate, 0.5 * expected)
        if silenced <= _TOLERATED_SILENCE * rate and found.missing <= at_the_end:
            return
        decoded = expected - found.lost
        self.decoded_share = share = decoded / expected
        if share < self._min_decoded:
            place = f" from {start / rate:.1f} s on," if start else ""
            raise AudioError(
                RejectReason.CORRUPT,
                f"only {decoded / rate:.1f} s can be decoded{place} of the {expected / rate:.1f} s that the file "
                f"promises: {share:.1%}, {self._limit}, the damage begins at "
                f"{found.lost_at / rate:.1f} s{found.failure}: {self._source.name}",
            )
        self._damage = (
            f"{share:.1%} of it decodes: {found.lost / rate:.1f} s are lost, the first at "
            f"{found.lost_at / rate:.1f} s"
        )

    def _scaled(self, samples: np.ndarray, start: int) -> np.ndarray:
        """Float samples at full scale 1.0; those of integer formats are unchanged."""
        if self._decoder.subtype not in FLOAT_SUBTYPES or not samples.size:
            return samples
        if self._level is None:
            frames = self._decoder.frames
            is_whole = start == 0 and frames is not None and samples.shape[1] >= frames
            self._level = measure([samples] if is_whole else self._blocks())
        scale = max(self._level.full_scale, 1.0)
        if scale == 1.0:
            return samples
        if math.isinf(scale):
            raise AudioError(
                RejectReason.CORRUPT,
                f"the float samples reach {self._level.peak:,.0f}, which is no sound: {self._source.name}",
            )
        return np.divide(samples, np.float32(scale), out=samples)

    def _blocks(self) -> Iterator[np.ndarray]:
        """All samples of the file."""
        position, frames = 0, max(1, _LEVEL_BLOCK_SAMPLES // self.channels)
        while True:
            samples = self._decoder.read(position, frames).samples
            self._source.raise_failure()
            if not samples.shape[1]:
                return
            yield samples
            position += samples.shape[1]

    def sha256(self) -> str:
        """SHA-256 of the file's bytes, in hexadecimal. Raises AudioError (UNREADABLE)."""
        return self._source.sha256()

    def close(self) -> None:
        self._source.close()
        if decoder := self.__dict__.pop("_decoder", None):
            decoder.close()

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_format(self) -> None:
        low, high = _SAMPLE_RATES
        name = self._source.name
        if not low <= self.sample_rate <= high:
            raise AudioError(
                RejectReason.UNSUPPORTED,
                f"a sample rate of {self.sample_rate} Hz, outside {low} to {high} Hz: {name}",
            )
        if not 1 <= self.channels <= _MAX_CHANNELS:
            raise AudioError(
                RejectReason.UNSUPPORTED, f"{self.channels} channels, not 1 to {_MAX_CHANNELS}: {name}"
            )
        if self._decoder.claimed_frames == 0:
            raise AudioError(RejectReason.EMPTY, f"the audio file has no samples: {name}")


def decode_window(
    file: StoredFile | str | os.PathLike[str], max_seconds: float, start_seconds: float = 0.0
) -> tuple[np.ndarray, int]:
    """`AudioFile.read` of one window: float32 samples (channels, n), and the sample rate in Hz.

    Raises AudioError: MISSING, UNREADABLE, EMPTY, UNSUPPORTED or CORRUPT.
    """
    with AudioFile(file) as audio:
        return audio.read(start_seconds, max_seconds), audio.sample_rate


def probe_seconds(file: StoredFile | str | os.PathLike[str]) -> float | None:
    """Length of an audio file by its header alone; None where it says nothing or the file cannot be read."""
    try:
        with AudioFile(file, fetch_whole=False) as audio:
            return audio.duration_seconds
    except AudioError:
        return None


def to_training_audio(
    samples: np.ndarray,
    sample_rate: int,
    max_seconds: float = 240.0,
    loudness_lufs: float | None = None,
) -> np.ndarray:
    """Decoded audio (channels, samples) as the models take it: float32 (2, n) at 48 kHz, in [-1, 1].

    Mono is doubled; of more than two channels the first two are taken. Resampled (soxr HQ), cut at `max_seconds`,
    brought to `loudness_lufs` where that is given, clamped, padded at the end with zeros to 3 seconds.

    The loudness is the integrated one of the stereo result (ITU-R BS.1770). Audio too short or too quiet to be
    measured keeps its loudness; audio that is made louder than full scale is clipped.
    """
    length = min(int(samples.shape[1] * SAMPLE_RATE / sample_rate + 0.5), int(max_seconds * SAMPLE_RATE))
    wave = np.empty((2, max(length, int(MIN_SECONDS * SAMPLE_RATE))), dtype=np.float32)
    clip = loudness_lufs is None
    for channel, target in zip(samples[:2], wave, strict=False):
        end = 0
        for part in _resampled(channel, sample_rate):
            part = part[: length - end]
            place = target[end : end + len(part)]
            np.clip(part, -1.0, 1.0, out=place) if clip else np.copyto(place, part)
            end += len(part)
            if end == length:
                break
        target[end:] = 0.0
    if len(samples) == 1:
        wave[1] = wave[0]
    if loudness_lufs is not None:
        loudness = integrated_loudness(wave[:, :length])
        gain = 1.0 if loudness is None else 10 ** ((loudness_lufs - loudness) / 20)
        np.clip(np.multiply(wave, np.float32(gain), out=wave), -1.0, 1.0, out=wave)
    return wave


def _resampled(channel: np.ndarray, sample_rate: int) -> Iterator[np.ndarray]:
    """Samples (n,) at 48 kHz, in parts that a core's cache holds: what memory never sees is twice as fast."""
    stream = None
    if sample_rate != SAMPLE_RATE:
        stream = soxr.ResampleStream(sample_rate, SAMPLE_RATE, 1, quality=_SOXR_QUALITY)
    for first in range(0, len(channel), _PART_SAMPLES):
        part = channel[first : first + _PART_SAMPLES]
        yield part if stream is None else stream.resample_chunk(part, first + _PART_SAMPLES >= len(channel))


def silent_fraction(samples: np.ndarray) -> float:
    """Share of the samples (channels, samples) at which every channel is below one 16-bit step, 2^-15.

    To be measured before padding, which would count as silence. 1.0 if there are no samples.
    """
    if not samples.shape[1]:
        return 1.0
    magnitude = np.empty((len(samples), _PART_SAMPLES), dtype=samples.dtype)
    silent = 0
    for first in range(0, samples.shape[1], _PART_SAMPLES):
        part = samples[:, first : first + _PART_SAMPLES]
        part = np.abs(part, out=magnitude[:, : part.shape[1]])
        silent += np.count_nonzero(part.max(axis=0) < _SILENCE)
    return silent / samples.shape[1]


def audio_sha256(file: StoredFile | str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises AudioError (MISSING, UNREADABLE, EMPTY, UNSUPPORTED)."""
    source = AudioSource(file, WHOLE_FETCH_BYTES)
    try:
        return source.sha256()
    finally:
        source.close()


def _is_finite(samples: np.ndarray) -> bool:
    # A sum shows every value that is not finite, and costs a tenth of a look at each; it may overflow without one.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(samples.sum()) or np.isfinite(samples).all())
