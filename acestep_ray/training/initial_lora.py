"""Starting a LoRA's training from another LoRA."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from acestep_ray.errors import InputError
from acestep_ray.export.fetched import fetched_lora
from acestep_ray.export.lora import ADAPTER_NAME, check_fits, lora_layers, lora_weights
from acestep_ray.export.names import short_name
from acestep_ray.export.reading import LoraUpdate, find_lora_file, read_lora, some
from acestep_ray.paths import expand_home
from acestep_ray.storage import Store, is_url
from acestep_ray.training.lora import matching_modules
from acestep_ray.training.lora_config import adapter_configs


def initial_loras(path: str | None, lora: Mapping[str, Any]) -> dict[str, str]:
    """The LoRA that each adapter starts from, by its name: `path` itself, or for named adapters `path`/NAME.

    Raises InputError where a named adapter has none.
    """
    if path is None:
        return {}
    adapters = list(adapter_configs(lora))
    if adapters == [ADAPTER_NAME]:
        return {ADAPTER_NAME: path}
    if is_url(path):
        return {name: Store.at(path).url_of(name) for name in adapters}
    return {name: str(find_lora_file(Path(expand_home(path)) / name)) for name in adapters}


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
        a, b, magnitude = lora_weights(layer, adapter)
        a.copy_(update.a)
        b.copy_(update.b / layer.scaling[adapter])
        if magnitude is not None:
            lengths = update.magnitude
            if lengths is None:
                base = cast(nn.Linear, layer.get_base_layer())
                lengths = update.apply(base.weight.flatten(1)).norm(dim=1)
            magnitude.copy_(lengths)


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
        raise InputError(f"{some(unknown)} is not a module of this model", where=str(path))
    targets = sorted(set(map(short_name, updates)))
    if matching_modules(names, targets, "target_modules", str(path)) != updates.keys():
        targets = sorted(updates)
    differences = [f"it has {some(more)}, the configuration does not"] if more else []
    differences += [f"the configuration has {some(fewer)}, it does not"] if fewer else []
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
        base = cast(nn.Linear, layer.get_base_layer())
        check_fits(name, updates[name], (base.out_features, base.in_features), path)
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
