"""The LoRA file that plays at the same strength in every program.

Bare keys (`transformer_blocks.0.attn.to_q.lora_A.weight`), no alpha tensors, and the scale folded into `lora_B`, so
that alpha equals rank: readers that know no alpha, and readers of the metadata, then agree.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from acestep_ray.errors import InputError

LORA_FILE = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of a model, by the name of the module they sit on."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def lora_state(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The adapter's matrices with the scale folded in, under bare keys, float32 on the CPU."""
    state = {}
    for name, layer in lora_layers(model).items():
        state[f"{name}.lora_A.weight"] = layer.lora_A[adapter].weight
        state[f"{name}.lora_B.weight"] = layer.lora_B[adapter].weight * layer.scaling[adapter]
    return {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in state.items()}


def lora_bytes(model: nn.Module, adapter: str) -> bytes:
    """The adapter as a `pytorch_lora_weights.safetensors` file."""
    layers = lora_layers(model)
    ranks = {name: layer.r[adapter] for name, layer in layers.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {name: rank for name, rank in ranks.items() if rank != common}
    # What the file holds, not what was trained: the scale is folded, so alpha is the rank and rsLoRA is off.
    metadata = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "target_modules": sorted(layers),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
    return save(
        lora_state(model, adapter), {"format": "pt", METADATA_KEY: json.dumps(metadata, sort_keys=True)}
    )


def write_lora(directory: Path, model: nn.Module, adapter: str) -> Path:
    """Write the adapter as `pytorch_lora_weights.safetensors` into `directory`; returns the file."""
    path = directory / LORA_FILE
    path.write_bytes(lora_bytes(model, adapter))
    return path


def find_lora_file(path: str | Path) -> Path:
    """The LoRA file that `path` names: itself, or the one in that directory. Raises InputError."""
    path = Path(path)
    if path.is_dir():
        path = path / LORA_FILE
    if not path.is_file():
        raise InputError(
            "no such LoRA", where=str(path), fix=f"give a {LORA_FILE} file or a directory that holds one"
        )
    return path


@torch.no_grad()
def merge_lora(model: nn.Module, path: str | Path, weight: float = 1.0) -> None:
    """Add a LoRA file to the model's own weights: W + weight · alpha / r · B A.

    Alpha is read from the metadata (`lora_alpha`, `use_rslora`), else it is the rank. Raises InputError for a file
    that is no LoRA, or is one for another model.
    """
    path = find_lora_file(path)
    tensors, metadata = _read(path)
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in tensors})
    if not modules or any(key.rsplit(".", 2)[-2] not in ("lora_A", "lora_B") for key in tensors):
        raise InputError("not a LoRA file with `lora_A` and `lora_B` weights", where=str(path))
    parameters = dict(model.named_parameters())
    for name in modules:
        target = parameters.get(f"{name}.weight")
        a, b = tensors.get(f"{name}.lora_A.weight"), tensors.get(f"{name}.lora_B.weight")
        if target is None or a is None or b is None:
            raise InputError(
                f"`{name}` is not a module of this model with both LoRA matrices", where=str(path)
            )
        if (b.shape[0], a.shape[1]) != tuple(target.shape[:2]) or a.shape[0] != b.shape[1]:
            raise InputError(
                f"`{name}` is {tuple(target.shape[:2])} in the model, and {b.shape[0], a.shape[1]} in the LoRA",
                where=str(path),
                fix="use the checkpoint that the LoRA was trained on",
            )
        delta = b.to(torch.float32) @ a.to(torch.float32) * (weight * _scale(metadata, name, a.shape[0]))
        target.add_(delta.view_as(target).to(target.device, target.dtype))


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            described = (file.metadata() or {}).get(METADATA_KEY, "{}")
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the LoRA ({error})", where=str(path)) from None
    try:
        return tensors, json.loads(described)
    except json.JSONDecodeError as error:
        raise InputError(f"the LoRA's metadata is not JSON ({error})", where=str(path)) from None


def _scale(metadata: dict, name: str, rank: int) -> float:
    alpha = (metadata.get("alpha_pattern") or {}).get(name, metadata.get("lora_alpha", rank))
    return alpha / (rank**0.5 if metadata.get("use_rslora") else rank)
