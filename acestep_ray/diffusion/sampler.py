"""The sampler of the released model: noise and conditions to latents, with guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from acestep_ray.diffusion.guidance import ProjectedGuidance
from acestep_ray.diffusion.schedule import DEFAULT_SHIFT, TRAINING_STEPS, sampling_sigmas
from acestep_ray.diffusion.solvers import EULER, solve
from acestep_ray.models.transformer import ACEStepTransformer


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
    scheduler: str = EULER,
    seeds: Sequence[int] = (),
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents (B, 8, 16, W) from `noise` of that shape, for songs of one length.

    `condition` holds the arguments of `ACEStepTransformer.encode_condition`. A guidance scale of 1 or less turns
    guidance off. `scheduler` is one of `solvers.SCHEDULERS`; the fresh noise of `pingpong` needs `seeds`, one a song.
    `on_step` is called with the number of steps done.
    """
    guided = guidance_scale > 1
    if guided:
        condition = with_unconditional(condition)
    encoded = transformer.encode_condition(**condition)
    guidance = ProjectedGuidance(guidance_scale)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        model_input = torch.cat([x, x]) if guided else x
        timesteps = (sigma * TRAINING_STEPS).expand(model_input.shape[0])
        predicted = transformer.decode(model_input, timesteps, encoded).velocity.to(x.dtype)
        return guidance(*predicted.chunk(2)) if guided else predicted

    sigmas = sampling_sigmas(steps, shift).to(noise.device)
    return solve(velocity, noise, sigmas, scheduler=scheduler, omega=omega, seeds=seeds, on_step=on_step)


def with_unconditional(condition: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch twice: as it is, and with text, speaker, lyric ids and lyric mask zeroed (the text mask stays)."""
    kept = {"text_mask", "lyric_start"}
    return {
        name: torch.cat([value, value if name in kept else torch.zeros_like(value)])
        for name, value in condition.items()
    }
