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
    HALF_DOWNLOADED,
    HEAD_BYTES,
    SOUNDFILE_FORMATS,
    TORCHCODEC_SUFFIXES,
    UNSUPPORTED_SUFFIXES,
    Container,
    ffmpeg_container,
    is_protected,
    not_audio,
    starts_like_audio,
)
from acestep_ray.data.audio_layout import Decoded
from acestep_ray.data.audio_soundfile import SoundfileDecoder, decoder_text_of
from acestep_ray.data.audio_source import AudioError, AudioSource
from acestep_ray.data.audio_survey import survey
from acestep_ray.data.schema import RejectReason

# Seconds that FFmpeg decodes at once when it looks for the place where a damaged file stops.
_PROBE_SECONDS = 1.0


class Decoder(Protocol):
    """Windows of a file."""

    sample_rate: int
    channels: int
    subtype: str
    """libsndfile's name of the form of the samples."""

    @property
    def frames(self) -> int | None:
        """Length of the audio, found by a look at the whole file where the header may be wrong; None if unknown."""

    @property
    def claimed_frames(self) -> int | None:
        """Length of the audio by the header alone; None if it says nothing."""

    @property
    def is_surveyed(self) -> bool:
        """Whether `frames` was counted."""

    @property
    def warnings(self) -> list[str]:
        """Where the header disagrees with the content."""

    def read(self, start: int, limit: int) -> Decoded:
        """At most `limit` frames from `start`."""

    def close(self) -> None: ...


def open_decoder(source: AudioSource, *, headers_only: bool = False) -> Decoder:
    """With `headers_only`, what the header says of the length is believed."""
    file, decoder_text = None, ""
    head = source.read_at(0, HEAD_BYTES)
    problem = not_audio(head, source.size, source.read_at)
    if problem is not None:
        reason, message = problem
        raise AudioError(reason, f"{message}: {source.name}")
    try:
        file = soundfile.SoundFile(source.reader())
    except (soundfile.SoundFileError, TypeError) as error:
        # TypeError: soundfile wants to be told the form of a `.raw` file. Its own errors cannot be pickled.
        decoder_text = decoder_text_of(error)
    source.raise_failure()
    if file is not None and file.format not in SOUNDFILE_FORMATS:
        # Files named .au, .vox or .gsm without a header would be taken for headerless telephone audio.
        file.close()
        file, decoder_text = None, ""
    container = ffmpeg_container(head) if file is None else None
    if container is not None:
        if is_protected(head, source.size, source.read_at):
            raise AudioError(
                RejectReason.UNSUPPORTED,
                f"the song is protected by DRM (a purchase as .m4p): only a copy without it can be read: {source.name}",
            )
        return _TorchcodecDecoder(source, container)
    needs_no_requests = source.is_at_hand and not headers_only
    layout = survey(source, file, headers_only=not needs_no_requests)
    if file is not None or layout is not None:
        return SoundfileDecoder(source, file, layout, is_open=not (needs_no_requests or headers_only))
    if source.suffix == ".raw":
        raise AudioError(RejectReason.UNSUPPORTED, f"headerless audio (.raw) is not read: {source.name}")
    if decoder_text and starts_like_audio(head):
        raise AudioError(
            RejectReason.CORRUPT, f"the audio file is damaged or cut off ({decoder_text}): {source.name}"
        )
    if source.suffix in HALF_DOWNLOADED:
        raise AudioError(
            RejectReason.UNSUPPORTED,
            f"a download that has not ended is no audio yet, finish it or remove the file: {source.name}",
        )
    known = source.suffix in TORCHCODEC_SUFFIXES | UNSUPPORTED_SUFFIXES
    hint = f" ({source.suffix} files are known by their content)" if known else ""
    raise AudioError(
        RejectReason.UNSUPPORTED, f"the file's content is no audio that is known{hint}: {source.name}"
    )


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
        self.subtype = ""
        seconds = metadata.duration_seconds
        known = container.declares_length and seconds is not None and 0 < seconds < math.inf
        self.frames = self.claimed_frames = round(seconds * self.sample_rate) if known else None
        self.is_surveyed = False
        self.warnings: list[str] = []

    def read(self, start: int, limit: int) -> Decoded:
        samples, failure = self._read(start, limit)
        decoded = samples.shape[1]
        promised = decoded if self.frames is None else max(0, min(self.frames - start, limit))
        missing = max(0, promised - decoded)
        return Decoded(samples, missing, missing, start + decoded, failure)

    def _read(self, start: int, limit: int) -> tuple[np.ndarray, str]:
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


def _ffmpeg_text(error: Exception) -> str:
    """The message of torchcodec without the place in its source."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^.*\.(?:cpp|h):\d+, ", "", line).rstrip(".: ")
