"""A fine-tuned transformer in the released layout, which loads wherever the released one does."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from acestep_ray.models.checkpoint import TRANSFORMER, CheckpointDir
from acestep_ray.models.weights import read_weights

_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
_LARGEST_FILE = "5GB"


def export_transformer(checkpoint: CheckpointDir, weights: Mapping[str, Tensor], directory: Path) -> Path:
    """Write `directory` with the checkpoint's `config.json`, the trained `weights`, and all others as they were.

    The files have every name of the checkpoint's, also of parameters that the model never uses. What was there is
    replaced once everything is written.
    """
    base = checkpoint.path / TRANSFORMER
    state = {name: weights.get(name, tensor) for name, tensor, _ in read_weights(base)}
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shutil.copyfile(base / "config.json", partial / "config.json")
    save_torch_state_dict(state, partial, filename_pattern=_PATTERN, max_shard_size=_LARGEST_FILE)
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)
    return directory
