"""One frozen base model for several trials of a process: of each trial only its LoRA is its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from acestep_ray.config import TrainConfig
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.models.quantised import QuantisedLinear
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.training.initial_lora import initial_loras, load_lora
from acestep_ray.training.lora import add_lora
from acestep_ray.training.model import UNQUANTISED, fuse_passes, store_frozen


class SharedBase:
    """The base model, stored as the settings say, and models of trials made on it."""

    def __init__(self, config: TrainConfig, device: torch.device):
        home = device if config.quantize_base == UNQUANTISED else "cpu"
        self.base = CheckpointDir.open(config.checkpoint_dir).load_transformer(device=home)
        self.base.requires_grad_(False)
        store_frozen(self.base, config, device)

    def build(
        self, config: TrainConfig, lora: Mapping[str, Any] | None, device: torch.device
    ) -> ACEStepTransformer:
        """What `build_transformer` gives, number for number, on the base's own tensors."""
        assert lora is not None, "a trial trains nothing but its LoRA"
        transformer = self._without_weights(config, device)
        torch.manual_seed(config.seed)  # LoRA's first matrices are random
        add_lora(transformer, lora)
        for adapter, path in initial_loras(config.init_lora_path, lora).items():
            load_lora(transformer, path, adapter)
        _put_on(transformer, self.base)
        fuse_passes(transformer, config, device, is_lora=True, shares_base=True)
        transformer.activation_checkpointing = config.activation_checkpointing
        return transformer

    def _without_weights(self, config: TrainConfig, device: torch.device) -> ACEStepTransformer:
        """The transformer with float32 stand-ins for its weights that take no memory.

        PEFT makes LoRA's matrices in the precision of the weights that it finds; ours are float32.
        """
        with torch.device("meta"):
            transformer = ACEStepTransformer(self.base.config)
        stand_ins = {
            name: torch.zeros((), device=device).expand(tensor.shape)
            for name, tensor in transformer.state_dict().items()
        }
        transformer.load_state_dict(stand_ins, assign=True)
        return transformer


def _put_on(model: nn.Module, base: nn.Module) -> None:
    """Give `model`, below its LoRA layers, the parameters of `base` and its quantised layers; in place."""
    for name, parameter in base.named_parameters(recurse=False):
        setattr(model, name, parameter)
    for name, layer in base.named_children():
        mine = getattr(model, name)
        is_lora = isinstance(mine, LoraLayer)
        if not isinstance(layer, QuantisedLinear):
            _put_on(mine.get_base_layer() if is_lora else mine, layer)
        elif is_lora:
            mine.base_layer = layer
        else:
            setattr(model, name, layer)
