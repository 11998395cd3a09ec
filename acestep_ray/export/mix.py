"""`export mix`: several LoRAs with weights as one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from acestep_ray.config import MixConfig
from acestep_ray.errors import InputError
from acestep_ray.export.formats import DTYPES, universal_bytes
from acestep_ray.export.low_rank import LayerError, reduced, total_relative_error
from acestep_ray.export.merge import Strength, read_strengths
from acestep_ray.export.reading import LORA_FILE, LoraUpdate
from acestep_ray.hints import one_of
from acestep_ray.storage import Store, check_new, output_folder
from acestep_ray.terminal import fact_table
from acestep_ray.terminal.numbers import number_text


@dataclass
class MixSummary:
    """What was mixed."""

    file: Path | str
    """A URL in object storage."""
    loras: list[Strength]
    ranks: tuple[int, int]
    """Least and largest rank of a module."""
    relative_error: float
    """What a smaller rank leaves of the sum; 0 for the sum itself."""
    seconds: float

    def render(self) -> str:
        """The summary as text."""
        least, largest = self.ranks
        return fact_table(
            [
                *(("LoRA", f"{lora.place} at strength {number_text(lora.weight, 6)}") for lora in self.loras),
                ("rank", least if least == largest else f"{least} to {largest}"),
                ("error", f"{self.relative_error:.4f} of the sum is not in the mixture"),
                ("file", self.file),
                ("took", f"{self.seconds:,.1f} s"),
            ]
        )


def mix(config: MixConfig) -> MixSummary:
    """Write the weighted sum of LoRAs as one LoRA: exactly, or the nearest one of `rank`. Raises InputError."""
    started = time.monotonic()
    if config.rank is not None and config.rank < 1:
        raise InputError("must be at least 1", where=f"--rank {config.rank}")
    if config.dtype not in DTYPES:
        raise InputError("unknown dtype", where=f"--dtype {config.dtype}", fix=one_of(config.dtype, DTYPES))
    check_new(config.output_dir)
    loras = read_strengths(config.lora_path, config.lora_weight)
    updates = weighted_sum(loras)
    errors: dict[str, LayerError] = {}
    if config.rank is not None:
        for name, update in updates.items():
            if update.rank > config.rank:
                updates[name], errors[name] = reduced(update, config.rank)
            else:
                errors[name] = LayerError(update.norm(), 0.0, update.rank)
    with output_folder(config.output_dir) as folder:
        (folder / LORA_FILE).write_bytes(universal_bytes(updates, DTYPES[config.dtype]))
    ranks = [update.rank for update in updates.values()]
    return MixSummary(
        file=Store.at(config.output_dir).place_of(LORA_FILE),
        loras=loras,
        ranks=(min(ranks), max(ranks)),
        relative_error=total_relative_error(errors),
        seconds=time.monotonic() - started,
    )


def weighted_sum(loras: Sequence[Strength]) -> dict[str, LoraUpdate]:
    """The sum of LoRAs, each times its weight: the ranks of a module add up.

    Raises InputError for DoRAs, which are no sums, and for LoRAs of different models.
    """
    by_module: dict[str, list[tuple[Strength, LoraUpdate]]] = {}
    for lora in loras:
        for name, update in lora.updates.items():
            if update.magnitude is not None:
                raise InputError(
                    f"a DoRA cannot be mixed, for its changes do not add up (`{name}`)",
                    where=lora.place,
                    fix="merge it with `acestep-ray export merge`, and make a LoRA of that with `export extract`",
                )
            by_module.setdefault(name, []).append((lora, update))
    mixed = {}
    for name, parts in sorted(by_module.items()):
        (first, shape), *others = [(lora.place, update.shape) for lora, update in parts]
        for path, other in others:
            if other != shape:
                raise InputError(
                    f"`{name}` is {shape} in one LoRA and {other} in another: they are of different models",
                    where=f"{first} and {path}",
                )
        mixed[name] = LoraUpdate(
            torch.cat([update.a for _, update in parts]),
            torch.cat([lora.weight * update.b for lora, update in parts], dim=1),
            None,
        )
    return mixed
