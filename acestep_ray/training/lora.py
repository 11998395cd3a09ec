"""LoRA on the transformer: which modules get one, and its injection through PEFT."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import peft
from torch import nn

from acestep_ray.errors import InputError
from acestep_ray.export.lora import lora_layers
from acestep_ray.export.names import changes_music
from acestep_ray.models.transformer import DepthwiseConv, PointwiseConv
from acestep_ray.training.bounded_patterns import names_by_key, names_for_peft, numbers_after, whole_matches
from acestep_ray.training.lora_config import ALL_LINEAR, adapter_configs, peft_config, place_of_adapter


def add_lora(model: nn.Module, lora: Mapping[str, Any], where: str = "target_modules") -> list[str]:
    """Inject LoRA layers into `model`, freeze everything else, and return the names of what is trained.

    `lora` is what `read_lora_config` returns; the changes of several adapters add up. Raises InputError for targets
    that the model lacks or that cannot have a LoRA, and for a rank that is larger than a layer. Needs no weights: on
    the meta device it is a check.
    """
    places = {name: place_of_adapter(where, name) for name in adapter_configs(lora)}
    configs = {name: peft_config(fields, places[name]) for name, fields in adapter_configs(lora).items()}
    targets = {name: _find_targets(model, config, places[name]) for name, config in configs.items()}
    _check_dora_is_alone(configs, targets, where)
    model.requires_grad_(False)
    for name, config in configs.items():
        _inject(model, config, name, targets[name], places[name])
    for layer in lora_layers(model).values():
        layer.set_adapter(list(configs))  # all at once; PEFT leaves only the last one on
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _find_targets(model: nn.Module, config: peft.LoraConfig, where: str) -> list[str]:
    """The names of the modules that a configuration means, each of which can have its LoRA."""
    modules = {name: module for name, module in model.named_modules() if name}
    wanted = config.target_modules or ()
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        chosen = {name for name, module in modules.items() if _why_not(name, module) is None}
    else:
        chosen = matching_modules(modules, wanted, "target_modules", where)
    if config.exclude_modules:
        chosen -= matching_modules(modules, config.exclude_modules, "exclude_modules", where)
    if config.layers_to_transform is not None:
        chosen = _in_layers(chosen, config.layers_to_transform, config.layers_pattern, where)
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
    layers = {name: module for name in targets if isinstance(module := modules[name], nn.Linear)}
    _check_ranks(layers, config, where)
    return targets


def matching_modules(names: Iterable[str], wanted: str | Iterable[str], field: str, where: str) -> set[str]:
    """Names that match a regular expression, or that are or end with one of several. Raises InputError for none."""
    names = list(names)
    if isinstance(wanted, str):
        found = whole_matches(wanted, names, field, where)
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


def _in_layers(
    names: Iterable[str], layers: int | Iterable[int], lists: str | list[str] | None, where: str
) -> set[str]:
    """Names within layers of the wanted numbers; of any list of layers where `lists` names none."""
    wanted = {layers} if isinstance(layers, int) else set(layers)
    pattern = "|".join([lists] if isinstance(lists, str) else lists or [r"[^.]+"])
    # PEFT's own search misses the lists at the top of a model, and `transformer_blocks` is one.
    found = numbers_after(pattern, names, "layers_pattern", where)
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
    if not changes_music(name):
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
    fits = {}
    for field in ("rank_pattern", "alpha_pattern"):
        fits[field] = names_by_key(getattr(config, field), layers, field, where)
        for pattern, names in fits[field].items():
            if not names:
                raise InputError(f"`{pattern}` of `{field}` matches no targeted module", where=where)
    ranks: dict[str, int] = {}
    for pattern, names in fits["rank_pattern"].items():
        for name in names:
            ranks.setdefault(name, config.rank_pattern[pattern])
    too_large = {
        name: (min(layer.in_features, layer.out_features), rank)
        for name, layer in layers.items()
        if (rank := ranks.get(name, config.r)) > min(layer.in_features, layer.out_features)
    }
    if too_large:
        name, (limit, rank) = min(too_large.items(), key=lambda item: item[1])
        layer = layers[name]
        raise InputError(
            f"rank {rank} is larger than the layer `{name}`, which is {layer.in_features} → {layer.out_features}",
            where=where,
            fix=f"use a rank of at most {limit}, for all layers in `r` or for this one in `rank_pattern`",
        )


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
    config.target_modules = list(targets)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    for field in ("rank_pattern", "alpha_pattern"):
        values = getattr(config, field)
        setattr(config, field, names_for_peft(names_by_key(values, targets, field, where), values))
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
