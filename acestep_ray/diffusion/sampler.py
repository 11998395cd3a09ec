"""The Euler sampler of the released model, with its omega."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from acestep_ray.diffusion.guidance import ProjectedGuidance
from acestep_ray.diffusion.schedule import DEFAULT_SHIFT, TRAINING_STEPS, sampling_sigmas
from acestep_ray.models.transformer import ACEStepTransformer


def step_scale(omega: float) -> float:
    """The factor on a step's deviation from its mean: a sigmoid between 0.9 and 1.1, 1 at omega 0."""
    return 0.9 + 0.2 / (1 + math.exp(-0.1 * omega))


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor, omega: float) -> Tensor:
    """One step of x (B, C, H, W). The mean is each song's own, so that a song does not depend on its batch."""
    dx = (next_sigma - sigma) * velocity
    mean = dx.mean(dim=(1, 2, 3), keepdim=True)
    return x + (dx - mean) * step_scale(omega) + mean


@torch.no_grad()
def sample(
    transformer: ACEStepTransformer,
    noise: Tensor,
    condition: dict[str, Tensor],
    *,
    steps: int,
    guidance_scale: float = 15.0,
    omega: float = 10.0,
    shift: float = DEFAULT_SHIFT,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents (B, 8, 16, W) from `noise` of that shape, for songs of one length.

    `condition` holds the arguments of `ACEStepTransformer.encode_condition`. A guidance scale of 1 or less turns
    guidance off. `on_step` is called with the number of steps done.
    """
    guided = guidance_scale > 1
    if guided:
        condition = with_unconditional(condition)
    encoded = transformer.encode_condition(**condition)
    guidance = ProjectedGuidance(guidance_scale)
    sigmas = sampling_sigmas(steps, shift).to(noise.device)
    x = noise
    for step in range(steps):
        model_input = torch.cat([x, x]) if guided else x
        timesteps = (sigmas[step] * TRAINING_STEPS).expand(model_input.shape[0])
        velocity = transformer.decode(model_input, timesteps, encoded).velocity.to(x.dtype)
        if guided:
            velocity = guidance(*velocity.chunk(2))
        x = euler_step(x, velocity, sigmas[step], sigmas[step + 1], omega)
        if on_step is not None:
            on_step(step + 1)
    return x


def with_unconditional(condition: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch twice: as it is, and with text, speaker, lyric ids and lyric mask zeroed (the text mask stays)."""
    kept = {"text_mask", "lyric_start"}
    return {
        name: torch.cat([value, value if name in kept else torch.zeros_like(value)])
        for name, value in condition.items()
    }
