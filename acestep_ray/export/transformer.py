"""A transformer's weights in the released layout, written tensor by tensor: no model is in memory."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acestep_ray.models.checkpoint import TRANSFORMER, CheckpointDir
from acestep_ray.models.weights import read_weights
from acestep_ray.storage import Store, replaced_folder

WEIGHTS = "diffusion_pytorch_model"
LARGEST_FILE = 5_000_000_000
"""Bytes of a file; more weights go into several, with an index, as diffusers writes them."""

# The format's own names.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class WeightInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its size in a file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def export_transformer(checkpoint: CheckpointDir, weights: Mapping[str, Tensor], directory: Path) -> Path:
    """Write `directory` with the checkpoint's `config.json`, the trained `weights`, and all others as they were.

    The files have every name of the checkpoint's, also of parameters that the model never uses. What was there is
    replaced once everything is written.
    """
    with replaced_folder(Store.at(directory)) as folder:
        write_transformer(checkpoint, weights, folder)
    return directory


def write_transformer(checkpoint: CheckpointDir, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write what `export_transformer` does into an empty folder."""
    base = checkpoint.path / TRANSFORMER
    infos = {
        name: WeightInfo(tuple(tensor.shape), weights.get(name, tensor).dtype)
        for name, tensor, _ in read_weights(base)
    }
    shutil.copyfile(base / "config.json", folder / "config.json")
    write_weights(folder, infos, base, lambda name, tensor: weights.get(name, tensor))


def write_weights(
    directory: Path,
    infos: Mapping[str, WeightInfo],
    base: Path,
    change: Callable[[str, Tensor], Tensor],
    *,
    largest_file: int = LARGEST_FILE,
) -> None:
    """Write the weights of the transformer in `base`, each as `change` makes it, one in memory at a time.

    `infos` says what `change` gives, in the order of the files. More than `largest_file` bytes become several files and
    an index.
    """
    shards = _shards(infos, largest_file)
    where = {name: number for number, names in enumerate(shards) for name in names}
    # As safetensors' own files are: after the header, each tensor's bytes in the header's order.
    paths = [directory / _file_name(number, len(shards)) for number in range(len(shards))]
    offsets = {}
    for path, names in zip(paths, shards, strict=True):
        header, starts = _header({name: infos[name] for name in names})
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(infos[name].num_bytes for name in names))
        offsets.update(starts)
    for name, tensor, _ in read_weights(base):
        changed = change(name, tensor).to(infos[name].dtype)
        with open(paths[where[name]], "r+b") as file:
            file.seek(offsets[name])
            # numpy knows no bfloat16.
            file.write(changed.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if len(shards) > 1:
        total = sum(info.num_bytes for info in infos.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: paths[where[name]].name for name in sorted(where)},
        }
        path = directory / f"{WEIGHTS}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(infos: Mapping[str, WeightInfo], largest_file: int) -> list[list[str]]:
    """The names that share a file, in order; a tensor that is larger than a file has one of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.num_bytes > largest_file:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.num_bytes
    return shards


def _file_name(number: int, count: int) -> str:
    if count == 1:
        return f"{WEIGHTS}.safetensors"
    return f"{WEIGHTS}-{number + 1:05d}-of-{count:05d}.safetensors"


def _header(infos: Mapping[str, WeightInfo]) -> tuple[bytes, dict[str, int]]:
    """The beginning of a safetensors file, and where in the file each tensor begins."""
    entries: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    # Readers want every tensor at a multiple of its element's size: the largest elements come first.
    for name, info in sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize):
        starts[name], end = end, end + info.num_bytes
        entries[name] = {
            "dtype": _DTYPES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def parse_size(text: str) -> int | None:
    """Bytes that `5GB`, `500MB` or `200KB` means; None for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        return None
    return int(float(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2].upper()])
