"""The model as a run trains it: which parameters, kept in which precision, and how the workers share it."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

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
from acestep_ray.export.lora import ADAPTER_NAME, find_lora_file
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.models.transformer import ACEStepTransformer, DepthwiseConv
from acestep_ray.training.lora import adapter_configs, add_lora, load_lora

AUTOCAST_DTYPES = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}
"""What matrix products are computed in; "32" is not among them."""

# Read by autocast in its own precision, whatever they are stored in.
_CAST_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, DepthwiseConv)


def build_transformer(config: TrainConfig, lora: Mapping | None, device: torch.device) -> ACEStepTransformer:
    """The base model on `device` with its LoRA, or without one as `choose_trained` leaves it; on every worker alike."""
    home = "cpu" if config.cpu_offload else device
    transformer = CheckpointDir.open(config.checkpoint_dir).load_transformer(device=home)
    if lora is None:
        choose_trained(transformer, config.train_parameters, with_ssl=config.ssl_coeff > 0)
    else:
        torch.manual_seed(config.seed)  # LoRA's first matrices are random
        add_lora(transformer, lora)
        for adapter, path in initial_loras(config.init_lora_path, lora).items():
            load_lora(transformer, path, adapter)
    if config.precision == "bf16-true":
        store_frozen_as_bfloat16(transformer)
    transformer.activation_checkpointing = config.activation_checkpointing
    return transformer


def initial_loras(path: str | None, lora: Mapping) -> dict[str, str]:
    """The LoRA that each adapter starts from, by its name: `path` itself, or for named adapters `path`/NAME.

    Raises InputError where a named adapter has none.
    """
    if path is None:
        return {}
    adapters = list(adapter_configs(lora))
    if adapters == [ADAPTER_NAME]:
        return {ADAPTER_NAME: path}
    return {name: str(find_lora_file(Path(path) / name)) for name in adapters}


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


def store_frozen_as_bfloat16(transformer: nn.Module) -> None:
    """Keep what is not trained and only met in matrix products as bfloat16: half the memory, and the same numbers.

    Autocast would round those weights in every step. Norms, embeddings and modulation stay float32.
    """
    for module in transformer.modules():
        if isinstance(module, _CAST_BY_AUTOCAST):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)


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
    options = {
        "mesh": init_device_mesh(device.type, (workers,)),
        # Inputs stay as they are: bfloat16 has no room for a timestep.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=half and torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")
        if config.cpu_offload
        else OffloadPolicy(),
    }
    for block in transformer.transformer_blocks:
        fully_shard(block, **options)
    fully_shard(transformer, **options)
    # The sampler calls these and not `forward`.
    for method in ("encode_condition", "decode"):
        register_fsdp_forward_method(transformer, method)


def is_sharded(model: nn.Module) -> bool:
    """Whether every forward pass is one of all workers together."""
    return isinstance(model, FSDPModule)
