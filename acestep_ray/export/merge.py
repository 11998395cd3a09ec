"""`export merge`: a base model with LoRAs in its weights, as a complete checkpoint directory."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from acestep_ray.config import MergeConfig
from acestep_ray.errors import InputError
from acestep_ray.export.fetched import fetched_lora
from acestep_ray.export.formats import DTYPES as LORA_DTYPES
from acestep_ray.export.lora import check_lora_fits, merged_weight
from acestep_ray.export.reading import LoraUpdate
from acestep_ray.export.source import open_source
from acestep_ray.export.transformer import WeightInfo, parse_size, write_weights
from acestep_ray.hints import one_of
from acestep_ray.models.checkpoint import LYRIC_VOCAB, PARTS, TRANSFORMER, CheckpointDir
from acestep_ray.models.weights import read_weights
from acestep_ray.paths import split_paths
from acestep_ray.storage import Store, check_new, check_room, is_url, output_folder
from acestep_ray.terminal import Progress, fact_table
from acestep_ray.terminal.numbers import number_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RECORD = "merged.json"
"""What a merged checkpoint was made of."""
_OTHER_PARTS = [*(part for part in PARTS.values() if part != TRANSFORMER), Path(LYRIC_VOCAB).parent.name]


@dataclass(frozen=True)
class Strength:
    """A LoRA's changes and how strongly they are used."""

    path: Path
    updates: dict[str, LoraUpdate]
    weight: float
    place: str
    """The path or URL, for messages."""


@dataclass
class MergeSummary:
    """What was written."""

    directory: Path | str
    """A URL in object storage."""
    files: int
    """Of the transformer's weights."""
    num_bytes: int
    changed: int
    """Weights that the LoRAs change."""
    loras: list[Strength]
    seconds: float

    def render(self) -> str:
        """The summary as text."""
        size = f"{self.num_bytes / 1e6:,.1f} MB in {self.files} files"
        return fact_table(
            [
                *(("LoRA", f"{lora.place} at strength {number_text(lora.weight, 6)}") for lora in self.loras),
                ("changed", f"{self.changed} weights"),
                ("checkpoint", f"{self.directory} (transformer: {size})"),
                ("took", f"{self.seconds:,.1f} s"),
            ]
        )


def merge(config: MergeConfig) -> MergeSummary:
    """Write a checkpoint whose transformer is the base with LoRAs merged in; one weight is in memory at a time.

    Raises InputError before anything is written.
    """
    started = time.monotonic()
    if config.dtype not in DTYPES:
        fix = one_of(config.dtype, DTYPES, elsewhere=LORA_DTYPES, separator=" or ")
        raise InputError("unknown dtype", where=f"--dtype {config.dtype}", fix=fix)
    largest_file = parse_size(config.max_shard_size)
    if largest_file is None:
        where = f"--max_shard_size {config.max_shard_size}"
        raise InputError("not a size", where=where, fix="such as 5GB or 500MB")
    check_new(config.output_dir)
    checkpoint = CheckpointDir.open(config.checkpoint_dir)
    base = checkpoint.path / TRANSFORMER
    loras = read_strengths(config.lora_path, config.lora_weight)
    stored = {name: WeightInfo(tuple(tensor.shape), tensor.dtype) for name, tensor, _ in read_weights(base)}
    for lora in loras:
        check_lora_fits(lora.updates, {name: info.shape for name, info in stored.items()}, lora.place)
    infos = {name: _in_dtype(info, DTYPES[config.dtype]) for name, info in stored.items()}
    changes: dict[str, list[tuple[LoraUpdate, float]]] = {}
    for lora in loras:
        for name, update in lora.updates.items():
            changes.setdefault(f"{name}.weight", []).append((update, lora.weight))

    progress, written = Progress("merging", len(infos), "weights"), itertools.count(1)

    def change(name: str, weight: Tensor) -> Tensor:
        progress.update(next(written))
        return merged_weight(weight, changes[name]) if name in changes else weight

    if Store.at(config.output_dir).is_local:
        parts = [checkpoint.path / name for name in _OTHER_PARTS]
        needed = sum(info.num_bytes for info in infos.values()) + sum(map(_bytes_below, parts))
        check_room(config.output_dir, needed, f"--output_dir {config.output_dir}")
    with output_folder(config.output_dir, last=[RECORD]) as folder:
        for name in _OTHER_PARTS:
            if (checkpoint.path / name).is_dir():
                shutil.copytree(checkpoint.path / name, folder / name)
        transformer = folder / TRANSFORMER
        transformer.mkdir()
        shutil.copyfile(base / "config.json", transformer / "config.json")
        with progress:
            write_weights(transformer, infos, base, change, largest_file=largest_file)
        record = {
            "loras": [{"name": lora.path.name, "weight": lora.weight} for lora in loras],
            "dtype": config.dtype,
            "base": checkpoint.fingerprint("transformer"),
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        files = list(transformer.glob("*.safetensors"))
        num_bytes = sum(file.stat().st_size for file in files)
        CheckpointDir.open(folder)
    return MergeSummary(
        directory=Store.at(config.output_dir).place_of(""),
        files=len(files),
        num_bytes=num_bytes,
        changed=len(changes.keys() & stored.keys()),
        loras=loras,
        seconds=time.monotonic() - started,
    )


def read_strengths(paths: str, weights: str | None) -> list[Strength]:
    """The LoRAs of `--lora_path`, several with commas, each with its number of `--lora_weight` or 1.

    An experiment of several adapters counts as one. Raises InputError.
    """
    places = split_paths(paths)
    if not places:
        raise InputError(
            "no LoRA is given", where=f"--lora_path {paths!r}", fix="give one, or several with commas"
        )
    numbers = _numbers(weights) if weights is not None else [1.0] * len(places)
    if len(numbers) != len(places):
        raise InputError(
            f"{len(numbers)} weights for {len(places)} LoRAs",
            where=f"--lora_weight {weights}",
            fix="give as many as there are in --lora_path, with commas between them",
        )
    strengths = []
    for place, weight in zip(places, numbers, strict=True):
        with fetched_lora(place) as path:
            source = open_source(path, where="--lora_path", fetched_from=place if is_url(place) else None)
        strengths += [Strength(lora.path, lora.updates, weight, lora.place) for lora in source.loras.values()]
    return strengths


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(item) for item in text.split(",") if item.strip()]
    except ValueError:
        numbers = [float("nan")]
    if not all(abs(number) < float("inf") for number in numbers):
        raise InputError("not a list of numbers", where=f"--lora_weight {text}", fix="such as 0.8,0.5")
    return numbers


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _in_dtype(info: WeightInfo, dtype: torch.dtype) -> WeightInfo:
    return WeightInfo(info.shape, dtype) if info.dtype.is_floating_point else info
