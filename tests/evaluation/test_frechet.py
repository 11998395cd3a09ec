"""The Fréchet distance against a second implementation, closed forms, and what is said of its error."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from acestep_ray.evaluation import frechet
from acestep_ray.evaluation.frechet import frechet_distance, score_frechet


def by_matrix_root(x: np.ndarray, y: np.ndarray) -> float:
    """The textbook's formula."""
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = sqrtm(cov_x @ cov_y)
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cov_x + cov_y - 2 * root.real)


def correlated(random: np.random.Generator, n: int, d: int) -> np.ndarray:
    return random.standard_normal((n, d)) @ random.standard_normal((d, d)) + random.standard_normal(d)


def with_moments(mean: np.ndarray, covariance: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Embeddings (n, d) that have exactly this mean and covariance."""
    random = np.random.default_rng(seed).standard_normal((n, len(mean)))
    random -= random.mean(0)
    white = random @ np.linalg.inv(np.linalg.cholesky(np.cov(random, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def some_covariance(d: int, seed: int) -> np.ndarray:
    factor = np.random.default_rng(seed).standard_normal((d, 2 * d))
    return factor @ factor.T / (2 * d)


@pytest.mark.parametrize(
    ("n", "m", "d"), [(200, 300, 8), (50, 60, 40), (41, 500, 40), (500, 9, 8), (400, 400, 64), (3, 7, 2)]
)
def test_it_is_that_of_the_matrix_root(n, m, d):
    random = np.random.default_rng(n + m + d)
    x, y = correlated(random, n, d), correlated(random, m, d)
    assert frechet_distance(x, y) == pytest.approx(by_matrix_root(x, y), rel=1e-8)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize(("n", "m", "d"), [(20, 30, 40), (5, 200, 64), (200, 6, 64), (2, 2, 16)])
def test_it_is_that_of_the_matrix_root_with_fewer_embeddings_than_dimensions(n, m, d):
    random = np.random.default_rng(n + m + d)
    x, y = correlated(random, n, d), correlated(random, m, d)
    # The second implementation takes roots of eigenvalues that are 0 but for rounding.
    assert frechet_distance(x, y) == pytest.approx(by_matrix_root(x, y), rel=1e-4)


@pytest.mark.parametrize(("n", "d"), [(100, 8), (8, 100), (1000, 64)])
def test_equal_sets_are_not_apart(n, d):
    x = 100 * correlated(np.random.default_rng(n), n, d)
    scale = np.square(x - x.mean(0)).sum() / (n - 1)
    assert 0 <= frechet_distance(x, x[::-1]) < 1e-12 * scale


@pytest.mark.parametrize(("n", "d"), [(100, 8), (8, 100)])
def test_a_shifted_set_is_apart_by_the_square_of_the_shift(n, d):
    random = np.random.default_rng(n)
    x, shift = correlated(random, n, d), random.standard_normal(d)
    assert frechet_distance(x, x + shift) == pytest.approx(shift @ shift, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(100, 8), (8, 100)])
def test_a_scaled_set_is_apart_by_the_change_of_its_spread_and_mean(n, d):
    x = correlated(np.random.default_rng(n), n, d)
    spread = np.square(x - x.mean(0)).sum() / (n - 1)
    expected = 4 * np.square(x.mean(0)).sum() + 4 * spread  # (3 - 1)² of both
    assert frechet_distance(x, 3 * x) == pytest.approx(expected, rel=1e-9)


def test_diagonal_covariances_are_apart_by_their_deviations():
    random = np.random.default_rng(0)
    s, t = random.uniform(0.1, 3, 12), random.uniform(0.1, 3, 12)
    x, y = (with_moments(np.zeros(12), np.diag(v**2), 60, seed) for seed, v in enumerate((s, t)))
    assert frechet_distance(x, y) == pytest.approx(np.square(s - t).sum(), rel=1e-9)


def test_covariances_that_do_not_commute_are_apart_by_the_trace_of_the_root():
    a, b = some_covariance(6, 1), some_covariance(6, 2)
    assert not np.allclose(a @ b, b @ a)
    x, y = with_moments(np.zeros(6), a, 30), with_moments(np.zeros(6), b, 50, seed=3)
    root = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    assert frechet_distance(x, y) == pytest.approx(np.trace(a + b) - 2 * root, rel=1e-9)


def test_float16_embeddings_are_computed_in_float64():
    random = np.random.default_rng(0)
    x, y = (
        (1000 + correlated(random, 50, 8)).astype(np.float16),
        (1000 + correlated(random, 50, 8)).astype(np.float16),
    )
    assert frechet_distance(x, y) == frechet_distance(x.astype(np.float64), y.astype(np.float64))


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "two embeddings"),
        (np.zeros((0, 3)), np.zeros((5, 3)), "two embeddings"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "not finite"),
        (np.zeros((5, 3)), np.full((5, 3), np.inf), "not finite"),
        (np.zeros((5, 3)), np.zeros((5, 4)), r"\(5, 3\) and \(5, 4\)"),
    ],
)
def test_what_has_no_distance_is_refused(x, y, said):
    with pytest.raises(ValueError, match=said):
        frechet_distance(x, y)


# --- FAD∞ and its interval ---

DIM, WINDOWS = 16, 6
SPREAD = 1 / np.sqrt(np.arange(1, DIM + 1))
SHIFT = np.where(np.arange(DIM) < 4, 0.5 * SPREAD, 0)
WIDER = np.where(np.arange(DIM) % 2, 1.3, 1.0)
TRUTH = np.square(SHIFT).sum() + np.square(SPREAD * (WIDER - 1)).sum()


def songs(random: np.random.Generator, count: int, mean=0.0, scale=1.0) -> list[np.ndarray]:
    """Songs whose windows are alike."""
    common = random.standard_normal((count, 1, DIM)) + random.standard_normal((count, WINDOWS, DIM))
    return list(common / np.sqrt(2) * SPREAD * scale + mean)


@pytest.mark.parametrize(("made", "reference"), [(30, 30), (20, 80), (60, 25)])
def test_fad_infinity_is_nearer_to_the_truth(made, reference, monkeypatch):
    monkeypatch.setattr(frechet, "BOOTSTRAPS", 2)
    random = np.random.default_rng(made)
    scores = [
        score_frechet(songs(random, made, SHIFT, WIDER), songs(random, reference), seed=trial)
        for trial in range(30)
    ]
    plain, infinity = (
        np.mean([getattr(s, name) for s in scores]) - TRUTH for name in ("distance", "infinity")
    )
    assert plain > 0.1
    assert abs(infinity) < plain / 3


def test_equal_distributions_come_to_nothing(monkeypatch):
    monkeypatch.setattr(frechet, "BOOTSTRAPS", 2)
    random = np.random.default_rng(0)
    scores = [score_frechet(songs(random, 30), songs(random, 30)) for _ in range(8)]
    assert np.mean([score.infinity for score in scores]) < 0.25 * np.mean(
        [score.distance for score in scores]
    )


def test_the_interval_holds_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(frechet, "BOOTSTRAPS", 80)
    random = np.random.default_rng(1)
    held, scores = 0, []
    for _ in range(30):
        score = score_frechet(songs(random, 25, SHIFT, WIDER), songs(random, 25))
        assert score.low <= score.infinity <= score.high
        held += score.low <= TRUTH <= score.high
        scores.append(score)
    assert held >= 26
    # And not by being endless: 95 % of a normal distribution are 4 deviations wide.
    deviation = np.std([score.infinity for score in scores])
    assert np.mean([score.high - score.low for score in scores]) < 6 * deviation


def test_what_the_estimate_mostly_adds_is_taken_off_at_both_ends(monkeypatch):
    monkeypatch.setattr(frechet, "BOOTSTRAPS", 101)
    estimates = iter([10.0, *(2.0 + number / 100 for number in range(101))])
    monkeypatch.setattr(frechet, "_line", lambda points: (next(estimates), 1.0))
    monkeypatch.setattr(frechet, "frechet_distance", lambda x, y: 1.0)
    random = np.random.default_rng(0)
    # Of sets that are 1 apart the estimate says 2 to 3, so what it says is 10 is 8 to 9.
    score = score_frechet(songs(random, 5), songs(random, 5))
    assert (score.infinity, score.low, score.high) == pytest.approx((10.0, 8.025, 8.975))


def test_songs_and_not_windows_are_what_is_drawn(monkeypatch):
    monkeypatch.setattr(frechet, "BOOTSTRAPS", 40)
    random = np.random.default_rng(2)
    made, reference = songs(random, 12, SHIFT), songs(random, 12)
    copied = (
        [np.repeat(song, 10, axis=0) for song in made],
        [np.repeat(song, 10, axis=0) for song in reference],
    )
    few, many = score_frechet(made, reference), score_frechet(*copied)
    # Ten times as many windows that say nothing new do not make it surer.
    assert many.high - many.low > 0.5 * (few.high - few.low)


@pytest.mark.parametrize(("made", "reference"), [(1, 30), (30, 1), (3, 3)])
def test_too_few_songs_have_a_distance_and_no_interval(made, reference):
    random = np.random.default_rng(3)
    score = score_frechet(songs(random, made), songs(random, reference))
    assert score.distance > 0
    assert (score.infinity, score.low, score.high, score.points) == (None, None, None, [])


def test_the_same_songs_have_the_same_score():
    random = np.random.default_rng(4)
    made, reference = songs(random, 6), songs(random, 6)
    assert score_frechet(made, reference) == score_frechet(made, reference)
