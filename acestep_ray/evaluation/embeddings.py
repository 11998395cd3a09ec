"""Songs as vectors: windows of 5 s in the features of the SSL encoders.

A window's vector is the mean over time of the encoder's last hidden state, the features that training is held against.
MERT has heard its training music in pieces of 5 s, and `SSLEncoder` gives it just these; 5 s are about two bars, long
enough for what is played and not only for a timbre. The encoders bring every song to the same loudness, which is judged
on its own (`sound.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from acestep_ray.data.audio import SAMPLE_RATE, AudioError, AudioFile, audio_sha256, to_training_audio
from acestep_ray.data.audio_formats import AUDIO_SUFFIXES, TORCHCODEC_SUFFIXES
from acestep_ray.errors import InputError
from acestep_ray.evaluation.notes import Notes
from acestep_ray.models.ssl import SSLEncoder
from acestep_ray.terminal import Progress

WINDOW_SECONDS = 5.0
HOP_SECONDS = WINDOW_SECONDS / 2
"""Between the beginnings of windows, half of which overlap: no copied passage is far from one."""
MOST_SECONDS = 240.0
"""Of a song that are embedded."""


@dataclass(frozen=True)
class EmbeddedSong:
    """A song's windows in the features of one encoder."""

    name: str
    content: str
    """SHA-256 of its file."""
    vectors: np.ndarray
    """(windows, dim) float32."""
    starts: list[float]
    """Seconds at which each window begins."""

    @property
    def apart(self) -> np.ndarray:
        """The vectors of the windows that do not overlap, (about half as many, dim)."""
        return self.vectors[:: round(WINDOW_SECONDS / HOP_SECONDS)]


def find_audio(directory: str | Path, flag: str) -> list[Path]:
    """The audio files of a folder and its subfolders, by name. Raises InputError where there is none."""
    folder = Path(directory)
    if not folder.is_dir():
        raise InputError("no such folder", where=f"{flag} {directory}")
    suffixes = AUDIO_SUFFIXES | TORCHCODEC_SUFFIXES
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not found:
        raise InputError("there is no audio in this folder", where=f"{flag} {directory}")
    return found


def embed_files(
    paths: Sequence[Path], root: Path, encoders: Mapping[str, SSLEncoder], notes: Notes
) -> dict[str, list[EmbeddedSong]]:
    """The songs in each encoder's features; their names are relative to `root`.

    A file that cannot be read, and a song whose features are not finite, is told and left out, of all encoders alike.
    """
    songs: dict[str, list[EmbeddedSong]] = {name: [] for name in encoders}
    for path in Progress(f"embedding {root.name}", len(paths), "songs").over(paths):
        name = path.relative_to(root).as_posix()
        try:
            embedded = embed_song(name, audio_sha256(path), read_wave(path), encoders, notes)
        except AudioError as error:
            notes.warn(f"{name} is left out: {error}")
            continue
        for encoder, song in embedded.items():
            songs[encoder].append(song)
    return songs


def embed_song(
    name: str, content: str, wave: np.ndarray, encoders: Mapping[str, SSLEncoder], notes: Notes
) -> dict[str, EmbeddedSong]:
    """A song, (2, n) at 48 kHz, in each encoder's features; empty and told where any of them are not finite."""
    embedded = {
        encoder: EmbeddedSong(name, content, *embed(wave, model)) for encoder, model in encoders.items()
    }
    broken = [encoder for encoder, song in embedded.items() if not np.isfinite(song.vectors).all()]
    if broken:
        notes.warn(f"{name} is left out: its {' and '.join(broken)} embedding is not finite")
        return {}
    return embedded


def read_wave(path: Path) -> np.ndarray:
    """The first 240 s of an audio file as (2, n) at 48 kHz, not padded. Raises AudioError."""
    with AudioFile(path) as audio:
        samples, rate = audio.read(0.0, MOST_SECONDS), audio.sample_rate
    wave = to_training_audio(samples, rate, MOST_SECONDS)
    return wave[:, : round(samples.shape[1] * SAMPLE_RATE / rate)]


def embed(wave: np.ndarray, encoder: SSLEncoder) -> tuple[np.ndarray, list[float]]:
    """Vectors (windows, dim) of a wave (2, n) at 48 kHz, and where each window begins, in seconds."""
    features = encoder.encode(torch.from_numpy(wave)).double()
    seconds = wave.shape[1] / SAMPLE_RATE
    frames_per_second = len(features) / seconds
    # The mean of any window is a difference of two sums.
    sums = torch.cat([features.new_zeros(1, features.shape[1]), features.cumsum(dim=0)])
    vectors, starts = [], list(window_starts(seconds))
    for start in starts:
        first = round(start * frames_per_second)
        last = max(first + 1, min(round((start + WINDOW_SECONDS) * frames_per_second), len(features)))
        vectors.append((sums[last] - sums[first]) / (last - first))
    return torch.stack(vectors).float().cpu().numpy(), starts


def window_starts(seconds: float) -> Iterator[float]:
    """Where the windows of a song begin: as long as half a window is left of it, and one at least."""
    yield 0.0
    start = HOP_SECONDS
    while start + WINDOW_SECONDS / 2 <= seconds:
        yield start
        start += HOP_SECONDS
