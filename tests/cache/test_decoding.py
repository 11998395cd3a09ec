from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from acestep_ray.cache.decoding import decode_song, file_versions, rows_are_current
from acestep_ray.cache.songs import DecodedSong, FileVersions, Reject, Settings, Song
from acestep_ray.data.audio import AudioFile, audio_sha256
from acestep_ray.data.loudness import integrated_loudness
from acestep_ray.storage import Store
from tests.cache.conftest import (
    RECIPE,
    SETTINGS,
    SPEAKER_DIM,
    SongFolder,
    noise,
    song,
)


def decode(folder: SongFolder, one: Song, settings: Settings = SETTINGS) -> list[DecodedSong | Reject]:
    root = Store.at(folder.path)
    return list(decode_song(root, one, replace(RECIPE, settings=settings), file_versions(root, one)))


def test_files_are_unchanged_only_with_the_same_bytes_and_speaker(song_folder):
    song_folder.add("a", noise(3.0))
    speaker_file = song_folder.path / "voice.npy"
    np.save(speaker_file, np.zeros(SPEAKER_DIM, np.float32))
    audio = audio_sha256(song_folder.path / "audio/a.wav")
    speaker = audio_sha256(speaker_file)
    root = Store.at(song_folder.path)

    def current(one: Song, audio_hash: str, speaker_hash: str | None) -> bool:
        before = FileVersions("old", None if speaker_hash is None else "old")
        return rows_are_current(root, one, before, audio_hash, speaker_hash)

    with_speaker = song(speaker_path="voice.npy")
    assert current(song(), audio, None)
    assert current(with_speaker, audio, speaker)
    assert not current(song(), speaker, None)
    assert not current(with_speaker, audio, audio)
    assert not current(with_speaker, audio, None)
    assert not current(song(), audio, speaker)
    assert not current(song("gone"), audio, None)


def test_files_of_the_same_version_are_not_read_again(song_folder):
    song_folder.add("a", noise(3.0))
    root = Store.at(song_folder.path)
    before = file_versions(root, song())
    assert rows_are_current(root, song(), before, "a hash that is not compared", None)
    file = song_folder.path / "audio/a.wav"
    file.write_bytes(file.read_bytes())
    assert not rows_are_current(root, song(), before, "a hash that is compared now", None)


def test_a_reject_is_known_by_its_text_and_the_versions_of_its_files(song_folder):
    root = Store.at(song_folder.path)
    missing = RECIPE.reject_fingerprint(song(), file_versions(root, song()))
    song_folder.add("a", b"")
    empty = RECIPE.reject_fingerprint(song(), file_versions(root, song()))
    others = [
        RECIPE.reject_fingerprint(one, file_versions(root, song()))
        for one in (song(lyrics="la"), song(filename="b.wav"), song(problem="not UTF-8"))
    ]
    assert len({missing, empty, *others}) == 5
    assert RECIPE.reject_fingerprint(song(), file_versions(root, song())) == empty


def test_decoding_measures_the_song_before_it_is_padded(song_folder):
    song_folder.add("a", noise(1.5))
    (result,) = decode(song_folder, song())
    assert result.duration_seconds == 1.5
    assert result.wave.shape == (2, 3 * 48_000)
    assert result.audio_sha256 == audio_sha256(song_folder.path / "audio/a.wav")
    assert result.audio_version == Store.at(song_folder.path).status("audio/a.wav").version
    assert (result.speaker, result.speaker_sha256, result.speaker_version) == (None, None, None)
    assert (result.key, result.window, result.is_last_window, result.start_seconds) == ("a", 0, True, 0.0)


def test_the_first_window_is_the_start_of_the_song(song_folder):
    song_folder.add("a", noise(5.0))
    (result,) = decode(song_folder, song(), replace(SETTINGS, window_seconds=4.0))
    assert (result.duration_seconds, result.wave.shape) == (4.0, (2, 4 * 48_000))
    (whole,) = decode(song_folder, song())
    np.testing.assert_array_equal(result.wave, whole.wave[:, : 4 * 48_000])


@pytest.mark.parametrize(
    ("seconds", "lengths"),
    [
        (14.0, [4.0, 4.0, 4.0]),  # two seconds are left, under the shortest window
        (15.0, [4.0, 4.0, 4.0, 3.0]),
        (8.0, [4.0, 4.0]),
        (4.0, [4.0]),
        (2.0, [2.0]),
    ],
)
def test_all_windows_of_a_song_follow_one_another(song_folder, seconds, lengths):
    song_folder.add("a", noise(seconds))
    settings = replace(SETTINGS, window="all", window_seconds=4.0)
    results = decode(song_folder, song(), settings)
    assert [result.duration_seconds for result in results] == lengths
    assert [result.key for result in results] == [f"a#{i}" for i in range(len(lengths))]
    assert [result.window for result in results] == list(range(len(lengths)))
    assert [result.is_last_window for result in results] == [False] * (len(lengths) - 1) + [True]
    assert [result.start_seconds for result in results] == [4.0 * i for i in range(len(lengths))]
    (whole,) = decode(song_folder, song())
    joined = np.concatenate([result.wave for result in results], axis=1)
    np.testing.assert_array_equal(joined, whole.wave[:, : joined.shape[1]])


def test_a_silent_window_is_a_reject_among_the_others(song_folder):
    song_folder.add("a", np.concatenate([noise(4.0), np.zeros((4 * 48_000, 2)), noise(4.0)]))
    first, silent, last = decode(song_folder, song(), replace(SETTINGS, window="all", window_seconds=4.0))
    assert isinstance(first, DecodedSong)
    assert isinstance(last, DecodedSong)
    assert (silent.key, silent.song_key, silent.window, silent.is_last_window) == ("a#1", "a", 1, False)
    assert silent.reason == "silent"
    assert last.is_last_window


def test_a_random_window_is_a_function_of_seed_and_key(song_folder):
    for key in "abcdefgh":
        song_folder.add(key, noise(9.0))
    settings = replace(SETTINGS, window="random", window_seconds=4.0)
    starts = [decode(song_folder, song(key), settings)[0].start_seconds for key in "abcdefgh"]
    assert len(set(starts)) == 8
    assert 0.0 <= min(starts) < 2.0
    assert 3.0 < max(starts) <= 5.0
    (again,) = decode(song_folder, song("a"), settings)
    assert again.start_seconds == starts[0]
    (whole,) = decode(song_folder, song("a"))
    first = round(starts[0] * 48_000)
    np.testing.assert_array_equal(again.wave, whole.wave[:, first : first + 4 * 48_000])
    (other,) = decode(song_folder, song("a"), replace(settings, seed=1))
    assert other.start_seconds != starts[0]


def test_a_random_window_of_a_song_whose_header_says_no_length(song_folder, monkeypatch):
    song_folder.add("a", noise(9.0))
    settings = replace(SETTINGS, window="random", window_seconds=4.0)
    (known,) = decode(song_folder, song(), settings)
    monkeypatch.setattr(AudioFile, "duration_seconds", None)
    (unknown,) = decode(song_folder, song(), settings)
    # The second that is left after two windows is not counted.
    assert unknown.start_seconds == pytest.approx(known.start_seconds * 4 / 5)


def test_a_song_is_brought_to_the_loudness_that_is_asked_for(song_folder):
    song_folder.add("a", 0.1 * noise(5.0))
    (quiet,) = decode(song_folder, song())
    (loud,) = decode(song_folder, song(), replace(SETTINGS, loudness_lufs=-20.0))
    assert integrated_loudness(quiet.wave) < -24
    assert integrated_loudness(loud.wave) == pytest.approx(-20.0, abs=0.1)


def test_a_text_that_cannot_be_read_is_a_reject(song_folder):
    song_folder.add("a", noise(3.0))
    (result,) = decode(song_folder, song(problem="a_lyrics.txt: not UTF-8 text"))
    assert (result.stage, result.reason, result.message) == (
        "text",
        "bad_text",
        "a_lyrics.txt: not UTF-8 text",
    )


@pytest.mark.parametrize(
    ("audio", "reason"),
    [
        (None, "missing"),
        (b"", "empty"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "corrupt"),
        (b"once upon a time", "unsupported"),
        (np.concatenate([noise(0.1), np.zeros((96_000, 2))]), "silent"),
    ],
)
def test_unusable_audio_is_a_reject_with_its_reason(song_folder, audio, reason):
    song_folder.add("a", audio)
    (result,) = decode(song_folder, song())
    assert (result.key, result.filename, result.stage, result.reason) == (
        "a",
        "audio/a.wav",
        "decode",
        reason,
    )
    assert result.message
    assert "\n" not in result.message


def test_a_path_out_of_the_dataset_is_a_reject(song_folder):
    outside = song(filename="../secret.wav")
    (result,) = decode(song_folder, outside)
    assert result.reason == "bad_path"


def test_a_speaker_embedding_of_another_size_is_a_reject(song_folder):
    song_folder.add("a", noise(3.0))
    np.save(song_folder.path / "voice.npy", np.zeros(SPEAKER_DIM + 1, np.float32))
    for path in ("voice.npy", "gone.npy", "../voice.npy"):
        (result,) = decode(song_folder, song(speaker_path=path))
        assert (result.stage, result.reason) == ("text", "bad_speaker")
