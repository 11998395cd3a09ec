"""The fixed-noise loss: the same songs, noise and noise levels every time, so that two values can be compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from acestep_ray.cache.schema import CachedSong
from acestep_ray.diffusion.objective import flow_matching_losses
from acestep_ray.diffusion.schedule import sigma_index
from acestep_ray.training.batch import Draws, build_batch, counter_seed, song_noise

NOISE_LEVELS = 8
SONGS = 8


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
def fixed_noise_loss(
    transformer: nn.Module, songs: Sequence[CachedSong], sigmas: Tensor, device: torch.device | str
) -> float:
    """Mean denoising loss of `songs` over fixed noise at fixed noise levels; `sigmas` (1000,) is the schedule."""
    total = 0.0
    for song in songs:
        for level in range(NOISE_LEVELS):
            batch = build_batch([song], [validation_draws(song, sigmas, level)], ssl_stride=1, with_ssl=False)
            total += flow_matching_losses(transformer, batch.to(device)).denoising.item()
    return total / (len(songs) * NOISE_LEVELS)
