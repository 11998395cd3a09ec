from __future__ import annotations

from dataclasses import asdict, fields, replace

import pytest

from acestep_ray.cache.lyric_warnings import has_unusable_lyrics, lyric_warnings
from acestep_ray.cache.schema import FORMAT_VERSION, hash_of
from acestep_ray.cache.songs import (
    MAX_SILENT_FRACTION,
    FileVersions,
    Recipe,
    Reject,
    Settings,
    Song,
    encode_lyrics,
)
from tests.cache.conftest import (
    RECIPE,
    SETTINGS,
    decoded,
    song,
)

THAI, HEBREW = "คืนนี้ฝนตกหนัก", "כל בני האדם"
VERSIONS = FileVersions("1000-1", None)


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


def test_ordinary_lyrics_have_the_fingerprint_that_they_had():
    row = {"keys": "a", "filename": "a.wav", "norm_lyrics": "[verse]\nhello (oh) world", "language": "EN"}
    one = Song.from_row(row)
    assert (one.lyrics, one.language) == (row["norm_lyrics"], "EN")
    assert RECIPE.row_fingerprint(one, "a", None) == (
        "b5633a6512ebdece0d98273393cc6bc871b1e4ee083862112a5cf7133cb411e3"
    )


def test_times_are_no_part_of_a_songs_lyrics():
    row = {"keys": "a", "filename": "a.wav", "norm_lyrics": "[00:12.34]hello\n[00:13.34]world"}
    assert Song.from_row(row).lyrics == "hello\nworld"


@pytest.mark.parametrize("lyrics", [THAI, f"[verse]\n{THAI}\nla"])
def test_a_song_with_lyrics_of_unknown_tokens_is_rejected_with_the_figure(lyric_tokenizer, lyrics):
    reject = encode_lyrics(decoded(song(lyrics=lyrics)), lyric_tokenizer, RECIPE)
    assert isinstance(reject, Reject)
    assert reject.reason == "bad_lyrics"
    assert " % of the lyrics' tokens are unknown to the model (Thai)" in reject.message
    assert "--keep_unknown_lyrics" in reject.message
    assert has_unusable_lyrics(lyrics, "", lyric_tokenizer)


def test_a_flag_keeps_such_songs_and_changes_no_row(lyric_tokenizer):
    keeping = replace(RECIPE, keep_unknown_lyrics=True)
    columns = encode_lyrics(decoded(song(lyrics=THAI)), lyric_tokenizer, keeping)
    assert columns["lyric_ids"] == lyric_tokenizer.encode(THAI).ids
    assert fingerprint(song(), keeping) == fingerprint(song())
    # Its rejects are tried again.
    assert keeping.reject_fingerprint(song(), VERSIONS) != RECIPE.reject_fingerprint(song(), VERSIONS)


@pytest.mark.parametrize("language", ["English", "eng", "jp", "unknown", "instrumental", "N/A"])
def test_a_language_by_any_name_is_used_and_its_old_reject_tried_again(lyric_tokenizer, language):
    assert isinstance(encode_lyrics(decoded(song(language=language)), lyric_tokenizer, RECIPE), dict)
    one = song(language=language)
    assert RECIPE.reject_fingerprint(one, VERSIONS) != hash_of_old_reject(RECIPE, one)


def hash_of_old_reject(recipe: Recipe, one: Song) -> str:
    text = [one.key, one.tags, one.recaption, one.lyrics, one.language]
    made_from = [FORMAT_VERSION, MAX_SILENT_FRACTION, asdict(recipe.settings), recipe.models, text]
    place = [one.filename, one.speaker_path, one.problem]
    return hash_of("reject", made_from, place, VERSIONS.audio, VERSIONS.speaker)


@pytest.mark.parametrize("language", ["sv", "Swedish", "nonsense"])
def test_a_language_is_refused_for_lyrics_alone_and_the_reject_lists_the_others(lyric_tokenizer, language):
    reject = encode_lyrics(decoded(song(language=language)), lyric_tokenizer, RECIPE)
    assert isinstance(reject, Reject)
    assert "en, de, fr, es, it, pt, pl, tr, ru, cs, nl, ar, zh, ja, hu, ko, hi" in reject.message
    assert isinstance(
        encode_lyrics(decoded(song(language=language, lyrics="")), lyric_tokenizer, RECIPE), dict
    )


def test_warnings_are_a_line_for_each_kind_with_the_share_of_the_worst(lyric_tokenizer):
    lyrics = {
        "a": "hello world",
        "b": "[00:12.34]hello",
        "c": f"hello world, I sing to you tonight, all night\n{HEBREW}",
        "d": THAI,
        "e": r"one\ntwo",
    }
    rows = [{"keys": key, "filename": f"{key}.wav", "norm_lyrics": text} for key, text in lyrics.items()]
    times, line_ends, unknown = lyric_warnings(rows, lyric_tokenizer, rejected={"d"})
    assert times == "lyrics of 1 song (b): times of 1 line removed"
    assert line_ends == r"lyrics of 1 song (e): 1 typed \n read as line ends"
    # Rejected songs are told of with their rejects.
    assert unknown.startswith("lyrics of 1 song have tokens that are unknown to the model (Hebrew): c ")
    kept = lyric_warnings(rows, lyric_tokenizer, rejected=())[-1]
    assert kept.startswith(
        "lyrics of 2 songs have tokens that are unknown to the model (Thai, Hebrew): d 100 %, c "
    )
    assert lyric_warnings(rows, None, rejected=()) == [times, line_ends]
