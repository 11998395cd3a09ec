from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from acestep_ray.cache.schema import SAMPLE_SCHEMA, quantise_directions
from acestep_ray.cache.stages import Recipe, Reject, Song, decode_song, files_unchanged
from acestep_ray.data.audio import audio_sha256
from tests.cache.conftest import RECIPE, SETTINGS, SPEAKER_DIM, SSL_DIMS, TEXT_DIM, decoded, noise, song


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


@pytest.mark.parametrize("name", ["max_duration", "tag_shuffles", "ssl_frame_stride", "seed", "speaker_dim"])
def test_a_change_of_a_setting_changes_the_fingerprint(name):
    settings = replace(SETTINGS, **{name: getattr(SETTINGS, name) + 1})
    assert fingerprint(song(), replace(RECIPE, settings=settings)) != fingerprint(song())


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


def test_files_are_unchanged_only_with_the_same_bytes_and_speaker(song_folder):
    song_folder.add("a", noise(3.0))
    speaker_file = song_folder.path / "voice.npy"
    np.save(speaker_file, np.zeros(SPEAKER_DIM, np.float32))
    audio = audio_sha256(song_folder.path / "audio/a.wav")
    speaker = audio_sha256(speaker_file)

    def unchanged(one: Song, audio_hash: str, speaker_hash: str | None) -> bool:
        return files_unchanged(str(song_folder.path), one, audio_hash, speaker_hash)

    with_speaker = song(speaker_path="voice.npy")
    assert unchanged(song(), audio, None)
    assert unchanged(with_speaker, audio, speaker)
    assert not unchanged(song(), speaker, None)
    assert not unchanged(with_speaker, audio, audio)
    assert not unchanged(with_speaker, audio, None)
    assert not unchanged(song(), audio, speaker)
    assert not unchanged(song("gone"), audio, None)


def test_decoding_measures_the_song_before_it_is_padded(song_folder):
    song_folder.add("a", noise(1.5))
    result = decode_song(str(song_folder.path), song(), SETTINGS)
    assert result.duration_seconds == 1.5
    assert result.wave.shape == (2, 3 * 48_000)
    assert result.audio_sha256 == audio_sha256(song_folder.path / "audio/a.wav")
    assert (result.speaker, result.speaker_sha256) == (None, None)


def test_decoding_stops_at_the_longest_duration(song_folder):
    song_folder.add("a", noise(5.0))
    result = decode_song(str(song_folder.path), song(), replace(SETTINGS, max_duration=4.0))
    assert (result.duration_seconds, result.wave.shape) == (4.0, (2, 4 * 48_000))


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
    result = decode_song(str(song_folder.path), song(), SETTINGS)
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
    assert decode_song(str(song_folder.path), outside, SETTINGS).reason == "bad_path"


def test_a_speaker_embedding_of_another_size_is_a_reject(song_folder):
    song_folder.add("a", noise(3.0))
    np.save(song_folder.path / "voice.npy", np.zeros(SPEAKER_DIM + 1, np.float32))
    for path in ("voice.npy", "gone.npy", "../voice.npy"):
        result = decode_song(str(song_folder.path), song(speaker_path=path), SETTINGS)
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
    features = encoder.ssl_encoders["mert"].encode(torch.from_numpy(source.wave)).numpy()
    encoder.recipe = replace(RECIPE, settings=replace(SETTINGS, ssl_frame_stride=4))
    (row,) = encoder.encode_song(source).to_pylist()
    mert = next(entry for entry in row["ssl"] if entry["name"] == "mert")
    kept = np.frombuffer(mert["directions"], np.int8).reshape(-1, SSL_DIMS["mert"])
    assert mert["frames"] == len(features)
    np.testing.assert_array_equal(kept, quantise_directions(features[::4]))


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


def test_the_same_song_gives_the_same_row(encoder):
    first, second = (encoder.encode_song(decoded(song())) for _ in range(2))
    assert isinstance(first, pa.Table)
    assert first.equals(second)
