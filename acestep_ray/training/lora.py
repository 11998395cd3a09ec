"""LoRA on the transformer: the configuration file, injection through PEFT, and what is then trained."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import peft
from torch import nn

from acestep_ray.errors import InputError

ADAPTER_NAME = "lora_adapter"

DEFAULT_LORA = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": [
        "speaker_embedder",
        "linear_q",
        "linear_k",
        "linear_v",
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    ],
}


def read_lora_config(path: str | Path) -> dict:
    """Read a `lora_config.json`: any fields of PEFT's `LoraConfig`, over the original's default.

    Raises InputError for a file that is missing, is not JSON, or has fields or values that LoRA does not know.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            "no such LoRA configuration",
            where=f"--lora_config_path {path}",
            fix="give the path of a JSON file",
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            f"cannot read the LoRA configuration ({error})", where=str(path), fix="it must be one JSON object"
        ) from None
    if not isinstance(values, dict):
        raise InputError("the LoRA configuration is not a JSON object", where=str(path))
    known = {f.name for f in fields(peft.LoraConfig)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"unknown field `{name}` in the LoRA configuration",
                where=str(path),
                fix=f"did you mean `{near[0]}`?" if near else "see PEFT's LoraConfig for the fields",
            )
    values = {**DEFAULT_LORA, **values}
    rank = values["r"]
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"`r` is {rank!r}; a rank is a whole number from 1", where=str(path))
    try:
        peft.LoraConfig(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"PEFT refuses the LoRA configuration ({error})", where=str(path)) from None
    return values


def add_lora(model: nn.Module, lora: Mapping, where: str = "target_modules") -> list[str]:
    """Inject LoRA layers into `model`, freeze everything else, and return the names of what is trained.

    `lora` holds the fields of PEFT's `LoraConfig`. Raises InputError naming every target that no module of the model
    matches; the model is then unchanged.
    """
    config = peft.LoraConfig(**lora)
    _check_targets(model, config, where)
    model.requires_grad_(False)
    try:
        peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
    except ValueError as error:
        raise InputError(f"LoRA cannot be put on these modules ({error})", where=where) from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{ADAPTER_NAME}" in name)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _check_targets(model: nn.Module, config: peft.LoraConfig, where: str) -> None:
    targets = config.target_modules
    if not isinstance(targets, (set, list, tuple)):
        return  # A pattern or "all-linear": PEFT itself says when nothing matches.
    names = [name for name, _ in model.named_modules()]
    last_parts = sorted({name.rsplit(".", 1)[-1] for name in names if name})
    unmatched = [t for t in sorted(targets) if not any(n == t or n.endswith(f".{t}") for n in names)]
    if unmatched:
        near = difflib.get_close_matches(unmatched[0], [*last_parts, "to_out.0"], n=3)
        raise InputError(
            f"the model has no module named {', '.join(f'`{t}`' for t in unmatched)}",
            where=where,
            fix=f"did you mean {', '.join(near)}?" if near else "see lora_config.json for the usual targets",
        )
