"""One frozen base model for several trials of a process: of each trial only its LoRA is its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from acestep_ray.config import TrainConfig
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.training.frozen import load_frozen, with_lora
from acestep_ray.training.model import fuse_passes


class SharedBase:
    """The base model, stored as the settings say, and models of trials made on it."""

    def __init__(self, config: TrainConfig, device: torch.device):
        self.base = load_frozen(config, device, shares_base=True)

    def build(
        self, config: TrainConfig, lora: Mapping[str, Any] | None, device: torch.device
    ) -> ACEStepTransformer:
        """What `build_transformer` gives, number for number, on the base's own tensors."""
        assert lora is not None, "a trial trains nothing but its LoRA"
        transformer = with_lora(self.base, config, lora, device)
        fuse_passes(transformer, config, device, is_lora=True, shares_base=True)
        transformer.activation_checkpointing = config.activation_checkpointing
        return transformer
