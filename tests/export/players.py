"""The programs that play LoRAs, each reduced to its documented rule; they share nothing with our reader.

A player takes a file or directory and a model's weights by name, and returns the weights that it would play. It refuses
keys that the program would pass over, for then it would play something else.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from safetensors import safe_open

Weights = dict[str, torch.Tensor]


def load(path: Path) -> tuple[Weights, dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def added(weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float) -> torch.Tensor:
    product = b.flatten(1).float() @ a.flatten(1).float()
    return weight + scale * product.reshape(weight.shape)


def by_pattern(patterns: dict, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the whole name, or its end after a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def original_v1(directory: Path, weights: Weights) -> Weights:
    """Bare keys in a file of one name; the metadata is PEFT's configuration."""
    tensors, metadata = load(directory / "pytorch_lora_weights.safetensors")
    assert next(iter(tensors)).endswith((".lora_A.weight", ".lora_B.weight"))  # diffusers looks at the first
    return played_by_peft(tensors, json.loads(metadata["lora_adapter_metadata"]), weights)


def original_v1_without_metadata(directory: Path, weights: Weights) -> Weights:
    """With the diffusers of its time: alpha is the rank."""
    tensors, _ = load(directory / "pytorch_lora_weights.safetensors")
    played = dict(weights)
    modules = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    assert len(tensors) == 2 * len(modules)
    for module in modules:
        a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        played[f"{module}.weight"] = added(weights[f"{module}.weight"], b, a, 1.0)
    return played


simple_tuner = original_v1_without_metadata


def peft_directory(directory: Path, weights: Weights) -> Weights:
    """`adapter_config.json` beside keys that begin with `base_model.model.`."""
    tensors, _ = load(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    prefix = "base_model.model."
    assert all(key.startswith(prefix) for key in tensors)
    bare = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return played_by_peft(bare, config, weights)


def played_by_peft(tensors: Weights, config: dict, weights: Weights) -> Weights:
    played, read = dict(weights), 0
    for module in {key.split(".lora_")[0] for key in tensors}:
        a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        rank = by_pattern(config["rank_pattern"], module, config["r"])
        alpha = by_pattern(config["alpha_pattern"], module, config["lora_alpha"])
        weight = weights[f"{module}.weight"]
        assert a.ndim == b.ndim == weight.ndim  # PEFT's layers have the dimensions of what they sit on
        assert a.shape[0] == rank
        new = added(weight, b, a, alpha / (math.sqrt(rank) if config["use_rslora"] else rank))
        if config["use_dora"]:
            magnitude = tensors[f"{module}.lora_magnitude_vector"].flatten()
            lengths = new.flatten(1).norm(dim=1)
            new = new * (magnitude / lengths).reshape(-1, *[1] * (new.ndim - 1))
        played[f"{module}.weight"] = new
        read += 3 if config["use_dora"] else 2
    assert read == len(tensors)
    return played


def comfyui_v1(file: Path, weights: Weights) -> Weights:
    """Three names for every weight, two pairs of suffixes, `.alpha` over the rank or 1; no metadata."""
    return played_by_comfyui(
        file, weights, lambda m: (m, f"diffusion_model.{m}", f"lora_unet_{m.replace('.', '_')}")
    )


def comfyui_15(file: Path, weights: Weights) -> Weights:
    """Two more names."""

    def names(module: str) -> tuple[str, ...]:
        flat = module.replace(".", "_")
        return (
            module,
            f"diffusion_model.{module}",
            f"lora_unet_{flat}",
            f"base_model.model.{module}",
            f"lycoris_{flat}",
        )

    return played_by_comfyui(file, weights, names)


def kohya(file: Path, weights: Weights) -> Weights:
    """`lora_unet_` and underscores, `lora_down` and `lora_up`, and an alpha for every module."""
    tensors, _ = load(file)
    assert all(key.startswith("lora_unet_") for key in tensors)
    downs = {key for key in tensors if key.endswith(".lora_down.weight")}
    assert {key.replace(".lora_down.weight", ".alpha") for key in downs} <= set(tensors)
    return played_by_comfyui(file, weights, lambda m: (f"lora_unet_{m.replace('.', '_')}",))


def played_by_comfyui(file: Path, weights: Weights, names) -> Weights:
    tensors, _ = load(file)
    played, read = dict(weights), set()
    for key, weight in weights.items():
        if not key.endswith(".weight"):
            continue
        for name in names(key.removesuffix(".weight")):
            for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
                if f"{name}.{up}.weight" in tensors:
                    a, b = tensors[f"{name}.{down}.weight"], tensors[f"{name}.{up}.weight"]
                    scale = 1.0
                    if f"{name}.alpha" in tensors:
                        scale = tensors[f"{name}.alpha"].item() / a.shape[0]
                        read.add(f"{name}.alpha")
                    played[key] = added(weight, b, a, scale)
                    read |= {f"{name}.{down}.weight", f"{name}.{up}.weight"}
    assert read == set(tensors)
    return played
