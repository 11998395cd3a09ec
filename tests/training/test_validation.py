"""The fixed-noise loss: equal for equal weights, and by how much noise there was."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from acestep_ray.cache.reader import CacheReader
from acestep_ray.diffusion.objective import denoising_losses
from acestep_ray.diffusion.schedule import training_sigmas
from acestep_ray.training import validation
from acestep_ray.training.validation import (
    NOISE_LEVELS,
    fixed_noise_losses,
    validation_draws,
    validation_metrics,
)

SIGMAS = training_sigmas(3.0)


@pytest.fixture(scope="module")
def reader(tiny_cache):
    return CacheReader(tiny_cache)


def test_two_values_of_the_same_model_are_equal_and_of_another_differ(checkpoint, reader):
    transformer = checkpoint.load_transformer().eval()
    losses_of = partial(denoising_losses, transformer)
    losses = fixed_noise_losses(losses_of, reader.read, range(3), SIGMAS, "cpu")
    torch.rand(5)  # nothing is drawn from the global stream
    assert fixed_noise_losses(losses_of, reader.read, range(3), SIGMAS, "cpu") == losses
    assert len(losses) == NOISE_LEVELS
    with torch.no_grad():
        next(transformer.parameters()).add_(0.05)
    assert fixed_noise_losses(losses_of, reader.read, range(3), SIGMAS, "cpu") != losses


@pytest.mark.parametrize(("most_frames", "passes"), [(1, 8), (90, 4), (150, 3), (1000, 1)])
def test_noise_levels_of_a_short_song_share_passes_and_have_the_losses_of_each_alone(
    checkpoint, reader, monkeypatch, most_frames, passes
):
    transformer = checkpoint.load_transformer().eval()
    losses_of = partial(denoising_losses, transformer)
    frames = reader.read(0).latents.shape[-1]
    assert (90 // frames, 150 // frames) == (2, 3)
    alone = fixed_noise_losses(losses_of, reader.read, [0], SIGMAS, "cpu", together=True)
    sizes = []
    transformer.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    monkeypatch.setattr(validation, "MOST_FRAMES", most_frames)
    assert fixed_noise_losses(losses_of, reader.read, [0], SIGMAS, "cpu") == pytest.approx(alone, rel=1e-5)
    assert len(sizes) == passes
    assert sum(sizes) == NOISE_LEVELS


def test_noise_levels_fall_and_are_spread_like_those_of_training(reader):
    levels = [float(validation_draws(reader.read(0), SIGMAS, level).sigma) for level in range(NOISE_LEVELS)]
    assert levels == sorted(levels, reverse=True)
    u = torch.sigmoid(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    drawn = SIGMAS[(u * 1000).long()]
    shares = [float((drawn > level).float().mean()) for level in levels]
    assert shares == pytest.approx([(i + 0.5) / NOISE_LEVELS for i in range(NOISE_LEVELS)], abs=0.01)


def test_each_quarter_is_the_mean_of_its_noise_levels():
    assert validation_metrics("loss/validation", [8.0, 6.0, 5.0, 5.0, 3.0, 1.0, 0.0, 0.0]) == {
        "loss/validation": 3.5,
        "loss/validation/q1": 7.0,
        "loss/validation/q2": 5.0,
        "loss/validation/q3": 2.0,
        "loss/validation/q4": 0.0,
    }
