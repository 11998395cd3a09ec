"""Whether generated music repeats songs that a model was trained on: each window's nearest window among theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from acestep_ray.evaluation.embeddings import EmbeddedSong

CHANCE = 0.05
"""Share of windows beyond the mark that music has which copies nothing."""


@dataclass(frozen=True)
class Nearest:
    """A song's windows and the training windows that they are most like."""

    song: str
    similarities: np.ndarray
    """Cosine of each window and its nearest one, (windows,)."""
    nearest_songs: list[str]
    """Whose window that is."""
    nearest_seconds: list[float]
    """Where it begins in that song."""

    @property
    def closest(self) -> int:
        """The window that is most like a training song."""
        return int(self.similarities.argmax())


class TrainingWindows:
    """Windows of the training songs, to be searched.

    Their mean is taken off every embedding: it is the largest part of each, the same for all music, and would make any
    two windows look alike. Lengths then do not count.
    """

    def __init__(self, songs: Sequence[EmbeddedSong]):
        """Raises ValueError where all windows together are fewer than two: nothing would be left of them."""
        vectors = np.concatenate([song.vectors for song in songs])
        if len(vectors) < 2:
            raise ValueError("one window alone is its own mean")
        self._mean = vectors.mean(axis=0, dtype=np.float64)
        self._directions = self._direct(vectors)
        self._songs = [song.name for song in songs for _ in song.vectors]
        self._ids = np.array([song.content for song in songs for _ in song.vectors])
        self._seconds = [start for song in songs for start in song.starts]

    def nearest(self, song: EmbeddedSong, *, but_itself: bool = False) -> Nearest | None:
        """The nearest training window of each of a song's windows that do not overlap.

        `but_itself` looks only at songs with another content; None where there is none.
        """
        similarity = self._direct(song.apart) @ self._directions.T
        if but_itself:
            similarity[:, self._ids == song.content] = -np.inf
        places = similarity.argmax(axis=1)
        similarities = similarity[np.arange(len(places)), places]
        if np.isneginf(similarities).any():
            return None
        return Nearest(
            song.name,
            similarities.astype(np.float64).clip(-1, 1),
            [self._songs[place] for place in places],
            [self._seconds[place] for place in places],
        )

    def _direct(self, vectors: np.ndarray) -> np.ndarray:
        centred = vectors - self._mean
        lengths = np.linalg.norm(centred, axis=1, keepdims=True)
        return (centred / np.maximum(lengths, np.finfo(np.float64).tiny)).astype(np.float32)


def baseline(training: TrainingWindows, songs: Sequence[EmbeddedSong]) -> list[Nearest]:
    """What real music scores: songs against the training songs, none against itself."""
    found = (training.nearest(song, but_itself=True) for song in songs)
    return [nearest for nearest in found if nearest is not None]


def mark(real: Sequence[Nearest]) -> float:
    """The similarity that `CHANCE` of the real music's windows exceed."""
    return float(np.quantile(np.concatenate([one.similarities for one in real]), 1 - CHANCE))
