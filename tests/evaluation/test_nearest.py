"""Nearest windows among training songs: copies are found, and real music says what is usual."""

from __future__ import annotations

import numpy as np
import pytest

from acestep_ray.evaluation.embeddings import EmbeddedSong
from acestep_ray.evaluation.nearest import TrainingWindows, baseline, mark

DIM = 24
COMMON = 10 * np.ones(DIM)
"""What all music shares, and much larger than what differs."""


def song(name: str, windows: int = 7) -> EmbeddedSong:
    random = np.random.default_rng(list(name.encode()))
    vectors = (COMMON + random.standard_normal((windows, DIM))).astype(np.float32)
    return EmbeddedSong(name, f"sha of {name}", vectors, [2.5 * i for i in range(windows)])


TRAINED = [song(f"trained {i}") for i in range(20)]


def test_a_copied_song_is_found_with_the_place_it_was_copied_from():
    copy = EmbeddedSong("made", "other bytes", TRAINED[3].vectors[2:6], [0.0, 2.5, 5.0, 7.5])
    nearest = TrainingWindows(TRAINED).nearest(copy)
    assert nearest.similarities == pytest.approx([1, 1], abs=1e-6)
    assert nearest.nearest_songs == ["trained 3", "trained 3"]
    assert nearest.nearest_seconds == [5.0, 10.0]


def test_other_songs_are_less_alike_than_a_copy_although_all_music_is_alike():
    other = song("made", windows=40)
    plain = np.array(
        [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in other.vectors for b in TRAINED[0].vectors]
    )
    assert plain.min() > 0.95
    assert TrainingWindows(TRAINED).nearest(other).similarities.max() < 0.9


def test_louder_features_of_the_same_direction_are_the_same():
    windows = TrainingWindows(TRAINED)
    mean = np.concatenate([s.vectors for s in TRAINED]).mean(0)
    louder = EmbeddedSong("made", "x", (mean + 3 * (TRAINED[0].vectors - mean)).astype(np.float32), [0.0] * 7)
    assert windows.nearest(louder).similarities.min() == pytest.approx(1, abs=1e-5)


def test_windows_that_overlap_are_not_asked_twice():
    assert len(TrainingWindows(TRAINED).nearest(song("made", windows=9)).similarities) == 5


def test_no_song_is_its_own_neighbour_in_the_baseline_not_even_under_another_name():
    twin = EmbeddedSong("twin", TRAINED[0].content, TRAINED[0].vectors, TRAINED[0].starts)
    found = baseline(TrainingWindows([*TRAINED, twin]), TRAINED)
    assert len(found) == 20
    assert max(one.similarities.max() for one in found) < 0.9
    assert all(one.song not in one.nearest_songs and "twin" not in found[0].nearest_songs for one in found)


def test_one_song_alone_has_no_baseline():
    assert baseline(TrainingWindows(TRAINED[:1]), TRAINED[:1]) == []


def test_one_window_alone_is_refused():
    with pytest.raises(ValueError, match="its own mean"):
        TrainingWindows([song("a", windows=1)])


def test_one_window_in_twenty_of_real_music_is_beyond_the_mark_and_all_of_a_copy():
    windows = TrainingWindows(TRAINED)
    real = baseline(windows, [song(f"held out {i}", windows=41) for i in range(10)])
    limit = mark(real)
    beyond = np.concatenate([one.similarities for one in real]) > limit
    assert beyond.mean() == pytest.approx(0.05, abs=0.01)
    others = windows.nearest(song("made", windows=401)).similarities
    assert (others > limit).mean() < 0.12
    assert (windows.nearest(TRAINED[5]).similarities > limit).all()
