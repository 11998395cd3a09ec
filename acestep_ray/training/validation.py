"""The fixed-noise loss: the same songs, noise and noise levels every time, so that two values can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import torch
import torch.distributed
from torch import Tensor

from acestep_ray.cache.schema import CachedSong
from acestep_ray.diffusion.schedule import sigma_index
from acestep_ray.training.batch import Draws, build_batch, counter_seed, song_noise
from acestep_ray.training.passes import Losses

NOISE_LEVELS = 8
QUARTERS = 4
SONGS = 8
# Latent frames (240 s) of a pass over several noise levels of a song: one short song leaves a GPU waiting for the host.
MOST_FRAMES = 2_600
FIXED_NOISE, VALIDATION = "fixed_noise", "validation"
"""Names of the loss: over songs that are trained on, and over held-out songs."""


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
    losses_of: Losses,
    read: Callable[[int], CachedSong],
    songs: Sequence[int],
    sigmas: Tensor,
    device: torch.device | str,
    *,
    rank: int = 0,
    workers: int = 1,
    together: bool = False,
    say: Callable[[str], None] = print,
) -> list[float]:
    """Mean denoising loss of `songs` at each of `NOISE_LEVELS` noise levels, the noisiest first, over fixed noise.

    A song whose features are not finite is told and left out. `sigmas` (1000,) is the schedule. Every one of `workers`
    takes some songs and gets the same result; `together` if their forward passes are collective, so that each needs as
    many.
    """
    losses = torch.zeros(len(songs), NOISE_LEVELS, dtype=torch.float64, device=device)
    usable = torch.zeros(len(songs), dtype=torch.float64, device=device)
    passes = -(-len(songs) // workers) if together else len(songs[rank::workers])
    for number in range(passes):
        place = rank + number * workers
        is_mine = place < len(songs)
        song = read(songs[place if is_mine else 0])
        counts = is_mine and is_finite(song)
        if counts:
            usable[place] = 1
        elif is_mine:
            say(f"warning: {song.key} is left out of the validation: its features are not finite")
        # Collective passes have to be as many on every worker, whatever the songs' lengths.
        at_once = 1 if together else max(1, MOST_FRAMES // song.latents.shape[-1])
        for first in range(0, NOISE_LEVELS, at_once):
            levels = range(first, min(first + at_once, NOISE_LEVELS))
            draws = [validation_draws(song, sigmas, level) for level in levels]
            batch = build_batch([song] * len(draws), draws, ssl_stride=1, with_ssl=False)
            loss = losses_of(batch.to(device))
            if counts:
                losses[place, levels] = loss.double()
    if workers > 1:
        torch.distributed.all_reduce(losses)
        torch.distributed.all_reduce(usable)
    return (losses.sum(dim=0) / usable.sum()).tolist()


def is_finite(song: CachedSong) -> bool:
    """Whether what a validation reads of a song are numbers."""
    read = (song.latents, song.text_embeddings[0], song.speaker)
    return all(bool(tensor.isfinite().all()) for tensor in read)


def validation_metrics(name: str, losses: Sequence[float]) -> dict[str, float]:
    """The mean over all noise levels, as `name`, and over each quarter of them: `name`/q1 has the most noise."""
    size = len(losses) // QUARTERS
    quarters = {f"{name}/q{i + 1}": fmean(losses[i * size : (i + 1) * size]) for i in range(QUARTERS)}
    return {name: fmean(losses), **quarters}
