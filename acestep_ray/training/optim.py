"""AdamW, its learning-rate schedule and the gradient's norm, as the original trains."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

BETAS = (0.8, 0.9)
EPS = 1e-8


def build_optimizer(parameters: Iterable[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over `parameters`; the learning rate is set before every step by `set_learning_rate`."""
    parameters = list(parameters)
    return torch.optim.AdamW(
        parameters,
        lr=0.0,
        betas=BETAS,
        eps=EPS,
        weight_decay=weight_decay,
        fused=all(p.is_cuda for p in parameters),
    )


def learning_rate_at(step: int, *, peak: float, warmup_steps: int, max_steps: int) -> float:
    """Learning rate of step `step` (from 0): up from 0 over the warm-up, then linearly to 0 at `max_steps`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * max(0.0, (max_steps - step) / max(1, max_steps - warmup_steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def step_if(optimizer: torch.optim.Optimizer, is_finite: Tensor) -> None:
    """Step where `is_finite`, a bool scalar on the parameters' device, is true; else leave everything as it is.

    The fused kernel looks for itself, so that nobody waits for the GPU.
    """
    if all(group["fused"] for group in optimizer.param_groups):
        # As torch.amp.GradScaler tells it.
        optimizer.found_inf = (~is_finite).float()
        optimizer.step()
    elif is_finite:
        optimizer.step()


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, algorithm: str = "norm") -> Tensor:
    """Scale the gradients to a norm of at most `limit`, or cut each element to ±`limit` where `algorithm` is "value".

    Returns the norm before, a float32 scalar.
    """
    parameters = list(parameters)
    if algorithm == "norm":
        return nn.utils.clip_grad_norm_(parameters, limit)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    nn.utils.clip_grad_value_(parameters, limit)
    return norm
