"""What a run tells where a GPU's memory is too small for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from acestep_ray.config import TrainConfig
from acestep_ray.errors import GpuMemoryError
from acestep_ray.training.frozen import UNQUANTISED


@contextlib.contextmanager
def memory_told(config: TrainConfig, *, is_lora: bool) -> Iterator[None]:
    """Raise GpuMemoryError, with what these settings leave to do, in place of torch's error."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(" If reserved but unallocated")[0].strip()
        raise GpuMemoryError(
            f"the GPU's memory is too small for this run: {reason}\n"
            f"  → look with nvidia-smi for other programs on it; {', or '.join(ways_to_save(config, is_lora=is_lora))}"
        ) from error


def ways_to_save(config: TrainConfig, *, is_lora: bool) -> list[str]:
    """What these settings leave to do for less GPU memory, what costs least first."""
    ways = []
    if config.batch_frames is not None:
        ways.append(f"--batch_frames below {config.batch_frames}")
    elif config.batch_size > 1:
        ways.append("--batch_size 1")
    if config.activation_checkpointing < 1:
        ways.append("--activation_checkpointing 1")
    if is_lora and config.quantize_base == UNQUANTISED:
        ways.append("--quantize_base nf4")
    if not is_lora:
        ways.append("more --devices")
        if not config.cpu_offload:
            ways.append("--cpu_offload true")
    return [*ways, "shorter songs (precompute --window_seconds 120)"]
