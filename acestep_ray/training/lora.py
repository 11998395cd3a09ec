"""LoRA on the transformer: the configuration file, injection through PEFT, what is then trained, and from where."""

from __future__ import annotations

import difflib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import nn

from acestep_ray.errors import InputError
from acestep_ray.export.fetched import fetched_lora
from acestep_ray.export.lora import (
    ADAPTER_NAME,
    LoraUpdate,
    check_fits,
    find_lora_file,
    lora_layers,
    read_lora,
)
from acestep_ray.models.transformer import DepthwiseConv, PointwiseConv
from acestep_ray.storage import StoredFile

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
# They are in the model for the SSL losses alone.
_WITHOUT_EFFECT = "projectors"


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(value) and re.compile(value) is not None
    except re.error:
        return False


def _is_list(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_item, value))


def _is_by_pattern(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(_is_pattern, value)) and all(map(is_item, value.values()))


def _is_names(value: Any) -> bool:
    return _is_pattern(value) or _is_list(value, lambda name: isinstance(name, str) and bool(name))


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
        lambda v: v is None or _is_pattern(v) or _is_list(v, _is_pattern),
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


def read_lora_config(path: str | Path) -> dict:
    """Read a `lora_config.json`: fields of PEFT's `LoraConfig` over the original's default, or several such sets.

    Several named adapters that are trained together are `{"adapters": {"style": {…}, "voice": {…}}}`. Raises InputError
    for a file that is missing, is not JSON, or has fields or values that this model cannot be trained with.
    """
    file = StoredFile.at(path)
    try:
        values = json.loads(file.read_bytes().decode())
    except FileNotFoundError:
        raise InputError(
            "no such LoRA configuration",
            where=f"--lora_config_path {file}",
            fix="give the path of a JSON file",
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(
            f"cannot read the LoRA configuration ({error})", where=str(file), fix="it must be one JSON object"
        ) from None
    if not isinstance(values, dict):
        raise InputError("the LoRA configuration is not a JSON object", where=str(file))
    if "adapters" not in values:
        return _read_fields(values, str(file))
    _check_adapters(values, str(file))
    return {
        "adapters": {
            name: _read_fields(given, _place(str(file), name)) for name, given in values["adapters"].items()
        }
    }


def adapter_configs(lora: Mapping) -> dict[str, dict]:
    """The fields of PEFT's `LoraConfig` by adapter; a configuration without names is one adapter, `ADAPTER_NAME`."""
    if "adapters" in lora:
        return {name: dict(values) for name, values in lora["adapters"].items()}
    return {ADAPTER_NAME: dict(lora)}


def _read_fields(values: Mapping, where: str) -> dict:
    values = {**DEFAULT_LORA, **values}
    _peft_config(values, where)
    return {name: value for name, value in values.items() if name in _RULES}


def _check_adapters(values: Mapping, where: str) -> None:
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


def _place(where: str, adapter: str) -> str:
    return where if adapter == ADAPTER_NAME else f"{where}, adapter `{adapter}`"


def _peft_config(values: Mapping, where: str) -> peft.LoraConfig:
    known = {field.name: field for field in fields(peft.LoraConfig)}
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


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def add_lora(model: nn.Module, lora: Mapping, where: str = "target_modules") -> list[str]:
    """Inject LoRA layers into `model`, freeze everything else, and return the names of what is trained.

    `lora` is what `read_lora_config` returns; the changes of several adapters add up. Raises InputError for targets
    that the model lacks or that cannot have a LoRA, and for a rank that is larger than a layer. Needs no weights: on
    the meta device it is a check.
    """
    configs = {name: _peft_config(v, _place(where, name)) for name, v in adapter_configs(lora).items()}
    targets = {name: _find_targets(model, config, _place(where, name)) for name, config in configs.items()}
    _check_dora_is_alone(configs, targets, where)
    model.requires_grad_(False)
    for name, config in configs.items():
        _inject(model, config, name, targets[name], _place(where, name))
    for layer in lora_layers(model).values():
        layer.set_adapter(list(configs))  # all at once; PEFT leaves only the last one on
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _find_targets(model: nn.Module, config: peft.LoraConfig, where: str) -> list[str]:
    """The names of the modules that a configuration means, each of which can have its LoRA."""
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        chosen = {name for name, module in modules.items() if _why_not(name, module) is None}
    else:
        chosen = _matching(modules, config.target_modules, "target_modules", where)
    if config.exclude_modules:
        chosen -= _matching(modules, config.exclude_modules, "exclude_modules", where)
    if config.layers_to_transform is not None:
        chosen = _in_layers(chosen, config, where)
    if not chosen:
        raise InputError("the LoRA configuration leaves no module to train", where=where)
    targets = [name for name in modules if name in chosen]
    for name in targets:
        reason = _why_not(name, modules[name])
        if reason is not None:
            raise InputError(
                f"`{name}` cannot have a LoRA: {reason}",
                where=where,
                fix="name linear layers in `target_modules`, or leave this out with `exclude_modules`",
            )
    _check_ranks({name: modules[name] for name in targets}, config, where)
    return targets


def _matching(names: Iterable[str], wanted: str | Iterable[str], field: str, where: str) -> set[str]:
    """Names that match a regular expression, or that are or end with one of several. Raises InputError for none."""
    names = list(names)
    if isinstance(wanted, str):
        found = {name for name in names if re.fullmatch(wanted, name)}
        if not found:
            raise InputError(f"`{field}` {wanted!r} matches no module of the model", where=where)
        return found
    by_entry = {
        entry: [name for name in names if name == entry or name.endswith(f".{entry}")]
        for entry in sorted(wanted)
    }
    unmatched = [entry for entry, found in by_entry.items() if not found]
    if unmatched:
        last_parts = sorted({name.rsplit(".", 1)[-1] for name in names})
        near = difflib.get_close_matches(unmatched[0], [*last_parts, "to_out.0"], n=3)
        raise InputError(
            f"the model has no module named {', '.join(f'`{entry}`' for entry in unmatched)}",
            where=where,
            fix=f"did you mean {', '.join(near)}?" if near else "see lora_config.json for the usual targets",
        )
    return {name for found in by_entry.values() for name in found}


def _in_layers(names: Iterable[str], config: peft.LoraConfig, where: str) -> set[str]:
    """Names within layers of the wanted numbers; of any list of layers where `layers_pattern` names none."""
    wanted, lists = config.layers_to_transform, config.layers_pattern
    wanted = {wanted} if isinstance(wanted, int) else set(wanted)
    lists = "|".join([lists] if isinstance(lists, str) else lists or [r"[^.]+"])
    # PEFT's own search misses the lists at the top of a model, and `transformer_blocks` is one.
    numbers = {name: re.search(rf"(?:^|\.)(?:{lists})\.(\d+)\.", name) for name in names}
    found = {name: int(match[1]) for name, match in numbers.items() if match}
    missing = sorted(wanted - set(found.values()))
    if missing:
        raise InputError(
            f"no targeted module lies in layer {missing[0]} of `layers_to_transform`",
            where=where,
            fix=f"there are {', '.join(map(str, sorted(set(found.values()))))}" if found else None,
        )
    return {name for name, number in found.items() if number in wanted}


def _why_not(name: str, module: nn.Module) -> str | None:
    """Why a module cannot have a LoRA; None where it can."""
    if name.split(".")[0] == _WITHOUT_EFFECT:
        return "only the SSL losses read it, the music would not change"
    if isinstance(module, nn.Linear):
        return None
    if isinstance(module, DepthwiseConv):
        return "a depthwise convolution has no matrix from inputs to outputs"
    if isinstance(module, nn.Embedding):
        return "the programs that play LoRAs have no common form for one of an embedding"
    if isinstance(module, nn.Conv2d):
        return (
            "its weights are applied by the module above it, past PEFT's layer, and nothing would be learned"
        )
    inside = [child for child, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    if inside:
        last = name.rsplit(".", 1)[-1]
        return f"it is no single layer; it holds {', '.join(f'{last}.{child}' for child in inside[:6])}"
    return f"it is no linear layer but {type(module).__name__}"


def _check_ranks(layers: Mapping[str, nn.Linear], config: peft.LoraConfig, where: str) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if not any(get_pattern_key([pattern], name) == pattern for name in layers):
                raise InputError(f"`{pattern}` of `{field}` matches no targeted module", where=where)
    too_large = {
        name: (min(layer.in_features, layer.out_features), rank)
        for name, layer in layers.items()
        if (rank := _rank(config, name)) > min(layer.in_features, layer.out_features)
    }
    if too_large:
        name, (limit, rank) = min(too_large.items(), key=lambda item: item[1])
        layer = layers[name]
        raise InputError(
            f"rank {rank} is larger than the layer `{name}`, which is {layer.in_features} → {layer.out_features}",
            where=where,
            fix=f"use a rank of at most {limit}, for all layers in `r` or for this one in `rank_pattern`",
        )


def _rank(config: peft.LoraConfig, name: str) -> int:
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)


def _check_dora_is_alone(
    configs: Mapping[str, peft.LoraConfig], targets: Mapping[str, list[str]], where: str
) -> None:
    """Raise InputError where a DoRA shares a layer: it scales all of the layer, so that changes do not add up."""
    layers: dict[str, list[str]] = {}
    for adapter, names in targets.items():
        for name in names:
            layers.setdefault(name, []).append(adapter)
    for name, adapters in layers.items():
        if len(adapters) > 1 and any(configs[adapter].use_dora for adapter in adapters):
            raise InputError(
                f"`{name}` has a DoRA and another adapter ({', '.join(adapters)}), whose changes do not add up",
                where=where,
                fix="give the adapters different `target_modules`, or set `use_dora` to false",
            )


def _inject(model: nn.Module, config: peft.LoraConfig, adapter: str, targets: list[str], where: str) -> None:
    config.target_modules = set(targets)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    if config.use_dora:
        for layer in map(model.get_submodule, targets):
            if isinstance(layer, PointwiseConv):
                # PEFT's DoRA takes a linear layer's weight for a matrix; the layer itself applies either form.
                layer.weight = nn.Parameter(layer.weight.squeeze(-1), requires_grad=False)
    try:
        with warnings.catch_warnings():
            # PEFT says with every adapter after the first that there are several.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            peft.inject_adapter_in_model(config, model, adapter_name=adapter)
    except ValueError as error:
        raise InputError(f"LoRA cannot be put on these modules ({error})", where=where) from None


@torch.no_grad()
def load_lora(model: nn.Module, path: str | Path, adapter: str = ADAPTER_NAME) -> None:
    """Start an injected adapter from a LoRA: the model then gives what the base gives with it at strength 1.

    `path` is a file or directory of ours, of the original trainer or of PEFT. The two may scale differently, and a DoRA
    may start from a plain LoRA. Raises InputError for a file that is no LoRA, and where its modules or ranks are not
    those of the configuration. On the meta device it is a check.
    """
    with fetched_lora(path) as local:
        _load_lora(model, local, adapter)


def _load_lora(model: nn.Module, path: Path, adapter: str) -> None:
    path = find_lora_file(path)
    updates, layers = read_lora(path), lora_layers(model, adapter)
    if not layers:
        raise InputError(
            f"the LoRA configuration has no adapter `{adapter}` to start from a LoRA", where=str(path)
        )
    _check_modules(model, updates, layers, path)
    _check_shapes(updates, layers, adapter, path)
    for name, layer in layers.items():
        update = updates[name]
        layer.lora_A[adapter].weight.copy_(update.a)
        layer.lora_B[adapter].weight.copy_(update.b / layer.scaling[adapter])
        if adapter in layer.lora_magnitude_vector:
            lengths = update.magnitude
            if lengths is None:
                lengths = update.apply(layer.get_base_layer().weight.flatten(1)).norm(dim=1)
            layer.lora_magnitude_vector[adapter].weight.copy_(lengths)


def _check_modules(
    model: nn.Module, updates: Mapping[str, LoraUpdate], layers: Mapping[str, LoraLayer], path: Path
) -> None:
    """Raise InputError where a LoRA has other modules than the configuration, with what to set there."""
    more, fewer = sorted(updates.keys() - layers.keys()), sorted(layers.keys() - updates.keys())
    if not more and not fewer:
        return
    names = {name for name, _ in model.named_modules()}
    unknown = [name for name in more if name not in names]
    if unknown:
        raise InputError(f"{_some(unknown)} is not a module of this model", where=str(path))
    targets = _short_names(updates)
    if _matching(names, targets, "target_modules", str(path)) != updates.keys():
        targets = sorted(updates)
    differences = [f"it has {_some(more)}, the configuration does not"] if more else []
    differences += [f"the configuration has {_some(fewer)}, it does not"] if fewer else []
    raise InputError(
        f"the LoRA to start from has other modules: {'; '.join(differences)}",
        where=str(path),
        fix=f'set in lora_config.json "target_modules": {json.dumps(targets)}',
    )


def _check_shapes(
    updates: Mapping[str, LoraUpdate], layers: Mapping[str, LoraLayer], adapter: str, path: Path
) -> None:
    """Raise InputError where a LoRA is for layers of another size, of another rank, or a DoRA and these are not."""
    for name, layer in layers.items():
        check_fits(name, updates[name], (layer.out_features, layer.in_features), path)
    other = [name for name, layer in layers.items() if updates[name].rank != layer.r[adapter]]
    if other:
        common = Counter(update.rank for update in updates.values()).most_common(1)[0][0]
        special = {name: update.rank for name, update in updates.items() if update.rank != common}
        ranks = f'"r": {common}, "rank_pattern": {json.dumps(special)}'
        raise InputError(
            f"the LoRA to start from has rank {updates[other[0]].rank} at `{other[0]}`, "
            f"the configuration {layers[other[0]].r[adapter]}",
            where=str(path),
            fix=f"set in lora_config.json {ranks}",
        )
    if any(
        updates[n].magnitude is not None and adapter not in layers[n].lora_magnitude_vector for n in layers
    ):
        raise InputError(
            "the LoRA to start from is a DoRA, the configuration is not",
            where=str(path),
            fix='set in lora_config.json "use_dora": true',
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(f"`{name}`" for name in names[:2]) + more


def _short_names(names: Iterable[str]) -> list[str]:
    """What modules are called in `target_modules`: the last part, or two where the last is a number or `conv`."""
    last = re.compile(r"[^.]+\.(?:\d+|conv)$|[^.]+$")
    return sorted({last.search(name)[0] for name in names})
