from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from acestep_ray.cache.schema import SAMPLE_SCHEMA, quantise_directions
from acestep_ray.cache.stages import (
    DecodedSong,
    Encoder,
    FileVersions,
    Recipe,
    Reject,
    Settings,
    Song,
    decode_song,
    file_versions,
    rows_are_current,
)
from acestep_ray.data.audio import AudioFile, audio_sha256
from acestep_ray.data.loudness import integrated_loudness
from acestep_ray.storage import Store
from tests.cache.conftest import (
    RECIPE,
    SETTINGS,
    SPEAKER_DIM,
    SSL_DIMS,
    TEXT_DIM,
    SongFolder,
    decoded,
    noise,
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
    opened = AudioFile.__init__

    def open_without_length(self, file):
        opened(self, file)
        self.duration_seconds = None

    monkeypatch.setattr(AudioFile, "__init__", open_without_length)
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


def test_an_encoded_song_is_one_row_with_everything_training_needs(encoder):
    speaker = np.arange(SPEAKER_DIM, dtype=np.float32)
    source = decoded(song(), seconds=4.0, speaker=speaker)
    table = encoder.encode_song(source)
    assert table.schema == SAMPLE_SCHEMA
    (row,) = table.to_pylist()
    assert row["fingerprint"] == RECIPE.row_fingerprint(song(), "a" * 64, "b" * 64)
    assert (row["duration_seconds"], row["latent_frames"]) == (4.0, 40)
    latents = np.frombuffer(row["latents"], np.float16).reshape(8, 16, 40)
    np.testing.assert_array_equal(latents[1, 2], source.wave[0][18::4800].astype(np.float16))
    assert [prompt["source"] for prompt in row["prompts"]] == ["tags", "tags", "recaption/simplified"]
    for prompt, embedding in zip(row["prompts"], row["text_embeddings"], strict=True):
        assert np.frombuffer(embedding, np.float16).size == len(prompt["text"]) * TEXT_DIM
    assert row["lyric_ids"] == encoder.lyric_tokenizer.encode("[verse]\nhello world").ids
    assert row["lyric_languages"] == ["en", "en"]
    np.testing.assert_array_equal(np.frombuffer(row["speaker"], np.float32), speaker)
    assert {entry["name"]: entry["dim"] for entry in row["ssl"]} == SSL_DIMS


def test_a_song_without_lyrics_or_speaker_has_none_in_its_row(encoder):
    (row,) = encoder.encode_song(decoded(song(lyrics=" \n "))).to_pylist()
    assert (row["lyric_ids"], row["lyric_languages"], row["speaker"]) == ([], [], None)


def test_the_frame_stride_keeps_every_nth_frame_and_the_count_of_all(encoder):
    source = decoded(song())
    (features,) = encoder.ssl_encoders["mert"].encode_batch([torch.from_numpy(source.wave)])
    encoder.recipe = replace(RECIPE, settings=replace(SETTINGS, ssl_frame_stride=4))
    (row,) = encoder.encode_song(source).to_pylist()
    mert = next(entry for entry in row["ssl"] if entry["name"] == "mert")
    kept = np.frombuffer(mert["directions"], np.int8).reshape(-1, SSL_DIMS["mert"])
    assert mert["frames"] == len(features)
    np.testing.assert_array_equal(kept, quantise_directions(features[::4].numpy()))


def test_a_language_that_is_not_supported_is_a_reject(encoder):
    result = encoder.encode_song(decoded(song(language="tlh")))
    assert (result.stage, result.reason) == ("text", "bad_lyrics")


def test_values_that_are_not_finite_are_a_reject(encoder):
    encoder.codec.encode = lambda waves, lengths: (torch.full((1, 8, 16, 5), 1e6), torch.tensor([5]))
    result = encoder.encode_song(decoded(song()))
    assert (result.stage, result.reason) == ("encode", "encoder")


def test_a_model_that_fails_on_this_song_alone_makes_it_a_reject(encoder):
    source = decoded(song())
    encode = encoder.codec.encode

    def fail_on_song(waves, lengths):
        if torch.equal(waves[0], torch.from_numpy(source.wave)):
            raise RuntimeError("what a song")
        return encode(waves, lengths)

    encoder.codec.encode = fail_on_song
    result = encoder.encode_song(source)
    assert isinstance(result, Reject)
    assert (result.reason, result.message) == ("encoder", "RuntimeError: what a song")


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), torch.OutOfMemoryError("CUDA"), TypeError("a bug")]
)
def test_a_fault_of_the_machine_or_the_program_is_no_reject(encoder, error):
    def fail(waves, lengths):
        raise error

    encoder.codec.encode = fail
    with pytest.raises(type(error), match=str(error)):
        encoder.encode_song(decoded(song()))


def test_running_out_of_memory_on_one_song_is_no_reject(encoder):
    source = decoded(song())
    encode = encoder.codec.encode

    def fail_on_song(waves, lengths):
        if torch.equal(waves[0], torch.from_numpy(source.wave)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(waves, lengths)

    encoder.codec.encode = fail_on_song
    with pytest.raises(torch.OutOfMemoryError):
        encoder.encode_song(source)


def on_a_gpu(encoder: Encoder, monkeypatch) -> Encoder:
    """An encoder that takes songs together, as on a GPU."""
    encoder.device = "cuda"
    monkeypatch.setattr(Encoder, "_upload", lambda self, waves, n: upload_to_cpu(waves, n))
    return encoder


def upload_to_cpu(waves, samples: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.pad(w, ((0, 0), (0, samples - w.shape[1])))) for w in waves])


def test_songs_that_are_encoded_together_get_what_they_get_alone(encoder, monkeypatch):
    songs = [decoded(song(key), seconds) for key, seconds in (("a", 3.0), ("bb", 4.5), ("ccc", 3.7))]
    alone = [encoder.encode([one])[0] for one in songs]
    assert on_a_gpu(encoder, monkeypatch).encode(songs) == alone
    assert [row["latent_frames"] for row in alone] == [30, 45, 37]


def test_one_song_that_fails_in_a_batch_costs_only_itself(encoder, monkeypatch):
    songs = [decoded(song(key), 3.0) for key in ("a", "bb", "ccc")]
    alone = encoder.encode(songs)
    encode = encoder.codec.encode
    sizes = []

    def fail_on_one(waves, lengths):
        sizes.append(len(waves))
        if any(torch.equal(wave, torch.from_numpy(songs[1].wave)) for wave in waves):
            raise RuntimeError("what a song")
        return encode(waves, lengths)

    encoder.codec.encode = fail_on_one
    first, failed, last = on_a_gpu(encoder, monkeypatch).encode(songs)
    assert (first, last) == (alone[0], alone[2])
    assert (failed.key, failed.reason, failed.message) == ("bb", "encoder", "RuntimeError: what a song")
    assert sizes == [3, 1, 1, 1, 1]  # together, each alone, and noise in the failed one's place


def test_a_batch_that_is_too_large_for_the_memory_goes_by_halves(encoder, monkeypatch):
    songs = [decoded(song(key), 3.0) for key in ("a", "bb", "ccc", "dddd", "eeeee")]
    alone = encoder.encode(songs)
    encode = encoder.codec.encode
    sizes = []

    def out_of_memory(waves, lengths):
        sizes.append(len(waves))
        if len(waves) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(waves, lengths)

    encoder.codec.encode = out_of_memory
    assert on_a_gpu(encoder, monkeypatch).encode(songs) == alone
    assert sizes == [5, 2, 3, 1, 2]


def test_values_that_are_not_finite_cost_only_their_song(encoder, monkeypatch):
    songs = [decoded(song(key), 3.0) for key in ("a", "bb")]
    encode = encoder.codec.encode

    def overflow(waves, lengths):
        latents, frames = encode(waves, lengths)
        latents = latents.clone()
        latents[1, 0, 0, 0] = 1e6  # infinite in float16
        return latents, frames

    encoder.codec.encode = overflow
    good, bad = on_a_gpu(encoder, monkeypatch).encode(songs)
    assert isinstance(good, dict)
    assert (bad.key, bad.reason) == ("bb", "encoder")


@pytest.mark.parametrize(
    ("models", "columns"),
    [
        (["codec"], {"latents", "latent_frames"}),
        (
            ["text_encoder", "lyric_tokenizer"],
            {"prompts", "text_embeddings", "text_dim", "lyric_ids", "lyric_languages"},
        ),
        (["ssl_encoders"], {"ssl"}),
    ],
)
def test_an_encoder_gives_the_columns_of_the_models_that_it_has(encoder, models, columns):
    source = decoded(song())
    everything = encoder.encode([source])[0]
    part = Encoder(RECIPE, **{name: getattr(encoder, name) for name in models})
    (values,) = part.encode([source])
    assert values == {name: everything[name] for name in columns}
    row = part.encode_song(source)
    missing = set(everything) - columns - {"latent_frames", "ssl"}
    assert all(row[name][0].as_py() in (None, []) for name in missing)


def test_the_same_song_gives_the_same_row(encoder):
    first, second = (encoder.encode_song(decoded(song())) for _ in range(2))
    assert isinstance(first, pa.Table)
    assert first.equals(second)
