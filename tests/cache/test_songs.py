from __future__ import annotations

from dataclasses import fields, replace

import pytest

from acestep_ray.cache.songs import Recipe, Settings, Song
from tests.cache.conftest import (
    RECIPE,
    SETTINGS,
    song,
)


def fingerprint(one: Song, recipe: Recipe = RECIPE, audio: str = "a", speaker: str | None = None) -> str:
    return recipe.row_fingerprint(one, audio, speaker)


@pytest.mark.parametrize(
    "changed",
    [
        song("b"),
        song(tags=["pop"]),
        song(tags=["slow", "pop"]),
        song(recaption={}),
        song(recaption={"descriptive": "a pop song"}),
        song(lyrics="[verse]\nhello worlds"),
        song(language="de"),
    ],
)
def test_a_change_of_text_changes_the_fingerprint(changed):
    assert fingerprint(changed) != fingerprint(song())


@pytest.mark.parametrize(
    "change",
    [
        {"tag_shuffles": 4},
        {"ssl_frame_stride": 2},
        {"seed": 1},
        {"speaker_dim": 6},
        {"window": "random"},
        {"window_seconds": 30.0},
        {"loudness_lufs": -14.0},
        {"features": ("latents", "text")},
        {"precision": "16"},
        {"resampler": "another"},
    ],
)
def test_a_change_of_a_setting_changes_the_fingerprint(change):
    assert fingerprint(song(), replace(RECIPE, settings=replace(SETTINGS, **change))) != fingerprint(song())


def test_every_setting_is_in_the_fingerprint():
    # A setting that is added has to be added to the test above.
    assert {f.name for f in fields(Settings)} == {
        "tag_shuffles", "ssl_frame_stride", "seed", "speaker_dim", "window", "window_seconds", "loudness_lufs",
        "features", "precision", "resampler",
    }  # fmt: skip


def test_a_change_of_a_model_or_a_file_changes_the_fingerprint():
    other_model = Recipe(SETTINGS, {**RECIPE.models, "codec": "c1"})
    fewer_models = Recipe(SETTINGS, {"codec": "c0"})
    fingerprints = [
        fingerprint(song()),
        fingerprint(song(), other_model),
        fingerprint(song(), fewer_models),
        fingerprint(song(), audio="b"),
        fingerprint(song(), speaker="s"),
    ]
    assert len(set(fingerprints)) == len(fingerprints)


def test_where_the_files_lie_leaves_the_fingerprint_alone():
    assert fingerprint(song(filename="x.flac", speaker_path="y.npy")) == fingerprint(song())


def test_a_row_without_optional_columns_is_a_song():
    assert Song.from_row({"keys": "a", "filename": "a.wav"}) == Song("a", "a.wav", [], {}, "", "", "")
