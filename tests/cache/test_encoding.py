from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from acestep_ray.cache.encoding import Encoder, quantise_directions
from acestep_ray.cache.schema import SAMPLE_SCHEMA
from acestep_ray.cache.songs import Reject
from tests.cache.conftest import (
    RECIPE,
    SETTINGS,
    SPEAKER_DIM,
    SSL_DIMS,
    TEXT_DIM,
    decoded,
    song,
)
from tests.cache.runs import encoded_row


def test_an_encoded_song_is_one_row_with_everything_training_needs(encoder):
    speaker = np.arange(SPEAKER_DIM, dtype=np.float32)
    source = decoded(song(), seconds=4.0, speaker=speaker)
    table = encoded_row(encoder, source)
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
    (row,) = encoded_row(encoder, decoded(song(lyrics=" \n "))).to_pylist()
    assert (row["lyric_ids"], row["lyric_languages"], row["speaker"]) == ([], [], None)


def test_the_frame_stride_keeps_every_nth_frame_and_the_count_of_all(encoder):
    source = decoded(song())
    (features,) = encoder.ssl_encoders["mert"].encode_batch([torch.from_numpy(source.wave)])
    encoder.recipe = replace(RECIPE, settings=replace(SETTINGS, ssl_frame_stride=4))
    (row,) = encoded_row(encoder, source).to_pylist()
    mert = next(entry for entry in row["ssl"] if entry["name"] == "mert")
    kept = np.frombuffer(mert["directions"], np.int8).reshape(-1, SSL_DIMS["mert"])
    assert mert["frames"] == len(features)
    np.testing.assert_array_equal(kept, quantise_directions(features[::4]).numpy())


def test_quantised_directions_point_where_the_features_did():
    features = torch.randn(200, 768, generator=torch.Generator().manual_seed(0))
    features *= torch.logspace(-20, 20, 200)[:, None]  # only the direction counts
    restored = quantise_directions(features)
    restored, features = (F.normalize(x.double(), dim=1, eps=0) for x in (restored, features))
    assert (restored * features).sum(dim=1).min() > 0.999


def test_quantised_frames_use_the_whole_range_and_zeros_stay_zeros():
    quantised = quantise_directions(torch.tensor([[0.0, 0.0], [0.5, -1e-30], [-3.0, 1.5]]))
    assert quantised.dtype == torch.int8
    assert quantised.tolist() == [[0, 0], [127, 0], [-127, 64]]


def test_a_language_that_is_not_supported_is_a_reject(encoder):
    (result,) = encoder.encode([decoded(song(language="tlh"))])
    assert (result.stage, result.reason) == ("text", "bad_lyrics")


def test_values_that_are_not_finite_are_a_reject(encoder):
    encoder.codec.encode = lambda waves, lengths: (torch.full((1, 8, 16, 5), 1e6), torch.tensor([5]))
    (result,) = encoder.encode([decoded(song())])
    assert (result.stage, result.reason) == ("encode", "encoder")


def test_a_model_that_fails_on_this_song_alone_makes_it_a_reject(encoder):
    source = decoded(song())
    encode = encoder.codec.encode

    def fail_on_song(waves, lengths):
        if torch.equal(waves[0], torch.from_numpy(source.wave)):
            raise RuntimeError("what a song")
        return encode(waves, lengths)

    encoder.codec.encode = fail_on_song
    (result,) = encoder.encode([source])
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
        encoder.encode([decoded(song())])


def test_running_out_of_memory_on_one_song_is_no_reject(encoder):
    source = decoded(song())
    encode = encoder.codec.encode

    def fail_on_song(waves, lengths):
        if torch.equal(waves[0], torch.from_numpy(source.wave)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(waves, lengths)

    encoder.codec.encode = fail_on_song
    with pytest.raises(torch.OutOfMemoryError):
        encoder.encode([source])


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
    row = encoded_row(part, source)
    missing = set(everything) - columns - {"latent_frames", "ssl"}
    assert all(row[name][0].as_py() in (None, []) for name in missing)


def test_the_same_song_gives_the_same_row(encoder):
    first, second = (encoded_row(encoder, decoded(song())) for _ in range(2))
    assert first.equals(second)
