"""Solvers of the flow dx/dσ = v(x, σ) from noise at σ = 1 to a song at σ = 0, those of the released model.

Each step goes from one noise level to the next. `velocity` is the (guided) prediction of x (B, C, H, W) at a level.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

EULER, HEUN, PING_PONG = SCHEDULERS = ("euler", "heun", "pingpong")

Velocity = Callable[[Tensor, Tensor], Tensor]


def solve(
    velocity: Velocity,
    noise: Tensor,
    sigmas: Tensor,
    *,
    scheduler: str = EULER,
    omega: float,
    seeds: Sequence[int] = (),
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """x at the last of `sigmas`, which is 0, from `noise` (B, C, H, W) at the first.

    `seeds`, one a song, decide the fresh noise of ping-pong. Raises ValueError for an unknown scheduler, and for
    ping-pong without a seed for each song.
    """
    if scheduler not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {scheduler!r}")
    if scheduler == PING_PONG and len(seeds) != len(noise):
        raise ValueError(f"{len(seeds)} seeds for {len(noise)} songs")
    x = noise
    steps = len(sigmas) - 1
    for step in range(steps):
        sigma, next_sigma = sigmas[step], sigmas[step + 1]
        is_last = step + 1 == steps
        if scheduler == PING_PONG:
            fresh = None if is_last else fresh_noise(seeds, step, x)
            x = ping_pong_step(velocity, x, sigma, next_sigma, fresh)
        elif scheduler == HEUN and not is_last:
            x = heun_step(velocity, x, sigma, next_sigma, omega)
        else:
            x = euler_step(velocity, x, sigma, next_sigma, omega)
        if on_step is not None:
            on_step(step + 1)
    return x


def euler_step(velocity: Velocity, x: Tensor, sigma: Tensor, next_sigma: Tensor, omega: float) -> Tensor:
    """A step along the velocity where it begins."""
    return x + rescaled((next_sigma - sigma) * velocity(x, sigma), omega)


def heun_step(velocity: Velocity, x: Tensor, sigma: Tensor, next_sigma: Tensor, omega: float) -> Tensor:
    """A step along the mean of the velocities where it begins and where an Euler step would end: of second order."""
    first = velocity(x, sigma)
    trial = x + rescaled((next_sigma - sigma) * first, omega)
    mean = (first + velocity(trial, next_sigma)) / 2
    return x + rescaled((next_sigma - sigma) * mean, omega)


def ping_pong_step(
    velocity: Velocity, x: Tensor, sigma: Tensor, next_sigma: Tensor, fresh: Tensor | None
) -> Tensor:
    """To the song that is predicted, and with `fresh` noise of x's shape back to the next level; None for level 0."""
    song = x - sigma * velocity(x, sigma)
    return song if fresh is None else (1 - next_sigma) * song + next_sigma * fresh


def rescaled(dx: Tensor, omega: float) -> Tensor:
    """A step's change with its deviation from the mean scaled by omega.

    The mean is each song's own, so that a song does not depend on its batch.
    """
    mean = dx.mean(dim=(1, 2, 3), keepdim=True)
    return (dx - mean) * step_scale(omega) + mean


def step_scale(omega: float) -> float:
    """The factor on a change's deviation from its mean: 0.9 + 0.2 / (1 + exp(-0.1 · omega)), 1 at omega 0."""
    return 1 + 0.1 * math.tanh(0.05 * omega)


def fresh_noise(seeds: Sequence[int], step: int, like: Tensor) -> Tensor:
    """Standard normal noise of the shape (B, C, H, W) of `like`, a function of each song's seed and the step alone.

    Drawn on the CPU: the same on every device.
    """
    noise = torch.stack([_drawn(seed, step, like.shape[1:]) for seed in seeds])
    return noise.to(like.device, like.dtype)


def _drawn(seed: int, step: int, shape: torch.Size) -> Tensor:
    # Not seed + step: songs of neighbouring seeds would share their noise.
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator)
