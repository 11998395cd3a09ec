"""Noise schedules of the released model: flow matching with a shifted, discrete set of sigmas."""

from __future__ import annotations

import torch
from torch import Tensor

TRAINING_STEPS = 1000
DEFAULT_SHIFT = 3.0


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """σ' = shift · σ / (1 + (shift − 1) · σ) (Esser et al., 2024, section 5.3.2)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def training_sigmas(shift: float = DEFAULT_SHIFT) -> Tensor:
    """The 1000 float32 noise levels of training, from the noisiest; the timestep fed to the model is 1000 · σ."""
    steps = torch.arange(TRAINING_STEPS, 0, -1, dtype=torch.float32)
    return shift_sigmas(steps / TRAINING_STEPS, shift)


def sigma_index(u: Tensor) -> Tensor:
    """Index into `training_sigmas` for u in (0, 1): floor(1000 · u)."""
    return (u * TRAINING_STEPS).long().clamp_(max=TRAINING_STEPS - 1)


def sampling_sigmas(steps: int, shift: float = DEFAULT_SHIFT) -> Tensor:
    """The `steps` + 1 float32 noise levels of the sampler, the last of them 0.

    Evenly spaced between the shifted ends of the training schedule, and shifted once more, as the released model is
    sampled.
    """
    ends = training_sigmas(shift)
    timesteps = torch.linspace(
        float(ends[0]) * TRAINING_STEPS, float(ends[-1]) * TRAINING_STEPS, steps, dtype=torch.float64
    )
    sigmas = shift_sigmas(timesteps / TRAINING_STEPS, shift).to(torch.float32)
    return torch.cat([sigmas, sigmas.new_zeros(1)])
