"""Training checkpoints: what is trained, the optimizer and the step; never the frozen models.

A checkpoint is a directory `step=N`, written under another name and renamed: it is there whole, or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from acestep_ray.errors import AceStepError
from acestep_ray.export.lora import write_lora
from acestep_ray.training.lora import ADAPTER_NAME

WEIGHTS_FILE = "trainable.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
FORMAT = 1
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class TrainingState:
    """Everything that a run needs to go on."""

    step: int
    """Optimizer steps done."""
    losses: dict
    """What the run's summary says of its losses so far: `first`, `last`, `fixed_noise` by step."""


def step_directory(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step={step}"


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint of the highest step, if there is any."""
    found = {}
    if checkpoints.is_dir():
        for entry in checkpoints.iterdir():
            match = re.fullmatch(r"step=(\d+)", entry.name)
            if match and (entry / STATE_FILE).is_file():
                found[int(match[1])] = entry
    return found[max(found)] if found else None


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(
    checkpoints: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState
) -> Path:
    """Write `step=N` into `checkpoints`; returns its path."""
    target = step_directory(checkpoints, state.step)
    partial = checkpoints / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    parameters = trainable_parameters(model)
    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, partial / WEIGHTS_FILE)
    moments = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            moments[f"{name}/{key}"] = value.detach().cpu().contiguous()
    save_file(moments, partial / OPTIMIZER_FILE)
    write_lora(partial, model, ADAPTER_NAME)
    (partial / STATE_FILE).write_text(
        json.dumps({"format": FORMAT, "step": state.step, "losses": state.losses}, indent=1), encoding="utf-8"
    )
    for file in [*partial.iterdir(), partial]:
        _flush_to_disk(file)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _flush_to_disk(checkpoints)
    return target


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Put a checkpoint's weights and moments into `model` and `optimizer`.

    Raises AceStepError when it was written for other parameters.
    """
    parameters = trainable_parameters(model)
    weights = load_file(checkpoint / WEIGHTS_FILE)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    expected = {name: tuple(p.shape) for name, p in parameters.items()}
    if shapes != expected:
        different = sorted(set(shapes.items()) ^ set(expected.items()))
        raise AceStepError(
            f"{checkpoint} was written for other trained parameters, such as `{different[0][0]}`\n"
            "  → use another --exp_name, or the LoRA configuration that the run was started with"
        )
    moments = load_file(checkpoint / OPTIMIZER_FILE)
    fused = any(group["fused"] for group in optimizer.param_groups)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
            # Only the fused kernel counts its steps on the device.
            homes = {"step": parameter.device if fused else "cpu"}
            optimizer.state[parameter] = {
                key: moments[f"{name}/{key}"].to(homes.get(key, parameter.device)) for key in OPTIMIZER_STATE
            }
    values = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return TrainingState(step=values["step"], losses=values["losses"])


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
