"""A song's losses and gradients are the same alone and in any padded batch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from acestep_ray.diffusion.objective import SSLTarget, TrainingBatch, flow_matching_losses
from acestep_ray.models.lyric_encoder import LyricEncoderConfig
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.models.transformer_config import TransformerConfig

CONFIG = TransformerConfig(
    num_layers=3,
    inner_dim=32,
    attention_head_dim=16,
    num_attention_heads=2,
    speaker_embedding_dim=16,
    text_embedding_dim=24,
    ssl_encoder_depths=(1, 1),
    ssl_latent_dims=(20, 12),
    lyric_encoder_vocab_size=64,
    lyric_hidden_size=32,
    lyric_encoder=LyricEncoderConfig(attention_heads=4, linear_units=64, num_blocks=2),
)

# frames, text tokens, lyric tokens (0: no lyrics), mert frames, m-hubert frames
SONGS = [(9, 3, 5, 14, 11), (24, 7, 1, 40, 27), (17, 1, 0, 31, 20), (32, 4, 12, 61, 33)]


def random_song(index: int) -> dict:
    frames, text, lyrics, *ssl_frames = SONGS[index]
    generator = torch.Generator().manual_seed(index)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "latents": normal(8, 16, frames),
        "noise": normal(8, 16, frames),
        "sigma": torch.rand((), generator=generator),
        "text": normal(text, CONFIG.text_embedding_dim),
        "speaker": normal(CONFIG.speaker_embedding_dim),
        "lyric_ids": torch.randint(1, 64, (lyrics,), generator=generator)
        if lyrics
        else torch.zeros(1).long(),
        "lyric_mask": torch.full((max(lyrics, 1),), lyrics > 0),
        "dropout_seed": torch.tensor(1000 + index),
        "ssl": {
            name: normal(n, width)
            for name, n, width in zip(CONFIG.ssl_names, ssl_frames, CONFIG.ssl_latent_dims, strict=True)
        },
    }


def pad(songs: list[dict], filler: float, dropout: bool) -> TrainingBatch:
    def padded(name):
        return pad_sequence([s[name] for s in songs], batch_first=True)

    def padded_in_time(name):
        rows = pad_sequence([s[name].movedim(-1, 0) for s in songs], batch_first=True, padding_value=filler)
        return rows.movedim(1, -1)

    def lengths_mask(name, dim=0):
        return pad_sequence([torch.ones(s[name].shape[dim]).bool() for s in songs], batch_first=True)

    return TrainingBatch(
        latents=padded_in_time("latents"),
        noise=padded_in_time("noise"),
        sigmas=torch.stack([s["sigma"] for s in songs]),
        frame_mask=lengths_mask("latents", dim=-1),
        text=padded("text"),
        text_mask=lengths_mask("text"),
        speaker=torch.stack([s["speaker"] for s in songs]),
        lyric_ids=padded("lyric_ids"),
        lyric_mask=padded("lyric_mask"),
        lyric_start=torch.tensor([1 + len(s["text"]) for s in songs]),
        dropout_seeds=torch.stack([s["dropout_seed"] for s in songs]) if dropout else None,
        ssl={
            name: SSLTarget(
                pad_sequence([s["ssl"][name] for s in songs], batch_first=True),
                torch.tensor([len(s["ssl"][name]) for s in songs]),
            )
            for name in CONFIG.ssl_names
        },
    )


def losses_and_gradients(model, batch, sample):
    model.zero_grad()
    losses = flow_matching_losses(model, batch)
    losses.total(1.0)[sample].backward()
    values = torch.stack([losses.denoising[sample], *(v[sample] for v in losses.ssl.values())])
    return values.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ACEStepTransformer(CONFIG)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("filler", [0.0, 3.0])
@pytest.mark.parametrize("mates", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0]])
def test_a_song_is_the_same_alone_and_in_a_padded_batch(model, mates, filler, dropout):
    songs = {index: random_song(index) for index in mates}
    batch = pad([songs[i] for i in mates], filler, dropout)
    for place, index in enumerate(mates):
        alone = pad([songs[index]], 0.0, dropout)
        alone_losses, alone_gradients = losses_and_gradients(model, alone, 0)
        batch_losses, batch_gradients = losses_and_gradients(model, batch, place)
        torch.testing.assert_close(batch_losses, alone_losses, rtol=1e-5, atol=1e-5)
        for name, gradient in alone_gradients.items():
            torch.testing.assert_close(
                batch_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_dropout_changes_the_losses_and_its_seed_decides_how(model):
    song = random_song(1)
    seeds = [None, 1, 1, 2]
    losses = []
    for seed in seeds:
        batch = pad([song], 0.0, dropout=False)
        batch.dropout_seeds = None if seed is None else torch.tensor([seed])
        losses.append(flow_matching_losses(model, batch).denoising.item())
    assert losses[1] == losses[2]
    assert len({losses[0], losses[1], losses[3]}) == 3


def test_recomputed_activations_give_the_same_gradients(model):
    batch = pad([random_song(0), random_song(3)], 0.0, dropout=True)
    _, plain = losses_and_gradients(model, batch, 0)
    model.activation_checkpointing = True
    try:
        _, recomputed = losses_and_gradients(model, batch, 0)
    finally:
        model.activation_checkpointing = False
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", [None, 5])
def test_encoded_lyrics_are_the_same_alone_and_padded(model, seed):
    ids = random_song(0)["lyric_ids"][None]
    seeds = None if seed is None else torch.tensor([seed])
    alone = model.encode_lyrics(ids, torch.ones_like(ids), seeds)
    padded_ids, mask = (torch.nn.functional.pad(x, (0, 6)) for x in (ids, torch.ones_like(ids)))
    padded = model.encode_lyrics(padded_ids, mask, seeds)[:, : ids.shape[1]]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)
