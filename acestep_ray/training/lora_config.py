"""The LoRA configuration file: fields of PEFT's `LoraConfig`, for one adapter or several by name."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
from torch import nn

from acestep_ray.errors import InputError
from acestep_ray.export.lora import ADAPTER_NAME
from acestep_ray.foreign_files import FIRST_BYTES, start_of_impostor
from acestep_ray.plain_files import JSON
from acestep_ray.plain_json import load_json
from acestep_ray.storage import StoredFile
from acestep_ray.training.bounded_patterns import is_pattern

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

ALL_LINEAR = "all-linear"
_LARGEST = 2.0**63


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    # Compared, for an integer of hundreds of digits is no float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def _is_list(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_item, value))


def _is_by_pattern(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_pattern, value)) and all(map(is_item, value.values()))


def _is_names(value: Any) -> bool:
    return is_pattern(value) or _is_list(value, lambda name: isinstance(name, str) and bool(name))


# The fields of PEFT's `LoraConfig` that the model can be trained, and the file be exported, with.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda v: v in (None, "LORA"), '"LORA"'),
    "r": (lambda v: _is_whole(v, 1), "a rank, which is a whole number from 1"),
    "lora_alpha": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "lora_dropout": (lambda v: _is_number(v) and 0 <= v < 1, "a probability from 0 to below 1"),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    "use_dora": (lambda v: isinstance(v, bool), "true or false"),
    "target_modules": (_is_names, f'a list of names, a regular expression or "{ALL_LINEAR}"'),
    "exclude_modules": (lambda v: v is None or _is_names(v), "a list of names or a regular expression"),
    "layers_to_transform": (
        lambda v: v is None or _is_whole(v, 0) or _is_list(v, lambda n: _is_whole(n, 0)),
        "the number of a layer, counted from 0, or a list of them",
    ),
    "layers_pattern": (
        lambda v: v is None or is_pattern(v) or _is_list(v, is_pattern),
        "the name of a list of layers, such as transformer_blocks, or several",
    ),
    "rank_pattern": (
        lambda v: _is_by_pattern(v, lambda r: _is_whole(r, 1)),
        "ranks by regular expression",
    ),
    "alpha_pattern": (
        lambda v: _is_by_pattern(v, lambda a: _is_number(a) and a > 0),
        "numbers above 0 by regular expression",
    ),
    "init_lora_weights": (
        lambda v: isinstance(v, bool) or v in ("gaussian", "orthogonal"),
        'true, false, "gaussian" or "orthogonal"; the others change the released weights or need data',
    ),
}

# What PEFT's `adapter_config.json` tells besides.
_DESCRIPTIVE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
}

_REASONS = {
    "bias": "a LoRA file has no place for biases",
    "lora_bias": "a LoRA file has no place for biases",
    "modules_to_save": "a LoRA file has no place for whole modules",
    "trainable_token_indices": "a LoRA file has no place for an embedding's rows",
    "target_parameters": "this model's layers are reached with `target_modules`",
    "layer_replication": "a LoRA file is for the released model's layers",
}


def read_lora_config(path: str | Path) -> dict[str, Any]:
    """Read a `lora_config.json`: fields of PEFT's `LoraConfig` over the original's default, or several such sets.

    Several named adapters that are trained together are `{"adapters": {"style": {…}, "voice": {…}}}`. Raises InputError
    for a file that is missing, is not JSON, or has fields or values that this model cannot be trained with.
    """
    file = StoredFile.at(path)
    content = b""
    try:
        content = file.read_bytes(JSON)
        values = load_json(content)
    except FileNotFoundError:
        raise InputError(
            "no such LoRA configuration",
            where=f"--lora_config_path {file}",
            fix="give the path of a JSON file",
        ) from None
    except (OSError, ValueError) as error:
        found = (
            start_of_impostor(content[:FIRST_BYTES], str(path)) if not isinstance(error, OSError) else None
        )
        raise InputError(
            f"cannot read the LoRA configuration ({error if found is None else f'it is {found.what}'})",
            where=str(file),
            fix="it must be one JSON object" if found is None else found.fix,
        ) from None
    if not isinstance(values, dict):
        raise InputError("the LoRA configuration is not a JSON object", where=str(file))
    if "adapters" not in values:
        return _read_fields(values, str(file))
    _check_adapters(values, str(file))
    return {
        "adapters": {
            name: _read_fields(given, place_of_adapter(str(file), name))
            for name, given in values["adapters"].items()
        }
    }


def adapter_configs(lora: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields of PEFT's `LoraConfig` by adapter; a configuration without names is one adapter, `ADAPTER_NAME`."""
    if "adapters" in lora:
        return {name: dict(values) for name, values in lora["adapters"].items()}
    return {ADAPTER_NAME: dict(lora)}


def _read_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    values = {**DEFAULT_LORA, **values}
    peft_config(values, where)
    return {name: value for name, value in values.items() if name in _RULES}


def _check_adapters(values: Mapping[str, Any], where: str) -> None:
    adapters = values["adapters"]
    if len(values) > 1:
        others = ", ".join(f"`{name}`" for name in values if name != "adapters")
        raise InputError(f"{others} beside `adapters`", where=where, fix="give each adapter its own fields")
    if not isinstance(adapters, dict) or not adapters:
        raise InputError("`adapters` must be adapters by name", where=where)
    seen: set[str] = set()
    for name, given in adapters.items():
        # A name is part of parameters' names and a folder's, which may not tell cases apart.
        taken = name == ADAPTER_NAME or hasattr(nn.ModuleDict(), name) or name.casefold() in seen
        if taken or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
            raise InputError(
                f"`{name}` cannot be the name of an adapter" + (", it is taken" if taken else ""),
                where=where,
                fix="use letters, digits and underscores, such as `style`",
            )
        if not isinstance(given, dict):
            raise InputError(f"the adapter `{name}` is not a JSON object", where=where)
        seen.add(name.casefold())


def place_of_adapter(where: str, adapter: str) -> str:
    """Where a message finds the fields of an adapter: `where`, and its name where it has one."""
    return where if adapter == ADAPTER_NAME else f"{where}, adapter `{adapter}`"


def peft_config(values: Mapping[str, Any], where: str) -> peft.LoraConfig:
    """One adapter's fields as PEFT takes them. Raises InputError for those that the model cannot be trained with."""
    known = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    for name, value in values.items():
        if name in _RULES:
            is_right, rule = _RULES[name]
            if not is_right(value):
                raise InputError(f"`{name}` is {value!r}; it must be {rule}", where=where)
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"unknown field `{name}` in the LoRA configuration",
                where=where,
                fix=f"did you mean `{near[0]}`?" if near else "see PEFT's LoraConfig for the fields",
            )
        elif name not in _DESCRIPTIVE and value != _default(known[name]):
            raise InputError(
                f"`{name}` cannot be used: {_REASONS.get(name, 'only LoRA, rsLoRA and DoRA can be exported')}",
                where=where,
                fix="remove it, or train without a LoRA",
            )
    try:
        return peft.LoraConfig(**{name: value for name, value in values.items() if name in _RULES})
    except (TypeError, ValueError) as error:
        raise InputError(f"PEFT refuses the LoRA configuration ({error})", where=where) from None


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
