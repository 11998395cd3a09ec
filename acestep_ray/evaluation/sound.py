"""Whether a piece of music is sane as sound: how loud, how much of it clipped or silent, how bright."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np

from acestep_ray.data.loudness import SAMPLE_RATE, integrated_loudness

LOUDNESS_BOUNDS = (-30.0, -5.0)
"""LUFS between which released music lies, with room on both sides."""
CLIPPED_BOUND = 0.001
"""Share of clipped samples from which it is heard."""
SILENCE_BOUND = 0.3
CENTROID_BOUNDS = (300.0, 8000.0)
"""Hz. Below, music sounds as through a wall; above are hiss and noise (white noise has 12,000 Hz)."""

_FULL_SCALE = 1 - 2.0**-14  # within a step of 16-bit audio of the largest value, in either direction
_SHORTEST_FLAT = 3
_SILENT_POWER = 1e-6  # -60 dBFS
_SILENCE_FRAME = SAMPLE_RATE // 20  # 50 ms
_SPECTRUM_FRAME = 4096
_FRAMES_AT_ONCE = 256


@dataclass(frozen=True)
class SoundScore:
    """Figures of a piece of music, and what of them is out of bounds."""

    seconds: float
    loudness_lufs: float | None
    """Integrated loudness; None where it is too short or too quiet to be measured."""
    peak: float
    """Largest magnitude; 1 is full scale."""
    clipped: float
    """Share of samples that are clipped."""
    silence: float
    """Share of the time that is below -60 dBFS."""
    centroid_hz: float | None
    """Mean spectral centroid of what is not silent."""
    flags: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, float | None]:
        """The numbers by name."""
        return {name: value for name, value in asdict(self).items() if name != "flags"}


def score_sound(wave: np.ndarray) -> SoundScore:
    """Judge a wave (channels, n) at 48 kHz with n ≥ 1, in [-1, 1]."""
    loudness = integrated_loudness(wave)
    clipped, silence, centroid = clipped_share(wave), silent_share(wave), spectral_centroid(wave)
    flags = []
    if silence > SILENCE_BOUND:
        flags.append("silent")
    if loudness is not None and loudness < LOUDNESS_BOUNDS[0]:
        flags.append("quiet")
    if loudness is not None and loudness > LOUDNESS_BOUNDS[1]:
        flags.append("loud")
    if clipped > CLIPPED_BOUND:
        flags.append("clipped")
    if centroid is not None and centroid < CENTROID_BOUNDS[0]:
        flags.append("dull")
    if centroid is not None and centroid > CENTROID_BOUNDS[1]:
        flags.append("shrill")
    return SoundScore(
        seconds=wave.shape[1] / SAMPLE_RATE,
        loudness_lufs=loudness,
        peak=float(np.abs(wave).max()),
        clipped=clipped,
        silence=silence,
        centroid_hz=centroid,
        flags=flags,
    )


def clipped_share(wave: np.ndarray) -> float:
    """Share of the samples (channels, n) that are cut off: full scale three times or more in a row.

    A sample or two at full scale are the peaks of music that was brought to it, not clipping.
    """
    clipped = 0
    for channel in wave:
        for side in (channel >= _FULL_SCALE, channel <= -_FULL_SCALE):
            steps = np.diff(side.astype(np.int8), prepend=0, append=0)
            lengths = np.flatnonzero(steps == -1) - np.flatnonzero(steps == 1)
            clipped += int(lengths[lengths >= _SHORTEST_FLAT].sum())
    return clipped / wave.size


def silent_share(wave: np.ndarray) -> float:
    """Share of the frames of 50 ms whose power, mean of all channels (channels, n), is below -60 dBFS."""
    power = _frame_power(wave)
    return float((power < _SILENT_POWER).mean())


def _frame_power(wave: np.ndarray) -> np.ndarray:
    """Mean square of each frame of 50 ms; the last may be shorter."""
    starts = np.arange(0, wave.shape[1], _SILENCE_FRAME)
    squares = np.square(wave, dtype=np.float64).mean(axis=0)
    return np.add.reduceat(squares, starts) / np.diff(starts, append=wave.shape[1])


def spectral_centroid(wave: np.ndarray) -> float | None:
    """Mean over time of the magnitude spectrum's centre of gravity, in Hz, of (channels, n) mixed to mono.

    Frames of 85 ms below -60 dBFS do not count; None where there are no others.
    """
    mono = wave.mean(axis=0, dtype=np.float64)
    size = min(_SPECTRUM_FRAME, len(mono))
    frames = mono[: len(mono) // size * size].reshape(-1, size)
    frames = frames[np.square(frames).mean(axis=1) >= _SILENT_POWER]
    if not len(frames):
        return None
    window = np.hanning(size + 2)[1:-1]
    frequencies = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    centroids = []
    for first in range(0, len(frames), _FRAMES_AT_ONCE):
        magnitude = np.abs(np.fft.rfft(frames[first : first + _FRAMES_AT_ONCE] * window, axis=1))
        centroids.append(magnitude @ frequencies / magnitude.sum(axis=1))
    return float(np.concatenate(centroids).mean())
