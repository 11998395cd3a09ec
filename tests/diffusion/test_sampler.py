from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from acestep_ray.diffusion import sampler
from acestep_ray.diffusion.guidance import ProjectedGuidance
from acestep_ray.diffusion.sampler import sample
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.models.transformer_config import TransformerConfig
from acestep_ray.tiny_checkpoint import TRANSFORMER_CONFIG


@pytest.fixture(scope="module")
def transformer() -> ACEStepTransformer:
    torch.manual_seed(0)
    return ACEStepTransformer(TransformerConfig.from_dict(TRANSFORMER_CONFIG)).eval()


def inputs(transformer: ACEStepTransformer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    condition = {
        "text": torch.randn(1, 3, transformer.config.text_embedding_dim),
        "text_mask": torch.ones(1, 3, dtype=torch.bool),
        "speaker": torch.randn(1, 512),
        "lyric_ids": torch.tensor([[4, 5, 6]]),
        "lyric_mask": torch.ones(1, 3, dtype=torch.bool),
    }
    return torch.randn(1, 8, 16, 12), condition


@pytest.mark.parametrize(("scheduler", "evaluations"), [("euler", 5), ("heun", 9), ("pingpong", 5)])
def test_guidance_averages_over_every_evaluation(transformer, monkeypatch, scheduler, evaluations):
    averages = []

    class Watched(ProjectedGuidance):
        def __call__(self, conditional, unconditional):
            before = self.average
            guided = super().__call__(conditional, unconditional)
            averages.append((before, conditional - unconditional, self.average))
            return guided

    monkeypatch.setattr(sampler, "ProjectedGuidance", Watched)
    noise, condition = inputs(transformer)
    sample(transformer, noise, condition, steps=5, scheduler=scheduler, seeds=[0])
    assert len(averages) == evaluations
    assert averages[0][0] is None
    for (_, _, last), (before, difference, after) in pairwise(averages):
        torch.testing.assert_close(before, last)
        torch.testing.assert_close(after, difference - 0.75 * before)
