"""Rows of the cache made without models, and what a run does with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from acestep_ray.cache.commit import commit, plan_commit, repack
from acestep_ray.cache.parts import read_dims, store_rows
from acestep_ray.cache.schema import FORMAT_VERSION, SAMPLE_SCHEMA
from acestep_ray.cache.songs import Reject
from acestep_ray.cache.stored import claim_output_dir, find_rows
from acestep_ray.storage import Store

TEXT_DIM = 6
SPEAKER_DIM = 5
SSL_DIMS = {"mert": 7, "m-hubert": 4}
SETTINGS = {"ssl_frame_stride": 1, "speaker_dim": SPEAKER_DIM}


def song_row(
    key: str,
    *,
    frames: int = 30,
    seed: int = 0,
    prompts: Sequence[str] = ("pop, slow", "slow, pop", "a song"),
    lyric_ids: Sequence[int] = (5, 6, 7),
    speaker: bool = False,
    ssl_frame_stride: int = 1,
    text_dim: int = TEXT_DIM,
    ssl_dims: dict[str, int] = SSL_DIMS,
    **changes: Any,
) -> pa.Table:
    """A row of random features; other columns may be given by name."""
    random = np.random.default_rng([seed, frames, *key.encode()])

    def half(*shape: int) -> bytes:
        return random.standard_normal(shape).astype(np.float16).tobytes()

    row = {
        "key": key,
        "fingerprint": random.bytes(32).hex(),
        "filename": f"audio/{key}.wav",
        "song_key": key,
        "window": 0,
        "is_last_window": True,
        "start_seconds": 0.0,
        "audio_version": "1000-1",
        "audio_sha256": "a" * 64,
        "speaker_sha256": "b" * 64 if speaker else None,
        "speaker_version": "20-1" if speaker else None,
        "duration_seconds": frames / 10,
        "latents": half(8, 16, frames),
        "latent_frames": frames,
        "prompts": [{"source": "tags", "text": text} for text in prompts],
        "text_embeddings": [half(len(text), text_dim) for text in prompts],
        "text_dim": text_dim,
        "lyric_ids": list(lyric_ids),
        "lyric_languages": ["en"] if lyric_ids else [],
        "speaker": random.standard_normal(SPEAKER_DIM).astype(np.float32).tobytes() if speaker else None,
        "ssl": [
            {
                "name": name,
                "frames": 7 * frames,
                "dim": dim,
                "directions": random.bytes(-(-7 * frames // ssl_frame_stride) * dim),
            }
            for name, dim in ssl_dims.items()
        ],
    }
    return pa.Table.from_pylist([{**row, **changes}], schema=SAMPLE_SCHEMA)


def rows_of_every_shape() -> list[pa.Table]:
    """Songs with empty, absent and very large values."""
    text_only = dict.fromkeys(("latents", "latent_frames", "ssl"))
    ssl_entry = {"name": "mert", "frames": 4500, "dim": 1024, "directions": bytes(4500 * 1024)}
    return [
        song_row("plain"),
        song_row("speaker", speaker=True),
        pa.Table.from_pylist([{"key": "nothing"}], schema=SAMPLE_SCHEMA),
        song_row("no latents", **text_only),
        song_row("empty", latents=b"", prompts=[], lyric_ids=[], ssl=[], speaker=b""),
        song_row("null ends", lyric_languages=["en", None], ssl=[None, ssl_entry, None]),
        song_row("\n\t🎵" * 1000, filename=""),
        song_row("many pages", lyric_ids=range(1_000_000), lyric_languages=["en"] * 300_000),
        song_row("values of many pages", text_embeddings=[bytes(300_000)] * 40 + [b""]),
        song_row("more values than a batch", text_embeddings=[bytes([i % 7]) for i in range(5000)]),
        song_row("a 240 s song", frames=2584, ssl_dims={"mert": 1024, "m-hubert": 768}),
        song_row("one value of many pages", latents=np.random.default_rng(0).bytes(9_000_000)),
        song_row("last"),
    ]


def reject(key: str, reason: str = "missing", **fields: Any) -> Reject:
    return Reject(
        key,
        f"audio/{key}.wav",
        "decode",
        reason,
        "the audio file does not exist",
        **{"song_key": key, **fields},
    )


def finish(
    cache: Store,
    rejects: Sequence[Reject] = (),
    wanted: Sequence[pa.Table] | None = None,
    settings: Mapping[str, Any] = SETTINGS,
) -> pa.Table:
    """What a run does once every song is stored; returns the ledger of the cache.

    Commits the stored copies of the wanted rows, or of every key the first one that is found.
    """
    rows = find_rows(cache)
    fingerprints = None if wanted is None else {fingerprint_of(row) for row in wanted}
    first: dict[str, int] = {}
    for i, (key, fingerprint) in enumerate(
        zip(rows["key"].to_pylist(), rows["fingerprint"].to_pylist(), strict=True)
    ):
        if fingerprints is None or fingerprint in fingerprints:
            first.setdefault(key, i)
    assert wanted is None or len(first) == len(wanted)
    plan = plan_commit(rows.take(pa.array(sorted(first.values()), pa.int64())))
    final = pa.concat_tables([plan.kept, *(repack(cache, group) for group in plan.repack)])
    counts = {"inputs": len(final) + len(rejects), "samples": len(final), "rejects": len(rejects)}
    manifest = {"format_version": FORMAT_VERSION, "counts": counts, "settings": dict(settings)}
    commit(cache, final, rejects, {**manifest, **read_dims(cache, final)})
    return final


def write_rows(cache: Store, rows: Sequence[pa.Table], rejects: Sequence[Reject] = ()) -> Store:
    """A finished cache of these rows, stored as one part."""
    claim_output_dir(cache)
    if rows:
        store_rows(cache, rows)
    finish(cache, rejects)
    return cache


def fingerprint_of(row: pa.Table) -> str:
    return row["fingerprint"][0].as_py()


def contents(cache: Store) -> dict[str, bytes]:
    """Every file of a cache with its bytes."""
    return {name: cache.read_bytes(name) for name in cache.names()}


def keys_of(cache: Store, folder: str = "samples") -> list[str]:
    """Keys in all files of a folder of the cache, sorted."""
    return sorted(pq.read_table(cache.path / folder, columns=["key"])["key"].to_pylist())
