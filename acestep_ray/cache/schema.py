"""The feature cache on disk: columns, files, manifest, and the song that training reads from it.

    manifest.json               what the cache is made of; written last, it names the index
    index-HASH.parquet          one small row a song: key, fingerprint, length, where its row lies
    samples/part-HASH.parquet   one row and one row group a song, sorted by key
    rejects/part-HASH.parquet   songs that could not be used, and why
    .incoming/                  songs of a run that has not ended; gone when it has

A HASH is that of the rows' fingerprints, so a file's name says its content and no file is ever changed in place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
LATENT_CHANNELS, LATENT_HEIGHT = 8, 16

MANIFEST = "manifest.json"
SAMPLES, REJECTS, INCOMING = "samples", "rejects", ".incoming"

SAMPLE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("fingerprint", pa.string()),
        ("filename", pa.string()),
        ("audio_sha256", pa.string()),
        ("speaker_sha256", pa.string()),
        ("duration_seconds", pa.float64()),
        # float16 (8, 16, latent_frames), little-endian, C order; so are all arrays below.
        ("latents", pa.large_binary()),
        ("latent_frames", pa.int32()),
        ("prompts", pa.list_(pa.struct([("source", pa.string()), ("text", pa.string())]))),
        # float16 (tokens, text_dim), one for each prompt.
        ("text_embeddings", pa.list_(pa.large_binary())),
        ("text_dim", pa.int32()),
        # Empty for a song without lyrics.
        ("lyric_ids", pa.list_(pa.int32())),
        ("lyric_languages", pa.list_(pa.string())),
        # float32 (speaker_dim,), or null.
        ("speaker", pa.large_binary()),
        # `frames` counts the features before the stride; `directions` is int8 (ceil(frames / stride), dim).
        (
            "ssl",
            pa.list_(
                pa.struct(
                    [
                        ("name", pa.string()),
                        ("frames", pa.int32()),
                        ("dim", pa.int32()),
                        ("directions", pa.large_binary()),
                    ]
                )
            ),
        ),
    ]
)

REJECT_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "filename", "stage", "reason", "message")])

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("fingerprint", pa.string()),
        ("latent_frames", pa.int32()),
        ("part", pa.string()),
        ("row_group", pa.int32()),
    ]
)


@dataclass
class CachedSong:
    """One song as training reads it. `W` is its number of latent frames."""

    key: str
    latents: torch.Tensor
    """(8, 16, W) float16."""
    prompts: list[str]
    prompt_sources: list[str]
    """Where each prompt comes from: the tags, or a recaption's name."""
    text_embeddings: list[torch.Tensor]
    """One (tokens, text_dim) float16 for each prompt."""
    lyric_ids: torch.Tensor
    """(L,) int64; a song without lyrics has the one id 0, to be masked out."""
    has_lyrics: bool
    speaker: torch.Tensor
    """(speaker_dim,) float32, zeros if the song has none."""
    ssl: dict[str, torch.Tensor]
    """Directions of the SSL features, int8 (frames kept, dim), for each SSL model of the cache."""
    ssl_frames: dict[str, int]
    """Frames of the same features before the stride."""


def quantise_directions(features: np.ndarray) -> np.ndarray:
    """Features (frames, dim) → int8 of the same shape: each frame scaled so that its largest component is 127.

    The loss is 1 − cosine, which no scale changes. A frame of zeros stays zeros.
    """
    features = np.asarray(features, dtype=np.float32)
    largest = np.abs(features).max(axis=1, keepdims=True)
    # Divided before multiplied: 127 / tiny would overflow.
    return np.rint(features / np.where(largest > 0, largest, 1) * 127).astype(np.int8)


def hash_of(*values: Any) -> str:
    """sha256 (hex) of JSON values; floats by their shortest exact form, keys sorted."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to; on success the file is at `path`, whole and on disk, and never half-written there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def parquet_writer(sink: Path | pa.NativeFile, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer that makes each table a row group, uncompressed: features hardly shrink, plain pages read 4 × faster."""
    return pq.ParquetWriter(sink, schema, compression="NONE", use_dictionary=False, write_statistics=["key"])


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, whole or not at all."""
    with written_whole(path) as unfinished:
        unfinished.write_text(
            json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )
