"""What modules of the transformer are called: with dots, and with underscores as in `lora_unet_…` keys."""

from __future__ import annotations

import re
from functools import lru_cache

import torch
from torch import nn

from acestep_ray.models.transformer import ACEStepTransformer, PointwiseConv, is_unused_parameter
from acestep_ray.models.transformer_config import TransformerConfig

# They are in the model for the SSL losses alone.
_WITHOUT_EFFECT = "projectors"


def is_module(name: str) -> bool:
    """Whether an ACE-Step v1 transformer, of any number of blocks, has a module of this name with own weights."""
    return _template(name) in _modules() or is_unused_parameter(f"{name}.weight")


def is_convolution(name: str) -> bool:
    """Whether the module is one of the original's 1 × 1 convolutions, whose matrices have a third dimension."""
    return issubclass(_modules().get(_template(name), nn.Module), PointwiseConv)


def can_have_lora(name: str) -> bool:
    """Whether a LoRA of the module is a matrix product that changes the music."""
    return issubclass(_modules().get(_template(name), nn.Module), nn.Linear) and changes_music(name)


def changes_music(name: str) -> bool:
    """Whether a module or parameter has a part in the velocity."""
    return name.split(".")[0] != _WITHOUT_EFFECT and not is_unused_parameter(name)


def short_name(name: str) -> str:
    """What a module is called in `target_modules`: the last part of its name, or two if that is a number or `conv`."""
    before, _, last = name.rpartition(".")
    is_telling = last != "conv" and not last.isdecimal()
    return last if is_telling or not before else f"{before.rpartition('.')[2]}.{last}"


def flattened(name: str) -> str:
    """`transformer_blocks.0.attn.to_q` → `transformer_blocks_0_attn_to_q`."""
    return name.replace(".", "_")


def unflattened(name: str) -> str:
    """`transformer_blocks_0_attn_to_q` → `transformer_blocks.0.attn.to_q`; a name of another model is left as it is."""
    known = {flattened(template): template for template in _modules()}.get(_template(name))
    numbers = iter(re.findall(r"\d+", name))
    return name if known is None else re.sub("#", lambda _: next(numbers), known)


def _template(name: str) -> str:
    return re.sub(r"\d+", "#", name)


@lru_cache(maxsize=1)
def _modules() -> dict[str, type[nn.Module]]:
    """The kinds of all modules with weights of their own, by name with `#` for numbers."""
    config = TransformerConfig(num_layers=1, ssl_encoder_depths=(0, 0))
    with torch.device("meta"):
        modules = ACEStepTransformer(config).named_modules()
    return {_template(name): type(module) for name, module in modules if hasattr(module, "weight")}
