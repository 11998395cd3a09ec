"""Which device a job runs on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from acestep_ray.errors import InputError
from acestep_ray.hints import one_of

DEVICES = ("auto", "cpu", "cuda")


def check_device_name(name: str) -> None:
    """Raise InputError for a name that is not auto, cpu or cuda."""
    if name not in DEVICES:
        raise InputError(f"unknown device `{name}`", where="--device", fix=one_of(name, DEVICES))


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


def small_tensor(values: Any, device: torch.device | str) -> Tensor:
    """`torch.tensor(values)` on the device, without waiting for what the device has to do before."""
    if torch.device(device).type != "cuda":
        return torch.tensor(values, device=device)
    return torch.tensor(values, pin_memory=True).to(device, non_blocking=True)


def wait_for(device: torch.device) -> None:
    """Return when the device has done what this thread gave it. Others may have the core until then.

    Where a value is read, CUDA waits too, and keeps a core busy with looking.
    """
    if device.type == "cuda":
        done = torch.cuda.Event(blocking=True)
        done.record(torch.cuda.current_stream(device))
        done.synchronize()


def read_back(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in this process's memory; the device is waited for once, for all of them."""
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    for device in {tensor.device for tensor in tensors}:
        wait_for(device)
    return copies
