"""LoRA files as other programs read them; docs/export.md says which program takes which.

In every format the scale is folded into B, so that alpha is the rank: readers of no alpha, of `.alpha` tensors and of
the metadata then agree. Matrices have the dimensions that PEFT gives them in the original model, whose 1 × 1
convolutions are convolutions.

DoRA (Liu et al., 2024, arXiv:2402.09353) adds `lora_magnitude_vector` under PEFT's name, in the first two formats. The
programs that read the other two know no such key and would play the rest as a LoRA that nobody trained.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from acestep_ray.errors import InputError
from acestep_ray.export.names import flattened, is_convolution
from acestep_ray.export.reading import LORA_FILE, METADATA_KEY, PEFT_CONFIG, PEFT_FILE, LoraUpdate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Updates = Mapping[str, LoraUpdate]
Notes = Mapping[str, str]
"""Further entries of a file's metadata, which all programs pass over."""


def format_files(
    updates: Updates,
    format_name: str,
    *,
    name: str,
    dtype: torch.dtype = torch.float32,
    notes: Notes | None = None,
) -> dict[str, bytes]:
    """The files of a LoRA in one of `FORMATS`, by name; `name` is what a file is called that has no name of its own.

    Raises InputError where the format cannot hold it.
    """
    write = FORMATS[format_name]
    if write in (_comfyui, _kohya):
        doras = [module for module, update in updates.items() if update.magnitude is not None]
        if doras:
            raise InputError(
                f"the format `{format_name}` cannot hold a DoRA, and `{doras[0]}` is one",
                where=f"--format {format_name}",
                fix="use --format universal or peft, or merge it into the model with `acestep-ray export merge`",
            )
    return write(updates, name, dtype, {"format": "pt", **(notes or {})})


def universal_bytes(
    updates: Updates, dtype: torch.dtype = torch.float32, notes: Notes | None = None
) -> bytes:
    """A LoRA as the `pytorch_lora_weights.safetensors` that plays at one strength everywhere."""
    return _universal(updates, "", dtype, {"format": "pt", **(notes or {})})[LORA_FILE]


def peft_metadata(updates: Updates) -> dict[str, Any]:
    """The fields of PEFT's `LoraConfig` that describe the matrices: alpha is the rank, for the scale is in them."""
    ranks = {module: update.rank for module, update in updates.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "use_rslora": False,
        "use_dora": any(update.magnitude is not None for update in updates.values()),
        "bias": "none",
        "target_modules": sorted(updates),
        "rank_pattern": others,
        "alpha_pattern": others,
    }


def _universal(updates: Updates, name: str, dtype: torch.dtype, metadata: Notes) -> dict[str, bytes]:
    described = json.dumps(peft_metadata(updates), indent=2, sort_keys=True)  # as diffusers writes it
    content = save(_tensors(updates, dtype, "{module}"), {**metadata, METADATA_KEY: described})
    return {LORA_FILE: content}


def _peft(updates: Updates, name: str, dtype: torch.dtype, metadata: Notes) -> dict[str, bytes]:
    config = {
        **peft_metadata(updates),
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
    }
    return {
        PEFT_FILE: save(_tensors(updates, dtype, "base_model.model.{module}"), dict(metadata)),
        PEFT_CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
    }


def _comfyui(updates: Updates, name: str, dtype: torch.dtype, metadata: Notes) -> dict[str, bytes]:
    tensors = _tensors(updates, dtype, "diffusion_model.{module}")
    alphas = {f"diffusion_model.{module}.alpha": _alpha(update) for module, update in updates.items()}
    return {f"{name}.safetensors": save(tensors | alphas, dict(metadata))}


def _kohya(updates: Updates, name: str, dtype: torch.dtype, metadata: Notes) -> dict[str, bytes]:
    tensors: dict[str, Tensor] = {}
    for module, update in updates.items():
        a, b = _matrices(module, update, dtype)
        key = f"lora_unet_{flattened(module)}"
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": _alpha(update)}
    common = str(peft_metadata(updates)["r"])
    described = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": common,
        "ss_network_alpha": common,
    }
    return {f"{name}.safetensors": save(tensors, {**metadata, **described})}


FORMATS: dict[str, Callable[[Updates, str, torch.dtype, Notes], dict[str, bytes]]] = {
    "universal": _universal,
    "peft": _peft,
    "comfyui": _comfyui,
    "kohya": _kohya,
}


def _tensors(updates: Updates, dtype: torch.dtype, key: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module, update in updates.items():
        name = key.format(module=module)
        a, b = _matrices(module, update, dtype)
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        if update.magnitude is not None:
            magnitude = update.magnitude[None, :, None] if is_convolution(module) else update.magnitude
            tensors[f"{name}.lora_magnitude_vector"] = magnitude.to(dtype).contiguous()
    return tensors


def _matrices(module: str, update: LoraUpdate, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b = update.a.to(dtype).contiguous(), update.b.to(dtype).contiguous()
    return (a[..., None], b[..., None]) if is_convolution(module) else (a, b)


def _alpha(update: LoraUpdate) -> Tensor:
    return torch.tensor(float(update.rank))
