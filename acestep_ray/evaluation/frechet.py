"""How far two sets of music are apart: the Fréchet distance of their embeddings, with what its figure is worth.

The distance is that of Gaussians with the sets' means and covariances (Dowson and Landau, 1982; for music Kilgour et
al. 2019, arXiv:1812.08466). Of small sets it comes out too large. FAD∞ (Gui et al. 2024, arXiv:2311.01616; for pictures
Chong and Forsyth 2020, arXiv:1911.07023) measures it over fewer and fewer songs and follows the line back to infinitely
many.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAPS = 200
CONFIDENCE = 0.95
LEAST_SONGS = 4
"""Of either set, with which FAD∞ and an interval can be had."""

_SIZES = 8
_SUBSETS = 4
"""Random ones of each size, whose mean is a point of the line."""
_SMALLEST_SHARE = 0.5


@dataclass(frozen=True)
class FrechetScore:
    """The distance of a set of songs from a reference."""

    distance: float
    """Of the sets as they are."""
    infinity: float | None
    """FAD∞; None where there are too few songs."""
    low: float | None
    high: float | None
    """Interval that holds the true distance in 95 of 100 evaluations; of few windows FAD∞ itself may lie above it."""
    r_squared: float | None
    """How much of the points' spread the line explains."""
    points: list[tuple[float, float]]
    """The line's points: 1/windows of one set + 1/windows of the other, and the mean distance there."""


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of embeddings (n, d) and (m, d), in float64.

    With Σ = AᵀA, where A holds the centred embeddings over √(n − 1), the trace of the root is the sum of the singular
    values of A₁A₂ᵀ. No covariance is formed and no root of a matrix taken, so that fewer embeddings than dimensions
    cost no accuracy. Raises ValueError for fewer than two embeddings, other shapes, and numbers that are not finite.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"embeddings of shapes {first.shape} and {second.shape} cannot be compared")
    if min(len(first), len(second)) < 2:
        raise ValueError("a covariance needs two embeddings or more")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("the embeddings are not finite")
    (mean_1, root_1), (mean_2, root_2) = _mean_and_root(first), _mean_and_root(second)
    if min(len(first), len(second)) > first.shape[1]:
        # RᵀR is AᵀA too, and smaller.
        root_1, root_2 = _triangle(root_1), _triangle(root_2)
    shared = np.linalg.svd(root_1 @ root_2.T, compute_uv=False).sum()
    distance = (
        np.square(mean_1 - mean_2).sum() + np.square(root_1).sum() + np.square(root_2).sum() - 2 * shared
    )
    return max(float(distance), 0.0)  # rounding can make that of equal sets negative


def score_frechet(
    made: Sequence[np.ndarray], reference: Sequence[np.ndarray], *, seed: int = 0
) -> FrechetScore:
    """The distance of songs from reference songs, each (windows, d), with FAD∞ and its interval.

    Songs are drawn and left out whole: windows of one song are alike, and count as one for what is not known. Raises
    what `frechet_distance` raises.
    """
    distance = frechet_distance(np.concatenate(made), np.concatenate(reference))
    if min(len(made), len(reference)) < LEAST_SONGS:
        return FrechetScore(distance, None, None, None, None, [])
    random = np.random.default_rng(seed)
    points = _points(made, reference, np.linspace(_SMALLEST_SHARE, 1, _SIZES), _SUBSETS, random)
    infinity, r_squared = _line(points)
    # What the same estimate makes of songs drawn from these, whose distance is known: `distance`.
    errors = [
        _line(_points(_drawn(made, random), _drawn(reference, random), (_SMALLEST_SHARE, 1), 1, random))[0]
        - distance
        for _ in range(BOOTSTRAPS)
    ]
    tail = (1 - CONFIDENCE) / 2
    most, least = np.quantile(errors, [1 - tail, tail])
    return FrechetScore(
        distance=distance,
        infinity=max(infinity, 0.0),
        low=max(infinity - float(most), 0.0),
        high=max(infinity - float(least), 0.0),
        r_squared=r_squared,
        points=points,
    )


def _mean_and_root(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean (d,), and A (n, d) of which AᵀA is the covariance."""
    mean = embeddings.mean(axis=0)
    return mean, (embeddings - mean) / np.sqrt(len(embeddings) - 1)


def _triangle(root: np.ndarray) -> np.ndarray:
    """R of the QR decomposition."""
    return np.linalg.qr(root, mode="r")  # type: ignore[return-value]  # numpy's stub takes every mode for "reduced"


def _points(
    made: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    shares: Iterable[float],
    subsets: int,
    random: np.random.Generator,
) -> list[tuple[float, float]]:
    """Mean distances of random subsets of the songs, by the sum of their inverse sizes.

    Gui et al. make the one set smaller, for their reference is large. Here it may be as small as what is measured, and
    its share of the error goes the same way when both are made smaller.
    """
    points = []
    sizes = dict.fromkeys((_size(made, share), _size(reference, share)) for share in shares)
    for n, m in sizes:
        is_whole = (n, m) == (len(made), len(reference))
        inverse, distances = [], []
        for _ in range(1 if is_whole else subsets):
            x, y = (_subset(songs, size, random) for songs, size in ((made, n), (reference, m)))
            inverse.append(1 / len(x) + 1 / len(y))
            distances.append(frechet_distance(x, y))
        points.append((float(np.mean(inverse)), float(np.mean(distances))))
    return points


def _size(songs: Sequence[np.ndarray], share: float) -> int:
    return max(2, round(share * len(songs)))


def _subset(songs: Sequence[np.ndarray], size: int, random: np.random.Generator) -> np.ndarray:
    chosen = range(len(songs)) if size == len(songs) else random.permutation(len(songs))[:size]
    return np.concatenate([songs[i] for i in chosen])


def _drawn(songs: Sequence[np.ndarray], random: np.random.Generator) -> list[np.ndarray]:
    """As many songs, drawn with replacement."""
    return [songs[i] for i in random.integers(0, len(songs), len(songs))]


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where the line through the points meets 0, and its R²."""
    x, y = np.array(points).T
    slope, at_zero = np.polyfit(x, y, 1)
    spread = np.square(y - y.mean()).sum()
    left = np.square(y - at_zero - slope * x).sum()
    return float(at_zero), float(1 - left / spread) if spread > 0 else 1.0
