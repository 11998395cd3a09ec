"""What can be found wrong with the settings of a run before work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from acestep_ray.config import TrainConfig
from acestep_ray.device import check_device_name
from acestep_ray.errors import InputError
from acestep_ray.hints import one_of
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.names import check_run_name
from acestep_ray.storage import Store
from acestep_ray.training.frozen import check_quantisation
from acestep_ray.training.initial_lora import initial_loras, load_lora
from acestep_ray.training.lora import add_lora
from acestep_ray.training.model import check_fused, choose_trained
from acestep_ray.training.optim import check_optimizer
from acestep_ray.training.state import locate_checkpoint

PRECISIONS = {
    "bf16-mixed": "bf16-mixed",
    "bf16-true": "bf16-true",
    "16-mixed": "16-mixed",
    **dict.fromkeys(("32", "32-true", "fp32"), "32"),
}
LIMITS = (
    (
        (
            "max_steps",
            "batch_size",
            "accumulate_grad_batches",
            "devices",
            "num_nodes",
            "every_n_train_steps",
            "every_plot_step",
        ),
        lambda value: value >= 1,
        "at least 1",
    ),
    (("learning_rate", "gradient_clip_val", "shift"), lambda value: value > 0, "above 0"),
    (
        (
            "weight_decay",
            "ssl_coeff",
            "warmup_steps",
            "num_workers",
            "seed",
            "keep_last",
            "max_failures",
            "early_stopping_patience",
            "reload_dataloaders_every_n_epochs",
        ),
        lambda value: value >= 0,
        "0 or more",
    ),
    (("min_decoded",), lambda value: 0 < value <= 1, "above 0 and at most 1"),
    (("val_songs",), lambda value: value is None or value >= 0, "0 or more"),
    (("epochs",), lambda value: value == -1 or value >= 1, "at least 1, or -1 for no limit"),
    (("plot_seconds",), lambda value: value is None or 0.1 <= value <= 240, "0.1 to 240"),
    (("val_check_interval", "min_devices"), lambda value: value is None or value >= 1, "at least 1"),
    (
        ("text_dropout", "speaker_dropout", "lyric_dropout", "activation_checkpointing"),
        lambda value: 0 <= value <= 1,
        "0 to 1",
    ),
)


def check_train_config(config: TrainConfig) -> TrainConfig:
    """Raise InputError for values that cannot be trained with; returns the settings with one name per precision."""
    for names, allowed, rule in LIMITS:
        for name in names:
            if not allowed(getattr(config, name)):
                raise InputError(f"must be {rule}", where=f"--{name} {getattr(config, name)}")
    if config.precision not in PRECISIONS:
        raise InputError(
            "unknown precision",
            where=f"--precision {config.precision}",
            fix=one_of(config.precision, sorted(set(PRECISIONS.values()))),
        )
    if config.gradient_clip_algorithm not in ("norm", "value"):
        where = f"--gradient_clip_algorithm {config.gradient_clip_algorithm}"
        raise InputError(
            "unknown way to clip gradients",
            where=where,
            fix=one_of(config.gradient_clip_algorithm, ("norm", "value"), separator=" or "),
        )
    check_exp_name(config)
    if config.lora_config_path is None and config.init_lora_path is not None:
        raise InputError(
            "a LoRA to start from needs a configuration of the same size",
            where=f"--init_lora_path {config.init_lora_path}",
            fix="give --lora_config_path",
        )
    for name in ("train_parameters", "cpu_offload"):
        if config.lora_config_path is not None and getattr(config, name):
            raise InputError(
                "this is for training the model's own weights",
                where=f"--{name} {getattr(config, name)}",
                fix="leave it out, or leave out --lora_config_path",
            )
    workers = config.devices * config.num_nodes
    if config.min_devices is not None and config.min_devices > workers:
        raise InputError(
            f"more than the {workers} workers of the run", where=f"--min_devices {config.min_devices}"
        )
    if config.ckpt_path is not None:
        locate_checkpoint(config.ckpt_path)
    check_device_name(config.device)
    check_optimizer(config)
    check_quantisation(config)
    check_fused(config)
    return replace(
        config,
        precision=PRECISIONS[config.precision],
        # Workers have a working directory of their own.
        checkpoint_dir=Store.at(config.checkpoint_dir).url,
        dataset_path=Store.at(config.dataset_path).url,
        init_lora_path=config.init_lora_path and Store.at(config.init_lora_path).url,
        ckpt_path=config.ckpt_path and Store.at(config.ckpt_path).url,
    )


def check_exp_name(config: TrainConfig) -> None:
    """Raise InputError for a name that cannot be a run's, or that other commands could not take if the run is new."""
    check_run_name(config.exp_name, is_new=False)  # before it is used in a path
    experiment = Store.at(config.exp_dir).child(config.exp_name)
    check_run_name(config.exp_name, is_new=not (experiment.is_local and experiment.path.exists()))


def check_model(config: TrainConfig, lora: Mapping[str, Any] | None, checkpoint: CheckpointDir) -> None:
    """Raise InputError when what is to be trained is nothing that the model has; needs no weights."""
    with torch.device("meta"):
        transformer = ACEStepTransformer(checkpoint.transformer_config)
        if lora is not None:
            add_lora(transformer, lora, where=config.lora_config_path or "target_modules")
            for adapter, path in initial_loras(config.init_lora_path, lora).items():
                load_lora(transformer, path, adapter)
        else:
            choose_trained(transformer, config.train_parameters, with_ssl=config.ssl_coeff > 0)
