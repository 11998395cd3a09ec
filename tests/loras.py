"""LoRA files of models that tests have trained."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from acestep_ray.export.lora import lora_bytes
from acestep_ray.export.reading import LORA_FILE


def write_lora(directory: Path, model: nn.Module, adapter: str) -> Path:
    """Write an adapter as a training checkpoint has it; returns the file."""
    path = directory / LORA_FILE
    path.write_bytes(lora_bytes(model, adapter))
    return path
