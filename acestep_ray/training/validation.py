"""The fixed-noise loss: the same songs, noise and noise levels every time, so that two values can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn

from acestep_ray.cache.schema import CachedSong
from acestep_ray.diffusion.objective import flow_matching_losses
from acestep_ray.diffusion.schedule import sigma_index
from acestep_ray.training.batch import Draws, build_batch, counter_seed, song_noise

NOISE_LEVELS = 8
QUARTERS = 4
SONGS = 8
FIXED_NOISE = "loss/fixed_noise"
"""Name of the metric."""


def validation_draws(song: CachedSong, sigmas: Tensor, level: int) -> Draws:
    """No condition dropped, the first prompt, and one of `NOISE_LEVELS` quantiles of training's noise levels."""
    quantile = torch.tensor((level + 0.5) / NOISE_LEVELS)
    u = torch.sigmoid(torch.special.ndtri(quantile))
    return Draws(
        noise=song_noise(song, counter_seed("validation", song.key, level)),
        sigma=sigmas[sigma_index(u)],
        prompt=0,
        drop_text=False,
        drop_speaker=False,
        drop_lyrics=False,
        dropout_seed=None,
    )


@torch.no_grad()
def fixed_noise_losses(
    transformer: nn.Module, songs: Sequence[CachedSong], sigmas: Tensor, device: torch.device | str
) -> list[float]:
    """Mean denoising loss of `songs` at each of `NOISE_LEVELS` noise levels, the noisiest first, over fixed noise.

    `sigmas` (1000,) is the schedule.
    """
    losses = []
    for level in range(NOISE_LEVELS):
        total = 0.0
        for song in songs:
            batch = build_batch([song], [validation_draws(song, sigmas, level)], ssl_stride=1, with_ssl=False)
            total += flow_matching_losses(transformer, batch.to(device)).denoising.item()
        losses.append(total / len(songs))
    return losses


def validation_metrics(losses: Sequence[float]) -> dict[str, float]:
    """The mean over all noise levels, and over each quarter of them: q1 has the most noise."""
    size = len(losses) // QUARTERS
    quarters = {f"{FIXED_NOISE}/q{i + 1}": fmean(losses[i * size : (i + 1) * size]) for i in range(QUARTERS)}
    return {FIXED_NOISE: fmean(losses), **quarters}
