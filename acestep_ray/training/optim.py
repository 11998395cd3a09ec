"""AdamW, its learning-rate schedule and the gradient's norm, as the original trains; as an option moments of 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor, nn

from acestep_ray.config import TrainConfig
from acestep_ray.errors import InputError
from acestep_ray.hints import one_of

BETAS = (0.8, 0.9)
EPS = 1e-8
ADAMW, ADAMW_8BIT = OPTIMIZERS = ("adamw", "adamw-8bit")

# A moment in 8 bits is stored as `KEY/codes` and `KEY/scale`.
_CODES, _SCALE = "/codes", "/scale"


def check_optimizer(config: TrainConfig) -> None:
    """Raise InputError for an optimizer that is not there or cannot train what is to be trained."""
    where = f"--optimizer {config.optimizer}"
    if config.optimizer not in OPTIMIZERS:
        raise InputError(
            "unknown optimizer", where=where, fix=one_of(config.optimizer, OPTIMIZERS, separator=" or ")
        )
    if config.optimizer != ADAMW_8BIT:
        return
    _import_adamw8bit()
    workers = config.devices * config.num_nodes
    if config.lora_config_path is None and (workers > 1 or config.cpu_offload):
        raise InputError(
            "moments of 8 bits cannot be spread over several workers or kept in the host's memory",
            where=where,
            fix=f"use --optimizer {ADAMW}, or one worker without --cpu_offload, or train a LoRA",
        )


def _import_adamw8bit() -> ModuleType:
    try:
        from acestep_ray.training import adamw8bit
    except ImportError as error:
        raise InputError(
            f"torchao cannot be used ({error})",
            where=f"--optimizer {ADAMW_8BIT}",
            fix="pip install 'acestep-ray[quantisation]'",
        ) from None
    return adamw8bit


def build_optimizer(
    parameters: Iterable[nn.Parameter], weight_decay: float, name: str = ADAMW
) -> torch.optim.Optimizer:
    """AdamW over `parameters`; the learning rate is set before every step by `set_learning_rate`.

    `name` is one of `OPTIMIZERS`. Raises InputError where torchao is missing.
    """
    parameters = list(parameters)
    if name == ADAMW_8BIT:
        adamw = _import_adamw8bit().AdamW8bit
        return adamw(parameters, lr=0.0, betas=BETAS, eps=EPS, weight_decay=weight_decay)
    fused = all(p.is_cuda for p in parameters)
    return torch.optim.AdamW(parameters, lr=0.0, betas=BETAS, eps=EPS, weight_decay=weight_decay, fused=fused)


def learning_rate_at(step: int, *, peak: float, warmup_steps: int, max_steps: int) -> float:
    """Learning rate of step `step` (from 0): up from 0 over the warm-up, then linearly to 0 at `max_steps`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * max(0.0, (max_steps - step) / max(1, max_steps - warmup_steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def step_if(optimizer: torch.optim.Optimizer, is_finite: Tensor) -> None:
    """Step where `is_finite`, a bool scalar on the parameters' device, is true; else leave everything as it is.

    The fused kernel looks for itself, so that nobody waits for the GPU; with moments of 8 bits somebody does.
    """
    if all(group.get("fused") for group in optimizer.param_groups):
        # As torch.amp.GradScaler tells it.
        optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]  # the kernel's own, in no class
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


def stored_parts(key: str, state: Tensor) -> dict[str, Tensor]:
    """The plain tensors that an entry of an optimizer's state is, by the key that each is stored under."""
    if not hasattr(state, "codes") or not hasattr(state, "scale"):
        return {key: state}
    return {f"{key}{_CODES}": state.codes, f"{key}{_SCALE}": state.scale}


def join_parts(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Make a parameter's state, read back as `stored_parts` gave it, the optimizer's own; in place.

    Moments of another optimizer are brought into this one's form. Raises InputError where torchao is missing.
    """
    state = optimizer.state[parameter]
    in_8_bits = [key.removesuffix(_CODES) for key in state if key.endswith(_CODES)]
    for key in in_8_bits:
        moment = _import_adamw8bit().join(key, state.pop(f"{key}{_CODES}"), state.pop(f"{key}{_SCALE}"))
        state[key] = moment if hasattr(optimizer, "in_own_form") else moment.dequantize()
    if hasattr(optimizer, "in_own_form"):
        for key in state.keys() - {"step"}:
            state[key] = optimizer.in_own_form(parameter, key, state[key])
