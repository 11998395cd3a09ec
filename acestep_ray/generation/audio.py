"""Sound and its files; light to import, for processes that make none."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from acestep_ray.data.audio import SAMPLE_RATE
from acestep_ray.storage.files import written_whole

SUBTYPES = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III"}
"""Of each format that is written."""

# libsndfile's Vorbis encoder ends the process when it gets minutes at once.
_FRAMES_PER_WRITE = SAMPLE_RATE


@dataclass(frozen=True)
class Sound:
    """What was made of a song."""

    waveform: np.ndarray
    """(2, samples) float32 at 48 kHz, within [−1, 1]."""
    overlapped: bool
    """Whether it was decoded in overlapping windows."""


def audio_bytes(waveform: np.ndarray, format: str) -> bytes:
    """(2, samples) at 48 kHz as a file of one of the formats of `SUBTYPES`."""
    content = io.BytesIO()
    with soundfile.SoundFile(
        content, "w", SAMPLE_RATE, len(waveform), subtype=SUBTYPES[format], format=format.upper()
    ) as file:
        for start in range(0, waveform.shape[1], _FRAMES_PER_WRITE):
            file.write(waveform[:, start : start + _FRAMES_PER_WRITE].T)
    return content.getvalue()


def write_audio(path: Path, waveform: np.ndarray) -> None:
    """Write (2, samples) at 48 kHz in the format of the suffix, whole or not at all."""
    content = audio_bytes(waveform, path.suffix.lower().removeprefix("."))
    with written_whole(path) as file:
        file.write(content)
