"""Adaptive projected guidance with momentum (Sadat et al., 2024), in the released model's setting."""

from __future__ import annotations

import torch
from torch import Tensor

MOMENTUM = -0.75
NORM_THRESHOLD = 2.5
# Channels are guided apart: norms and projections are over (height, width).
PLANE = (-2, -1)


class ProjectedGuidance:
    """Guides successive predictions of one sampling run; keeps the running average of their differences."""

    def __init__(self, scale: float):
        self.scale = scale
        self.average: Tensor | None = None

    def __call__(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """The guided prediction (B, C, H, W), in the dtype of `conditional`."""
        difference = conditional - unconditional
        if self.average is not None:
            difference = difference + MOMENTUM * self.average
        self.average = difference
        norm = difference.norm(dim=PLANE, keepdim=True)
        difference = difference * torch.clamp(NORM_THRESHOLD / norm, max=1.0)
        return conditional + (self.scale - 1) * orthogonal_part(difference, conditional)


def orthogonal_part(x: Tensor, direction: Tensor) -> Tensor:
    """x without its part parallel to `direction`, per channel; computed in float64."""
    unit = torch.nn.functional.normalize(direction.to(torch.float64).flatten(-2), dim=-1).view_as(direction)
    wide = x.to(torch.float64)
    parallel = (wide * unit).sum(dim=PLANE, keepdim=True) * unit
    return (wide - parallel).to(x.dtype)
