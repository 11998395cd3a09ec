"""Noise schedules, guidance and sampler against the original's."""

from __future__ import annotations

import re

import torch

from acestep_ray.diffusion.guidance import ProjectedGuidance
from acestep_ray.diffusion.sampler import sample
from acestep_ray.diffusion.schedule import sampling_sigmas, training_sigmas
from tests.golden.cases import build_transformer


def test_training_schedule_is_the_originals(golden):
    sigmas = training_sigmas()
    torch.testing.assert_close(sigmas, golden.tensors["scheduler/train/sigmas"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        sigmas * 1000, golden.tensors["scheduler/train/timesteps"], rtol=1e-6, atol=1e-4
    )


def test_sampling_schedules_are_the_originals(golden):
    step_counts = {int(n) for key in golden.tensors for n in re.findall(r"scheduler/infer(\d+)/", key)}
    assert step_counts
    for steps in step_counts:
        sigmas = sampling_sigmas(steps)
        prefix = f"scheduler/infer{steps}"
        torch.testing.assert_close(sigmas, golden.tensors[f"{prefix}/sigmas"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            sigmas[:-1] * 1000, golden.tensors[f"{prefix}/timesteps"], rtol=1e-5, atol=1e-4
        )


def test_successive_guided_predictions_share_their_momentum_as_the_originals(golden):
    guidance = ProjectedGuidance(scale=15.0)
    count = sum(key.startswith("apg/out/") for key in golden.tensors)
    assert count
    for i in range(count):
        out = guidance(golden.tensors[f"apg/in/cond{i}"], golden.tensors[f"apg/in/uncond{i}"])
        torch.testing.assert_close(out, golden.tensors[f"apg/out/{i}"], rtol=1e-4, atol=1e-5)


def test_sampled_latents_are_the_originals(golden):
    inputs = {
        k.removeprefix("sampler/in/"): v for k, v in golden.tensors.items() if k.startswith("sampler/in/")
    }
    case = golden.manifest["cases"]["sampler"]
    noise = inputs.pop("noise")
    latents = sample(
        build_transformer(golden),
        noise,
        inputs,
        steps=case["steps"],
        guidance_scale=case["guidance_scale"],
        omega=case["omega"],
    )
    # Several forward passes in a row, each difference times the guidance scale: ten times one pass's tolerance.
    torch.testing.assert_close(latents, golden.tensors["sampler/out/latents"], rtol=1e-4, atol=1e-4)
