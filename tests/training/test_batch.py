"""Draws from counters, and songs padded to a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from acestep_ray.diffusion.objective import flow_matching_losses
from acestep_ray.diffusion.schedule import training_sigmas
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.training.batch import ConditionDropout, build_batch, choose_prompt, draw
from tests.models.test_padding import CONFIG
from tests.training.songs import cached_song

SIGMAS = training_sigmas()
USUAL = ConditionDropout()
NEVER = ConditionDropout(0.0, 0.0, 0.0)
ALWAYS = ConditionDropout(1.0, 1.0, 1.0)


def draws_of(song, dropout=USUAL, epochs=1, seed=7):
    return [draw(song, SIGMAS, dropout, seed=seed, epoch=epoch) for epoch in range(epochs)]


def test_draws_depend_on_seed_epoch_and_key_alone():
    song = cached_song("a")
    first, second = draws_of(song, epochs=2)
    again = draws_of(song)[0]
    assert torch.equal(first.noise, again.noise)
    assert first.sigma == again.sigma
    for other in (second, draws_of(song, seed=8)[0], draws_of(cached_song("b"))[0]):
        assert not torch.equal(first.noise, other.noise)
        assert first.dropout_seed != other.dropout_seed


def test_draws_have_the_distributions_of_training():
    songs = [cached_song(f"song {i}", frames=4) for i in range(50)]
    draws = [d for song in songs for d in draws_of(song, epochs=40)]
    shares = np.mean([(d.drop_text, d.drop_speaker, d.drop_lyrics) for d in draws], axis=0)
    assert shares == pytest.approx([0.15, 0.5, 0.15], abs=0.04)
    # sigmoid of a standard normal has its median at 0.5: the schedule's middle.
    sigmas = torch.stack([d.sigma for d in draws])
    assert sigmas.median() == pytest.approx(float(SIGMAS[500]), abs=0.03)
    noise = torch.cat([d.noise.flatten() for d in draws])
    assert noise.mean().abs() < 0.01
    assert noise.std() == pytest.approx(1.0, abs=0.01)


def test_a_source_is_chosen_uniformly_however_many_variants_it_has():
    sources = ["tags"] * 8 + ["recaption/a", "recaption/b"]
    random = np.random.default_rng(0)
    chosen = [sources[choose_prompt(sources, random)] for _ in range(6000)]
    for source in set(sources):
        assert chosen.count(source) / len(chosen) == pytest.approx(1 / 3, abs=0.03)


def test_dropped_conditions_are_zeros_and_only_the_lyrics_mask_empties():
    song = cached_song("a")
    batch = build_batch([song], draws_of(song, ALWAYS), ssl_stride=1, with_ssl=False)
    assert not batch.text.any()
    assert batch.text_mask.all()
    assert not batch.speaker.any()
    assert not batch.lyric_ids.any()
    assert not batch.lyric_mask.any()
    kept = build_batch([song], draws_of(song, NEVER), ssl_stride=1, with_ssl=False)
    assert kept.text.any()
    assert kept.speaker.any()
    assert kept.lyric_mask.all()


def test_a_song_without_lyrics_has_one_token_outside_the_mask():
    song = cached_song("a", lyrics=0)
    batch = build_batch([song], draws_of(song, NEVER), ssl_stride=1, with_ssl=False)
    assert batch.lyric_ids.tolist() == [[0]]
    assert batch.lyric_mask.tolist() == [[False]]


@pytest.mark.parametrize("stride", [1, 2])
def test_losses_of_a_built_batch_are_those_of_its_songs_alone(stride):
    torch.manual_seed(0)
    model = ACEStepTransformer(CONFIG)
    songs = [
        cached_song("a", frames=9),
        cached_song("b", frames=21, lyrics=0),
        cached_song("c", frames=14, lyrics=11),
    ]
    for song in songs:
        song.ssl = {name: features[::stride] for name, features in song.ssl.items()}
    draws = [draws_of(song)[0] for song in songs]

    def losses(chosen, chosen_draws):
        batch = build_batch(chosen, chosen_draws, ssl_stride=stride, with_ssl=True)
        return flow_matching_losses(model, batch).total(1.0).detach()

    together = losses(songs, draws)
    alone = torch.cat([losses([song], [d]) for song, d in zip(songs, draws, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
