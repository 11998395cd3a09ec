"""LoRAs of a model in memory: taken out of one that was trained, merged into one that is to play.

What training writes is the file that plays at the same strength in every program: see `formats.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from acestep_ray.errors import InputError
from acestep_ray.export.formats import universal_bytes
from acestep_ray.export.keys import other_model
from acestep_ray.export.reading import LORA_FILE, LoraUpdate, find_lora_file, read_lora
from acestep_ray.models.transformer import is_unused_parameter

ADAPTER_NAME = "lora_adapter"
"""The only adapter's name, where the configuration names none; as in the original trainer."""

_OTHER_MODEL = "use the checkpoint that the LoRA was trained on"
_LISTED = 5


def lora_layers(model: nn.Module, adapter: str | None = None) -> dict[str, LoraLayer]:
    """The LoRA layers of a model, all or those with this adapter, by the name of the module they sit on."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and (adapter is None or adapter in module.lora_A)
    }


def lora_updates(model: nn.Module, adapter: str) -> dict[str, LoraUpdate]:
    """What the adapter makes of each module's weight, on the CPU."""
    updates = {}
    for name, layer in lora_layers(model, adapter).items():
        a, b, magnitude = lora_weights(layer, adapter)
        b = b * layer.scaling[adapter]
        updates[name] = LoraUpdate(_on_cpu(a), _on_cpu(b), None if magnitude is None else _on_cpu(magnitude))
    return updates


def lora_weights(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """The adapter's own matrices A (rank, in) and B (out, rank) of a layer, and of a DoRA its magnitudes (out,)."""
    a, b = (cast(nn.Linear, matrices[adapter]).weight for matrices in (layer.lora_A, layer.lora_B))
    vectors = layer.lora_magnitude_vector
    return a, b, cast(Tensor, vectors[adapter].weight) if adapter in vectors else None


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)


def lora_bytes(model: nn.Module, adapter: str) -> bytes:
    """The adapter as a `pytorch_lora_weights.safetensors` file."""
    return universal_bytes(lora_updates(model, adapter))


def lora_files(model: nn.Module) -> dict[str, bytes]:
    """The LoRA files of all adapters, by name within a checkpoint's folder: `NAME/…` where adapters have names."""
    adapters = dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.lora_A)
    return {
        LORA_FILE if name == ADAPTER_NAME else f"{name}/{LORA_FILE}": lora_bytes(model, name)
        for name in adapters
    }


@torch.no_grad()
def merge_loras(model: nn.Module, loras: Sequence[tuple[str | Path, float]]) -> None:
    """Change the model's own weights as LoRA files say, each with its strength: W + strength · (W' − W), where W' is
    W + B A, or DoRA's. Their order does not matter.

    Nothing is changed before all were found to fit. Raises InputError for a file that is no LoRA, or is one for another
    model.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    read = []
    for path, strength in loras:
        path = find_lora_file(path)
        updates = read_lora(path)
        check_lora_fits(updates, shapes, path)
        read.append((updates, strength))
    merge_updates(model, read)


@torch.no_grad()
def merge_updates(model: nn.Module, loras: Iterable[tuple[Mapping[str, LoraUpdate], float]]) -> None:
    """As `merge_loras`, of LoRAs that are read already and fit."""
    parameters = dict(model.named_parameters())
    changes: dict[str, list[tuple[LoraUpdate, float]]] = {}
    for updates, strength in loras:
        for name, update in updates.items():
            changes.setdefault(f"{name}.weight", []).append((update, strength))
    for name, given in changes.items():
        if name in parameters:
            parameters[name].copy_(merged_weight(parameters[name], given))


def merged_weight(weight: Tensor, changes: Iterable[tuple[LoraUpdate, float]]) -> Tensor:
    """`weight` (out, in, …) with every change at its strength, in float32; each is one of the weight as it was."""
    before = weight.flatten(1).to(torch.float32)
    after = before.clone()
    for update, strength in changes:
        after += strength * (update.apply(before) - before)
    return after.view_as(weight)


def check_lora_fits(
    updates: Mapping[str, LoraUpdate], shapes: Mapping[str, Sequence[int]], path: Path | str
) -> None:
    """Raise InputError when a LoRA has modules that the model lacks or that have another size there.

    `shapes` are those of the model's parameters. What the model never reads needs no place in it.
    """
    problems = []
    for name, update in updates.items():
        shape = shapes.get(f"{name}.weight")
        if shape is None:
            if not is_unused_parameter(f"{name}.weight"):
                problems.append(f"`{name}` is not a module of this model")
            continue
        size = (shape[0], torch.Size(shape[1:]).numel())
        if update.shape != size:
            problems.append(f"`{name}` is {size} in the model, and {update.shape} in the LoRA")
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems[:_LISTED])
        other = other_model(name for name in updates if f"{name}.weight" not in shapes)
        more = f"\n  - and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise InputError(
            f"this LoRA was made for another model: {len(problems)} of its {len(updates)} modules do not fit",
            where=f"{path}{listed}{more}",
            fix=f"give a LoRA of ACE-Step v1; these are modules of {other}" if other else _OTHER_MODEL,
        )


def check_fits(name: str, update: LoraUpdate, size: tuple[int, int], path: Path) -> None:
    """Raise InputError when a LoRA was made for a module of another size than `size`, (out, in)."""
    if update.shape != size:
        raise InputError(
            f"`{name}` is {size} in the model, and {update.shape} in the LoRA",
            where=str(path),
            fix=_OTHER_MODEL,
        )
