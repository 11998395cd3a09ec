"""Which songs a feature cache holds, how long they are, and where each one lies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from acestep_ray.cache.schema import FORMAT_VERSION, INCOMING, MANIFEST, SAMPLES
from acestep_ray.errors import InputError

_FIX = "run `acestep-ray precompute` again: it computes only what is missing"


@dataclass(frozen=True)
class CacheIndex:
    """The songs of a cache, sorted by key; song `i` is the same everywhere below."""

    path: Path
    fingerprint: str
    """Hash (hex) over every key and row fingerprint, in order."""
    keys: list[str]
    latent_frames: np.ndarray
    """Length of each song in latent frames, int32 (songs,)."""
    parts: list[str]
    """File names in `samples/`."""
    part_numbers: np.ndarray
    """Which of `parts` holds each song, int32 (songs,)."""
    row_groups: np.ndarray
    """Which row group of its part holds each song, int32 (songs,)."""
    ssl_dims: dict[str, int]
    """Width of the features of each SSL model; empty for a cache without SSL features."""
    ssl_frame_stride: int
    text_dim: int
    speaker_dim: int
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def open(cls, path: str | Path) -> CacheIndex:
        """Read the manifest and the index, not the songs. Raises InputError if `path` is no complete cache."""
        path = Path(path)
        manifest = _read_manifest(path)
        if manifest["counts"]["samples"] == 0:
            raise InputError(
                "the feature cache holds no songs",
                where=str(path),
                fix="its rejects/ say why each song was left out",
            )
        try:
            table = pq.read_table(path / manifest["index"])
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"the cache's index cannot be read ({error})", where=str(path), fix=_FIX
            ) from None
        part_column = table["part"].combine_chunks().dictionary_encode()
        parts = part_column.dictionary.to_pylist()
        _check_parts(path, parts)
        return cls(
            path=path,
            fingerprint=manifest["fingerprint"],
            keys=table["key"].to_pylist(),
            latent_frames=table["latent_frames"].to_numpy(),
            parts=parts,
            part_numbers=part_column.indices.to_numpy(),
            row_groups=table["row_group"].to_numpy(),
            ssl_dims=manifest["ssl"],
            ssl_frame_stride=manifest["settings"]["ssl_frame_stride"],
            text_dim=manifest["text_dim"],
            speaker_dim=manifest["settings"]["speaker_dim"],
            manifest=manifest,
        )


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        unfinished = (path / SAMPLES).is_dir() or (path / INCOMING).is_dir()
        raise InputError(
            "the feature cache is not complete" if unfinished else "this is not a feature cache",
            where=f"{file} does not exist",
            fix=_FIX if unfinished else "give the directory that `acestep-ray precompute` wrote",
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the cache's manifest cannot be read ({error!r})", where=str(file), fix=_FIX
        ) from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"the feature cache has the format version {version}, this program reads {FORMAT_VERSION}",
            where=str(file),
            fix="run `acestep-ray precompute` again with this version of the program",
        )
    return manifest


def _check_parts(path: Path, parts: list[str]) -> None:
    present = {file.name for file in (path / SAMPLES).glob("*.parquet")}
    missing = [part for part in parts if part not in present]
    if missing:
        raise InputError(
            f"{len(missing)} of the cache's {len(parts)} parts are missing",
            where=str(path / SAMPLES / missing[0]),
            fix=_FIX,
        )
