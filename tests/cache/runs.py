"""What a run of precompute has made, and what it should have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from acestep_ray.cache.decoding import decode_song, file_versions
from acestep_ray.cache.encoding import Encoder
from acestep_ray.cache.precompute import check_settings, make_recipe
from acestep_ray.cache.songs import DecodedSong, Song, build_row
from acestep_ray.config import PrecomputeConfig
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.storage import Store


def rows_of(cache: str | Path, folder: str = "samples") -> dict[str, dict[str, Any]]:
    """The rows of a cache's samples or rejects, by key."""
    rows = pq.read_table(Path(cache) / folder).to_pylist()
    by_key = {row["key"]: row for row in rows}
    assert len(by_key) == len(rows)
    return by_key


def encoded_row(encoder: Encoder, decoded: DecodedSong) -> pa.Table:
    """The row that the stages make of a song that can be used."""
    (columns,) = encoder.encode([decoded])
    return build_row(decoded, columns, encoder.recipe)


def encode_directly(
    config: PrecomputeConfig, checkpoint: CheckpointDir, row: Mapping[str, Any]
) -> dict[str, Any]:
    """The row that the stages make of a song in this process."""
    recipe = make_recipe(config, checkpoint, check_settings(config), "cpu")
    encoder = Encoder.load(checkpoint, recipe, "cpu")
    root, song = Store.at(config.dataset_path), Song.from_row(row)
    (decoded,) = decode_song(root, song, recipe, file_versions(root, song))
    return encoded_row(encoder, decoded).to_pylist()[0]
