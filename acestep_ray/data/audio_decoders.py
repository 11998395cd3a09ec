"""Decodes windows of audio files, through libsndfile or FFmpeg."""

from __future__ import annotations

import math
import os
import re
from functools import cache
from typing import Any, Protocol

import numpy as np
import soundfile

from acestep_ray.data.audio_formats import (
    HEAD_BYTES,
    SOUNDFILE_FORMATS,
    TORCHCODEC_SUFFIXES,
    UNSUPPORTED_SUFFIXES,
    Container,
    ffmpeg_container,
    header_lengths,
    starts_like_audio,
)
from acestep_ray.data.audio_source import AudioError, AudioSource
from acestep_ray.data.schema import RejectReason

# Samples of all channels that are decoded at once: 4 MB. Fewer cost time in MP3 files, where each read seeks.
_BLOCK_SAMPLES = 1 << 20
# No usual file holds more samples a byte than this; where one does, the buffer grows.
_SAMPLES_PER_BYTE = 32
# Seconds that FFmpeg decodes at once when it looks for the place where a damaged file stops.
_PROBE_SECONDS = 1.0
# Where a file stands after its decoder failed: at no frame.
_UNKNOWN_POSITION = -1


class Decoder(Protocol):
    sample_rate: int
    channels: int
    frames: int | None
    """Length of the audio; None if unknown."""
    promised_frames: int | None
    """Length that the header declares, which may be more than there is."""

    def read(self, start: int, limit: int) -> tuple[np.ndarray, str]:
        """At most `limit` frames from `start`, float32 (channels, n) and contiguous; why they end early, or ""."""

    def close(self) -> None: ...


def open_decoder(source: AudioSource) -> Decoder:
    file, decoder_text = None, ""
    try:
        file = soundfile.SoundFile(source.reader())
    except (soundfile.SoundFileError, TypeError) as error:
        # TypeError: soundfile wants to be told the form of a `.raw` file. Its own errors cannot be pickled.
        decoder_text = _decoder_text(error)
    source.raise_failure()
    if file is not None:
        if file.format in SOUNDFILE_FORMATS:
            return _SoundfileDecoder(source, file)
        # Files named .au, .vox or .gsm without a header would be taken for headerless telephone audio.
        file.close()
    head = source.read_at(0, HEAD_BYTES)
    container = ffmpeg_container(head)
    if container is not None:
        return _TorchcodecDecoder(source, container)
    if file is None and source.suffix == ".raw":
        raise AudioError(RejectReason.UNSUPPORTED, f"headerless audio (.raw) is not read: {source.name}")
    if file is None and starts_like_audio(head):
        raise AudioError(
            RejectReason.CORRUPT, f"the audio file is damaged or cut off ({decoder_text}): {source.name}"
        )
    known = source.suffix in TORCHCODEC_SUFFIXES | UNSUPPORTED_SUFFIXES
    hint = f" ({source.suffix} files are known by their content)" if known else ""
    raise AudioError(
        RejectReason.UNSUPPORTED, f"the file's content is no audio that is known{hint}: {source.name}"
    )


class _SoundfileDecoder:
    def __init__(self, source: AudioSource, file: soundfile.SoundFile):
        self._source, self._file = source, file
        self.sample_rate, self.channels = file.samplerate, file.channels
        self.frames, self.promised_frames = header_lengths(
            file.format, file.frames, source.size, source.read_at
        )
        self._position = 0

    def read(self, start: int, limit: int) -> tuple[np.ndarray, str]:
        limit = max(0, min(limit, self._file.frames - start))
        failure = self._go_to(start) if limit else ""
        block = np.empty((min(limit, _BLOCK_SAMPLES // self.channels), self.channels), dtype=np.float32)
        # An absurd header must not allocate what is not there.
        capacity = min(limit, max(len(block), _SAMPLES_PER_BYTE * self._source.size // self.channels))
        samples = np.empty((self.channels, capacity), dtype=np.float32)
        decoded = 0
        while decoded < limit and not failure:
            wanted = min(len(block), limit - decoded)
            part, failure = self._read_frames(block[:wanted])
            if decoded + len(part) > samples.shape[1]:
                grown = np.empty((self.channels, min(limit, 2 * (decoded + wanted))), dtype=np.float32)
                grown[:, :decoded] = samples[:, :decoded]
                samples = grown
            samples[:, decoded : decoded + len(part)] = part.T
            decoded += len(part)
            if len(part) < wanted:
                break
        return np.ascontiguousarray(samples[:, :decoded]), failure

    def close(self) -> None:
        self._file.close()

    def _go_to(self, frame: int) -> str:
        """Make `frame` the next one that is read; returns what failed, or ""."""
        if self._position == frame:
            return ""
        self._position = frame
        try:
            if self._file.seek(frame) == frame:
                return ""
        except soundfile.SoundFileError:
            pass
        # Damaged files may have no way to a place but through all that is before it, and none after a failed seek.
        self._file.close()
        self._file = soundfile.SoundFile(self._source.reader())
        block = np.empty((_BLOCK_SAMPLES // self.channels, self.channels), dtype=np.float32)
        self._position = 0
        while self._position < frame:
            part, failure = self._read_frames(block[: frame - self._position])
            if failure or not len(part):
                return failure
        return ""

    def _read_frames(self, buffer: np.ndarray) -> tuple[np.ndarray, str]:
        """The next frames, as many as fit into `buffer` (frames, channels), and why the reading stopped early."""
        # When a decoder fails, soundfile drops the number of frames it had read; the NaNs tell where it stopped.
        buffer.fill(np.nan)
        try:
            part = self._file.read(out=buffer)
        except soundfile.SoundFileError as error:
            unread = np.isnan(buffer[:, 0])
            self._position = _UNKNOWN_POSITION
            decoded = int(unread.argmax()) if unread.any() else len(buffer)
            return buffer[:decoded], f" ({_decoder_text(error)})"
        self._position += len(part)
        return part, ""


class _TorchcodecDecoder:
    def __init__(self, source: AudioSource, container: Container):
        decoder_class, why_not = _torchcodec()
        if decoder_class is None:
            raise AudioError(
                RejectReason.UNSUPPORTED,
                f"{container.name} is read through torchcodec and FFmpeg: {why_not}; install FFmpeg and "
                f"`pip install 'acestep-ray[torchcodec]'`, or convert the file to FLAC, WAV or MP3: {source.name}",
            )
        self._source, self._class = source, decoder_class
        try:
            self._decoder = self._open()
        except Exception as error:  # RuntimeError, ValueError and others
            source.raise_failure()
            raise AudioError(
                RejectReason.CORRUPT,
                f"the audio file is damaged or cut off ({_ffmpeg_text(error)}): {source.name}",
            ) from None
        metadata = self._decoder.metadata
        self.sample_rate, self.channels = metadata.sample_rate or 0, metadata.num_channels or 0
        seconds = metadata.duration_seconds
        known = container.declares_length and seconds is not None and 0 < seconds < math.inf
        self.frames = self.promised_frames = round(seconds * self.sample_rate) if known else None

    def read(self, start: int, limit: int) -> tuple[np.ndarray, str]:
        if self.frames is not None and start >= self.frames:
            return np.empty((self.channels, 0), dtype=np.float32), ""
        try:
            return self._decode(start, limit), ""
        except Exception as error:
            text = _ffmpeg_text(error)
        nothing = np.empty((self.channels, 0), dtype=np.float32)
        if start and text.startswith("No audio frames were decoded"):
            return nothing, ""  # past the end of a file of unknown length
        failure = f" ({text})"
        # Nothing of a range is given if its last packet is damaged: find the place up to which all is well.
        step = round(_PROBE_SECONDS * self.sample_rate)
        sound = 0
        try:
            self._decoder = self._open()
            while sound < limit and self._decode(start + sound, step).shape[1]:
                sound += step
        except Exception:
            pass  # the damage is reached: `failure` tells of it already, `sound` where it begins
        try:
            self._decoder = self._open()
            return self._decode(start, min(sound, limit)), failure
        except Exception:  # nothing can be saved; `failure` goes into the reject
            return nothing, failure

    def close(self) -> None:
        self._decoder = None

    def _open(self) -> Any:
        source = self._source
        if source.content:
            return self._class(source.content)
        # An absolute path: FFmpeg takes `concat:` and the like at the start of a name for instructions.
        return self._class(os.path.abspath(source.path) if source.path else source.reader())

    def _decode(self, start: int, limit: int) -> np.ndarray:
        rate = self.sample_rate
        found = self._decoder.get_samples_played_in_range(start / rate, (start + limit) / rate)
        return found.data[:, :limit].contiguous().numpy()


@cache
def _torchcodec() -> tuple[Any, str]:
    """torchcodec's AudioDecoder, or None and why there is none."""
    try:
        from torchcodec.decoders import AudioDecoder
    except ImportError:
        return None, "torchcodec is not installed"
    except Exception:  # RuntimeError or OSError, over pages
        return None, "torchcodec finds no FFmpeg that it can use"
    return AudioDecoder, ""


def why_no_torchcodec() -> str:
    """Why the formats that FFmpeg decodes are not read here; empty where they are."""
    return _torchcodec()[1]


def _decoder_text(error: Exception) -> str:
    return str(error).rpartition(": ")[2].rstrip(".")


def _ffmpeg_text(error: Exception) -> str:
    """The message of torchcodec without the place in its source."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^.*\.(?:cpp|h):\d+, ", "", line).rstrip(".: ")
