"""Sound as a page holds it: MP3, the one small format that every browser plays."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

import numpy as np

from acestep_ray.errors import InputError

MEDIA_TYPE = "audio/mpeg"
# LAME's variable bitrate V4: 130 to 165 kbit/s for stereo.
_COMPRESSION = 0.4
_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


@dataclass(frozen=True)
class Sound:
    """The beginning of an audio file, for a page."""

    content: bytes
    """An MP3 file."""
    seconds: float
    whole_seconds: float | None
    """Length of the file that it is the beginning of; None where that is not known."""

    @property
    def is_cut(self) -> bool:
        """Whether there is more of it."""
        return self.whole_seconds is None or self.whole_seconds > self.seconds + 0.1


def read_sound(path: str | os.PathLike[str], max_seconds: float) -> Sound:
    """The first `max_seconds` of any audio file that training reads. Raises InputError where it cannot be read."""
    from acestep_ray.data.audio import AudioError, AudioFile

    try:
        with AudioFile(path) as audio:
            samples, rate = audio.read(0.0, max_seconds), audio.sample_rate
            whole_seconds = audio.duration_seconds
    except AudioError as error:
        raise InputError(f"there is no sound that can be played ({error})", where=os.fspath(path)) from None
    return Sound(_mp3(samples, rate), samples.shape[1] / rate, whole_seconds)


def _mp3(samples: np.ndarray, sample_rate: int) -> bytes:
    """Samples (channels, n) within [−1, 1]; of more than two channels the first two are taken."""
    import soundfile
    import soxr

    sound = samples[:2].T
    if sample_rate not in _MP3_RATES:
        sound, sample_rate = soxr.resample(sound, sample_rate, _MP3_RATES[-1]), _MP3_RATES[-1]
    file = io.BytesIO()
    soundfile.write(
        file,
        np.clip(sound, -1.0, 1.0),
        sample_rate,
        format="MP3",
        compression_level=_COMPRESSION,
        bitrate_mode="VARIABLE",
    )
    return file.getvalue()
