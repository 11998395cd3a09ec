"""The model as a run trains it: which parameters, computed how, and how the workers share it."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel

from acestep_ray.config import TrainConfig
from acestep_ray.errors import InputError
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.models.fusing import fuse_where_possible
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.training.frozen import (
    AUTOCAST_DTYPES,
    UNQUANTISED,
    add_seeded_lora,
    load_frozen,
    reads_weights,
    store_frozen,
    store_products_as,
    wants_fused,
    with_lora,
)


def build_transformer(
    config: TrainConfig, lora: Mapping[str, Any] | None, device: torch.device
) -> ACEStepTransformer:
    """The base model on `device` with its LoRA, or without one as `choose_trained` leaves it; on every worker alike."""
    if lora is None:
        home = "cpu" if config.cpu_offload else device
        transformer = CheckpointDir.open(config.checkpoint_dir).load_transformer(device=home)
        choose_trained(transformer, config.train_parameters, with_ssl=config.ssl_coeff > 0)
        store_frozen(transformer, config, device)
    elif reads_weights(lora):
        home = "cpu" if config.quantize_base != UNQUANTISED else device
        transformer = CheckpointDir.open(config.checkpoint_dir).load_transformer(device=home)
        add_seeded_lora(transformer, config, lora)
        store_frozen(transformer, config, device)
    else:
        transformer = with_lora(load_frozen(config, device), config, lora, device)
    fuse_passes(transformer, config, device, is_lora=lora is not None)
    transformer.activation_checkpointing = config.activation_checkpointing
    return transformer


def choose_trained(transformer: ACEStepTransformer, patterns: str | None, *, with_ssl: bool) -> list[str]:
    """Let all parameters be trained, or those that `patterns` name; returns their names.

    `patterns`, with commas between them, are names of modules or parameters, in which `*` stands for anything. Without
    SSL losses nothing trains their projectors. Raises InputError for a pattern that names nothing.
    """
    wanted = [pattern.strip() for pattern in patterns.split(",")] if patterns else ["*"]
    names = [name for name, _ in transformer.named_parameters()]
    useful = [name for name in names if with_ssl or not name.startswith("projectors.")]
    chosen: set[str] = set()
    for pattern in wanted:
        found = {n for n in useful if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")}
        if not found:
            tops = sorted({name.split(".")[0] for name in useful})
            raise InputError(
                f"no parameter is named `{pattern}`",
                where=f"--train_parameters {patterns}",
                fix=f"the model has {', '.join(tops)}, and `*` stands for anything: transformer_blocks.*.attn",
            )
        chosen |= found
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name in names if name in chosen]


def check_fused(config: TrainConfig) -> None:
    """Raise InputError where products in float8 are asked for and cannot be had."""
    if not config.float8:
        return
    where = "--float8 true"
    if config.lora_config_path is None or config.quantize_base != UNQUANTISED:
        raise InputError("only frozen weights that are not quantised are multiplied in float8", where=where)
    if not config.fused or AUTOCAST_DTYPES.get(config.precision) is not torch.bfloat16:
        raise InputError(
            "float8 needs the fused path and bfloat16", where=where, fix="--fused true --precision bf16-mixed"
        )


def fuse_passes(
    transformer: ACEStepTransformer,
    config: TrainConfig,
    device: torch.device,
    *,
    is_lora: bool,
    shares_base: bool = False,
) -> None:
    """Take the fused path where settings and device allow it; in place.

    The frozen weights below a LoRA then move to bfloat16, unless the model `shares_base` with others. Raises InputError
    for float8 on a device that has none.
    """
    if config.float8 and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)):
        raise InputError("this device multiplies no float8 numbers", where="--float8 true")
    if not wants_fused(config):
        return
    # Without a LoRA, sharding and offloading want every parameter as it is.
    joins = is_lora and not shares_base
    is_fused = fuse_where_possible(transformer, device, join_frozen=joins, float8=config.float8)
    if is_fused and joins and config.quantize_base == UNQUANTISED:
        store_products_as(transformer, torch.bfloat16)


def share_among_workers(
    transformer: ACEStepTransformer, config: TrainConfig, *, is_lora: bool, workers: int, device: torch.device
) -> nn.Module:
    """The module to call in training; the process group is there already where there is more than one worker.

    With a LoRA every worker holds the model (DDP). Without one, each holds a part of every parameter, gradient and
    moment (FSDP2, Zhao et al. 2023, arXiv:2304.11277).
    """
    if not is_lora and (workers > 1 or config.cpu_offload):
        shard(transformer, config, workers, device)
        return transformer
    if workers == 1:
        return transformer
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(transformer, device_ids=devices)


def shard(transformer: ACEStepTransformer, config: TrainConfig, workers: int, device: torch.device) -> None:
    """Spread the parameters over the workers, block by block; in place."""
    half = AUTOCAST_DTYPES.get(config.precision)
    on_gpu = device.type == "cuda"
    spread = partial(
        fully_shard,
        mesh=init_device_mesh(device.type, (workers,)),
        # Inputs stay as they are: bfloat16 has no room for a timestep.
        mp_policy=MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=half and torch.float32, cast_forward_inputs=False
        ),
        offload_policy=CPUOffloadPolicy(pin_memory=on_gpu) if config.cpu_offload else OffloadPolicy(),
    )
    for block in transformer.transformer_blocks:
        spread(block)
    spread(transformer)
    # The sampler calls these and not `forward`.
    for method in ("encode_condition", "decode"):
        register_fsdp_forward_method(transformer, method)


def is_sharded(model: nn.Module) -> bool:
    """Whether every forward pass is one of all workers together."""
    return isinstance(model, FSDPModule)
