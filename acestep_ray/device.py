"""Which device a job runs on."""

from __future__ import annotations

import torch

from acestep_ray.errors import InputError

DEVICES = ("auto", "cpu", "cuda")


def check_device_name(name: str) -> None:
    """Raise InputError for a name that is not auto, cpu or cuda."""
    if name not in DEVICES:
        raise InputError(f"unknown device `{name}`", where="--device", fix=f"one of {', '.join(DEVICES)}")


def resolve_device(name: str) -> torch.device:
    """The device of this process that auto, cpu or cuda means. Raises InputError when there is none."""
    check_device_name(name)
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "there is no CUDA device here", where="--device cuda", fix="use --device auto or cpu"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def gpu_memory() -> int:
    """Bytes of memory of this process's first GPU, used or not; 0 without one."""
    return 0 if not torch.cuda.is_available() else torch.cuda.get_device_properties(0).total_memory
