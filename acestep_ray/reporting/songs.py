"""The songs of a run: how many, how long, and which could not be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from acestep_ray.cache.index import read_manifest
from acestep_ray.cache.schema import REJECT_SCHEMA, table_from_bytes
from acestep_ray.cache.stats import cache_stats
from acestep_ray.errors import InputError
from acestep_ray.storage import Store
from acestep_ray.training.scan import SCAN, SCAN_SCHEMA, SONGS, read_songs
from acestep_ray.training.throughput import seconds_of

LENGTH_SECONDS = 30
"""Songs are counted by length in steps of these."""


@dataclass(frozen=True)
class SongCounts:
    """The songs of a run."""

    songs: int
    seconds: float
    """Of audio."""
    languages: dict[str, int]
    """In how many songs a language is sung; empty where that was not noted."""
    lengths: list[int]
    """Songs by length, a number for each `LENGTH_SECONDS`; empty where that was not noted."""
    rejects: list[dict[str, Any]]
    """What could not be used: `key`, `filename`, `stage`, `reason`, `message`."""


def count_songs(dataset_path: str | None, experiment: Path) -> SongCounts:
    """The songs in a run's feature cache, or those that a run without one noted itself.

    Raises InputError where neither is at hand.
    """
    if (experiment / SONGS).is_file():
        return _noted_by_run(experiment)
    if dataset_path is None:
        raise InputError("the run's settings, which name its songs, are not at hand")
    stats = cache_stats(dataset_path)
    store = Store.at(dataset_path)
    try:
        rejects = table_from_bytes(store.read_bytes(read_manifest(store)["rejects"]), REJECT_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"the cache's rejects cannot be read ({error})", where=dataset_path) from None
    return SongCounts(
        stats.songs,
        stats.seconds,
        {name or "no lyrics": count for name, count in stats.languages.items()},
        stats.lengths,
        _rows(rejects),
    )


def _noted_by_run(experiment: Path) -> SongCounts:
    try:
        frames = read_songs(Store.at(experiment))["latent_frames"].to_numpy()
        scan = experiment / SCAN
        found = table_from_bytes(scan.read_bytes(), SCAN_SCHEMA) if scan.is_file() else None
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"what the run noted of its songs cannot be read ({error})", where=str(experiment)
        ) from None
    rejects = [] if found is None else _rows(found.filter(pc.is_valid(found["reason"])))
    return SongCounts(len(frames), seconds_of(int(frames.sum())), {}, [], rejects)


def _rows(rejects: pa.Table) -> list[dict[str, Any]]:
    return rejects.select(["key", "filename", "stage", "reason", "message"]).sort_by("key").to_pylist()
