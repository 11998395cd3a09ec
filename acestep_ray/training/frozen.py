"""The frozen base model below a LoRA: how it is stored, and how it gets there without more of it in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from acestep_ray.config import TrainConfig
from acestep_ray.errors import InputError
from acestep_ray.hints import one_of
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.models.fusing import why_not_fused
from acestep_ray.models.quantised import FORMS, QuantisedLinear, quantise_linear_layers
from acestep_ray.models.transformer import ACEStepTransformer, DepthwiseConv
from acestep_ray.training.initial_lora import initial_loras, load_lora
from acestep_ray.training.lora import add_lora
from acestep_ray.training.lora_config import adapter_configs

AUTOCAST_DTYPES = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}
"""What matrix products are computed in; "32" is not among them."""

UNQUANTISED = "none"
# The rest is small, or every frame depends on it: embedders, modulation, the last layer, the SSL projectors.
_QUANTISED_PARTS = ("transformer_blocks", "lyric_encoder")

# Read by autocast in its own precision, whatever they are stored in.
_CAST_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, DepthwiseConv)


def check_quantisation(config: TrainConfig) -> None:
    """Raise InputError for a way of storing the frozen weights that there is not, or where none are frozen."""
    where = f"--quantize_base {config.quantize_base}"
    if config.quantize_base not in (UNQUANTISED, *FORMS):
        raise InputError(
            "unknown way to quantise", where=where, fix=one_of(config.quantize_base, (UNQUANTISED, *FORMS))
        )
    if config.quantize_base != UNQUANTISED and config.lora_config_path is None:
        raise InputError(
            "quantised weights cannot be trained, only a LoRA on them",
            where=where,
            fix="give --lora_config_path, or leave the flag out",
        )


def store_frozen(transformer: nn.Module, config: TrainConfig, device: torch.device | str) -> None:
    """Keep what is not trained in as little memory as the settings ask for; in place.

    What is quantised comes to `device` layer by layer, and then the rest.
    """
    if config.quantize_base == UNQUANTISED:
        if config.precision == "bf16-true":
            store_products_as(transformer, torch.bfloat16)
        return
    quantise_linear_layers(transformer, _QUANTISED_PARTS, config.quantize_base, device)
    half = AUTOCAST_DTYPES.get(config.precision)
    if half is not None:
        store_products_as(transformer, half)
    transformer.to(device)


def store_products_as(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Keep what is not trained and only met in matrix products in autocast's `dtype`: half the memory, same numbers.

    Autocast would round those weights in every step. Norms, embeddings and modulation stay float32.
    """
    for module in transformer.modules():
        if isinstance(module, _CAST_BY_AUTOCAST):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def wants_fused(config: TrainConfig) -> bool:
    """Whether the settings ask for the fused path, which computes in bfloat16."""
    return config.fused and AUTOCAST_DTYPES.get(config.precision) is torch.bfloat16


def reads_weights(lora: Mapping[str, Any]) -> bool:
    """Whether a LoRA begins with numbers that follow from the weights it changes: DoRA's magnitudes do."""
    return any(fields.get("use_dora") for fields in adapter_configs(lora).values())


def load_frozen(
    config: TrainConfig, device: torch.device, *, shares_base: bool = False
) -> ACEStepTransformer:
    """The base model on `device`, nothing of it trained, as the settings store it.

    It is read into that form tensor by tensor: never is all of it in memory in float32 where half the memory is enough.
    Where `fuse_passes` will move weights to bfloat16, they are in it from the start; those of a model that
    `shares_base` with others it leaves alone.
    """
    checkpoint = CheckpointDir.open(config.checkpoint_dir)
    is_plain = config.quantize_base == UNQUANTISED
    will_fuse = (
        wants_fused(config)
        and not shares_base
        and why_not_fused(checkpoint.transformer_config.attention_head_dim, device) is None
    )
    in_half = is_plain and (config.precision == "bf16-true" or will_fuse)
    transformer = checkpoint.load_transformer(
        _product_dtype if in_half else torch.float32, device=device if is_plain else "cpu"
    )
    transformer.requires_grad_(False)
    store_frozen(transformer, config, device)
    return transformer


def _product_dtype(module: nn.Module) -> torch.dtype:
    return torch.bfloat16 if isinstance(module, _CAST_BY_AUTOCAST) else torch.float32


def with_lora(
    base: ACEStepTransformer, config: TrainConfig, lora: Mapping[str, Any], device: torch.device
) -> ACEStepTransformer:
    """A transformer with a LoRA of its own on the tensors of a frozen `base` on `device`.

    PEFT makes LoRA's matrices in the precision of the weights that it finds; ours are float32. So it finds stand-ins.
    """
    transformer = _without_weights(base, device)
    add_seeded_lora(transformer, config, lora)
    _put_on(transformer, base)
    return transformer


def add_seeded_lora(transformer: nn.Module, config: TrainConfig, lora: Mapping[str, Any]) -> None:
    """A new LoRA, which follows from the run's seed, or that of `--init_lora_path`; in place."""
    torch.manual_seed(config.seed)  # LoRA's first matrices are random
    add_lora(transformer, lora)
    for adapter, path in initial_loras(config.init_lora_path, lora).items():
        load_lora(transformer, path, adapter)


def _without_weights(base: ACEStepTransformer, device: torch.device) -> ACEStepTransformer:
    """A transformer like `base` with float32 stand-ins for its weights that take no memory."""
    with torch.device("meta"):
        transformer = ACEStepTransformer(base.config)
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
