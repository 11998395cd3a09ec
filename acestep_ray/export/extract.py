"""`export extract`: what fine-tuning has changed of a transformer, as a LoRA of a chosen rank."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from acestep_ray.config import ExtractConfig
from acestep_ray.device import check_device_name, resolve_device
from acestep_ray.errors import InputError
from acestep_ray.export.formats import DTYPES, universal_bytes
from acestep_ray.export.low_rank import LayerError, best_of_rank, total_relative_error
from acestep_ray.export.names import can_have_lora, changes_music
from acestep_ray.export.reading import LORA_FILE, LoraUpdate, some
from acestep_ray.hints import one_of
from acestep_ray.models.checkpoint import TRANSFORMER, CheckpointDir
from acestep_ray.models.weights import read_weights
from acestep_ray.storage import Store, check_new, fetched, output_folder
from acestep_ray.terminal import Progress, column_table, fact_table
from acestep_ray.terminal.numbers import number_text

REPORT = "errors.json"
"""The error of every module, beside the LoRA."""
_LISTED = 12


@dataclass
class ExtractSummary:
    """What was made of the difference."""

    file: Path | str
    """A URL in object storage."""
    errors: dict[str, LayerError]
    """By module."""
    left_out: dict[str, float]
    """Norms of changes that no LoRA can hold (biases, embeddings, norms), by parameter."""
    relative_error: float
    """Over everything that has changed and that the music depends on."""
    seconds: float

    def render(self) -> str:
        """The summary as text, the modules with the largest errors first."""
        largest = sorted(self.errors.items(), key=lambda item: -item[1].error)
        modules = column_table(
            ["relative error", "‖change‖", "rank", "module"],
            [
                [f"{e.relative:.4f}", number_text(e.norm, 4), str(e.rank), name]
                for name, e in largest[:_LISTED]
            ],
        )
        rows: list[tuple[str, object]] = []
        if len(largest) > _LISTED:
            rows.append(("others", f"{len(largest) - _LISTED} modules with smaller errors: {REPORT}"))
        if self.left_out:
            norm = sum(value**2 for value in self.left_out.values()) ** 0.5
            rows.append(
                (
                    "left out",
                    f"{len(self.left_out)} changes of norm {number_text(norm, 4)} that no LoRA can hold",
                )
            )
        rows += [
            ("in all", f"{self.relative_error:.4f} of the change is not in the LoRA"),
            ("LoRA", self.file),
            ("took", f"{self.seconds:,.1f} s"),
        ]
        return f"{modules}\n{fact_table(rows)}"


def extract(config: ExtractConfig) -> ExtractSummary:
    """Write the difference of two transformers as a LoRA, and what it leaves. Raises InputError."""
    started = time.monotonic()
    if config.rank < 1:
        raise InputError("must be at least 1", where=f"--rank {config.rank}")
    if config.dtype not in DTYPES:
        raise InputError("unknown dtype", where=f"--dtype {config.dtype}", fix=one_of(config.dtype, DTYPES))
    check_device_name(config.device)
    check_new(config.output_dir)
    base = CheckpointDir.open(config.checkpoint_dir).path / TRANSFORMER
    with fetched_transformer(config.finetuned_path) as finetuned:
        check_same_layout(base, finetuned)
        updates, errors, left_out = low_rank_difference(
            base, finetuned, config.rank, resolve_device(config.device)
        )
        if not updates:
            raise InputError(
                "nothing has changed that a LoRA could hold",
                where=f"{finetuned} and {base}" + (f" (changed: {some(left_out)})" if left_out else ""),
            )
    total = total_relative_error(errors, sum(norm**2 for norm in left_out.values()) ** 0.5)
    report = {
        "rank": config.rank,
        "relative_error": total,
        "modules": {name: {**asdict(e), "relative": e.relative} for name, e in errors.items()},
        "left_out": left_out,
    }
    with output_folder(config.output_dir, last=[LORA_FILE]) as folder:
        (folder / LORA_FILE).write_bytes(universal_bytes(updates, DTYPES[config.dtype]))
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    file = Store.at(config.output_dir).place_of(LORA_FILE)
    return ExtractSummary(file, errors, left_out, total, time.monotonic() - started)


@contextlib.contextmanager
def fetched_transformer(path: str) -> Iterator[Path]:
    """What `find_transformer` gives; of a URL a copy on this machine, while the block runs."""
    store = Store.at(path)
    if store.is_local:
        yield find_transformer(path)
        return
    inside = store.child(TRANSFORMER)
    with fetched(inside if inside.status("config.json") is not None else store) as folder:
        yield find_transformer(str(folder))


def find_transformer(path: str) -> Path:
    """The folder of a fine-tuned transformer: itself, or the one in a run's folder or in a checkpoint directory."""
    folder = Path(path)
    for candidate in (folder / TRANSFORMER, folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise InputError(
        "no transformer here",
        where=f"--finetuned_path {path}",
        fix=f"give the {TRANSFORMER} folder that training all weights wrote, or a checkpoint directory",
    )


def check_same_layout(base: Path, finetuned: Path) -> None:
    """Raise InputError where two transformers have not the same weights, by name and shape."""
    shapes = [{name: tuple(t.shape) for name, t, _ in read_weights(folder)} for folder in (base, finetuned)]
    different = [name for name in sorted(shapes[0].keys() | shapes[1].keys()) if changes_music(name)]
    different = [name for name in different if shapes[0].get(name) != shapes[1].get(name)]
    if different:
        name = different[0]
        raise InputError(
            f"{len(different)} weights differ in shape or are missing: `{name}` is "
            f"{shapes[0].get(name, 'missing')} in the base, {shapes[1].get(name, 'missing')} in the fine-tuned model",
            where=f"{base} and {finetuned}",
            fix="give the checkpoint that the fine-tuning started from",
        )


@torch.no_grad()
def low_rank_difference(
    base: Path, finetuned: Path, rank: int, device: torch.device
) -> tuple[dict[str, LoraUpdate], dict[str, LayerError], dict[str, float]]:
    """The nearest LoRA of the difference, its error by module, and the norms of changes that no LoRA can hold.

    Projectors of the SSL losses and parameters that the model never reads change no music and are passed over. Of both
    models one weight is in memory at a time.
    """
    changed = {name: tensor for name, tensor, _ in read_weights(finetuned)}  # mapped, not read
    updates: dict[str, LoraUpdate] = {}
    errors: dict[str, LayerError] = {}
    left_out: dict[str, float] = {}
    weights = [one for one in read_weights(base) if changes_music(one[0])]
    for name, before, path in Progress("comparing", len(weights), "weights").over(weights):
        difference = _difference(before, changed[name], device)
        if not difference.isfinite().all():
            raise InputError(
                f"`{name}` has NaN or infinite values",
                where=f"{path} or {finetuned}",
                fix="take an earlier checkpoint of the run",
            )
        if not difference.any():
            continue
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and can_have_lora(module):
            updates[module], errors[module] = best_of_rank(difference.flatten(1), rank)
        else:
            left_out[name] = difference.norm().item()
    return updates, errors, left_out


def _difference(before: Tensor, after: Tensor, device: torch.device) -> Tensor:
    return after.to(device, torch.float32) - before.to(device, torch.float32)
