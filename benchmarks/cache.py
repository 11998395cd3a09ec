"""Opening the index of a feature cache, and reading 240 s songs at random from a local disk.

    python benchmarks/cache.py --json cache.json
    python benchmarks/cache.py --tiny

The index is made for a given number of songs with keys of 40 characters, without the songs. The songs have the sizes
of real ones with both SSL models and a frame stride of 4, about 8 MB each; they are read from the page cache. The
reference is what a reader without byte ranges does: it keeps the parts open, their footers in memory, and reads a row
group of one.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from acestep_ray.cache.commit import commit, content_hash
from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.parts import read_dims, store_rows
from acestep_ray.cache.reader import CacheReader
from acestep_ray.cache.schema import FORMAT_VERSION, INDEX_SCHEMA, SAMPLE_SCHEMA, SAMPLES, table_to_bytes
from acestep_ray.cache.stored import claim_output_dir, find_rows
from acestep_ray.storage import Store

LATENT_FRAMES = 2584
PROMPTS, PROMPT_TOKENS, TEXT_DIM = 5, 40, 768
SSL_STRIDE = 4
SSL_SHAPES = {"mert": (18_000, 1024), "m-hubert": (12_000, 768)}
SONGS_PER_PART = 8
SETTINGS = {"ssl_frame_stride": SSL_STRIDE, "speaker_dim": 512}


def open_index(songs: int, folder: Path, repeats: int) -> dict[str, Any]:
    """Size of an index of so many songs, and the seconds that it takes to open it and to find a key."""
    draws = np.random.default_rng(0)
    lengths = draws.integers(7_500_000, 8_500_000, songs)
    parts = np.arange(songs) // SONGS_PER_PART
    names = [f"part-{draws.bytes(8).hex()}.parquet" for _ in range(parts[-1] + 1)]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    columns = {
        "key": [draws.bytes(20).hex() for _ in range(songs)],
        "latent_frames": pa.array(draws.integers(32, LATENT_FRAMES, songs), pa.int32()),
        "part": [names[part] for part in parts],
        "offset": starts - starts[parts * SONGS_PER_PART],
        "length": lengths,
    }
    content = table_to_bytes(pa.table(columns, schema=INDEX_SCHEMA).sort_by("key"), "part")
    cache = Store.at(folder)
    index_name = f"index-{content_hash(content)}.parquet"
    cache.write_bytes(index_name, content)
    manifest = {
        "format_version": FORMAT_VERSION,
        "index": index_name,
        # Opening does not read them.
        "ledger": "ledger-0.parquet",
        "rejects": "rejects/part-0.parquet",
        "fingerprint": "",
        "counts": {"samples": songs},
        "settings": SETTINGS,
        "text_dim": TEXT_DIM,
        "ssl": {},
    }
    cache.write_bytes("manifest.json", json.dumps(manifest).encode())
    # Parts of the right sizes that take no room on the disk.
    (folder / SAMPLES).mkdir()
    ends = {}
    for name, end in zip(columns["part"], (columns["offset"] + lengths).tolist(), strict=True):
        ends[name] = max(end, ends.get(name, 0))
    for name, end in ends.items():
        with open(folder / SAMPLES / name, "wb") as file:
            file.truncate(end)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        index = CacheIndex.open(folder)
        seconds.append(time.perf_counter() - started)
    keys = random.Random(0).sample(columns["key"], min(songs, 1000))
    started = time.perf_counter()
    for key in keys:
        index.position(key)
    return {
        "songs": songs,
        "parts": len(index.parts),
        "bytes_a_song": round(content.size / songs, 1),
        "open_s": round(sorted(seconds)[repeats // 2], 3),
        "find_key_us": round((time.perf_counter() - started) / len(keys) * 1e6, 1),
    }


def song_row(number: int, seconds: float) -> pa.Table:
    """A song of random features with the sizes of real ones."""
    draws = np.random.default_rng(number)
    share = seconds / 240
    frames = int(LATENT_FRAMES * share)
    ssl = []
    for name, (ssl_frames, dim) in SSL_SHAPES.items():
        ssl_frames = int(ssl_frames * share)
        kept = -(-ssl_frames // SSL_STRIDE)
        ssl.append({"name": name, "frames": ssl_frames, "dim": dim, "directions": draws.bytes(kept * dim)})
    row = {
        "key": f"song{number:06d}",
        "fingerprint": draws.bytes(32).hex(),
        "filename": f"audio/song{number:06d}.flac",
        "song_key": f"song{number:06d}",
        "window": 0,
        "is_last_window": True,
        "start_seconds": 0.0,
        "duration_seconds": seconds,
        "latents": draws.standard_normal((8, 16, frames)).astype(np.float16).tobytes(),
        "latent_frames": frames,
        "prompts": [{"source": "tags", "text": "pop, slow, female voice, piano"}] * PROMPTS,
        "text_embeddings": [
            draws.standard_normal((PROMPT_TOKENS, TEXT_DIM)).astype(np.float16).tobytes()
            for _ in range(PROMPTS)
        ],
        "text_dim": TEXT_DIM,
        "lyric_ids": draws.integers(1, 6000, 1000).tolist(),
        "lyric_languages": ["en"] * 40,
        "ssl": ssl,
    }
    return pa.Table.from_pylist([row], schema=SAMPLE_SCHEMA)


def write_cache(folder: Path, songs: int, seconds: float | Sequence[float]) -> float:
    """Write a cache of so many songs of one length, or each of its own; returns the seconds that storing them took."""
    cache = Store.at(folder)
    claim_output_dir(cache)
    took = 0.0
    lengths = [seconds] * songs if isinstance(seconds, int | float) else seconds
    for first in range(0, songs, SONGS_PER_PART):
        rows = [song_row(i, lengths[i]) for i in range(first, min(first + SONGS_PER_PART, songs))]
        started = time.perf_counter()
        store_rows(cache, rows)
        took += time.perf_counter() - started
    ledger = find_rows(cache)
    counts = {"inputs": songs, "samples": songs, "rejects": 0}
    manifest = {"format_version": FORMAT_VERSION, "counts": counts, "settings": SETTINGS}
    commit(cache, ledger, [], {**manifest, **read_dims(cache, ledger)})
    return took


class RowGroups:
    """Reads songs as row groups of parts that stay open."""

    def __init__(self, index: CacheIndex):
        self.files = [
            pq.ParquetFile(index.store.path / SAMPLES / part, pre_buffer=False) for part in index.parts
        ]
        order = np.lexsort((index.offsets, index.part_numbers))
        numbers = index.part_numbers[order]
        firsts = np.concatenate([[0], np.flatnonzero(np.diff(numbers)) + 1])
        self.part_numbers = index.part_numbers
        self.row_groups = np.empty(len(index), np.int64)
        self.row_groups[order] = np.arange(len(index)) - firsts[numbers]

    def read(self, i: int) -> pa.Table:
        """Song `i`, its columns still in Arrow's arrays."""
        return self.files[self.part_numbers[i]].read_row_group(int(self.row_groups[i]), use_threads=False)


def songs_per_second(read: Callable[[int], Any], songs: int, reads: int, threads: int) -> float:
    """Rate of random reads, the files being in the page cache."""
    order = np.random.default_rng(1).integers(0, songs, reads).tolist()
    for i in range(songs):
        read(i)
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(read, order):
            pass
    return reads / (time.perf_counter() - started)


def read_songs(folder: Path, songs: int, seconds: float, reads: int) -> list[dict[str, Any]]:
    """Rates of random reads by both ways, with one thread and with two."""
    write_seconds = write_cache(folder, songs, seconds)
    reader = CacheReader(folder)
    megabytes = float(reader.index.lengths.mean()) / 1e6
    row_groups = RowGroups(reader.index)
    rows = [{"way": "write", "threads": 1, "songs_s": songs / write_seconds}]
    for threads in (1, 2):
        for way, read in (("byte range", reader.read), ("row group of an open part", row_groups.read)):
            rate = songs_per_second(read, songs, reads, threads)
            rows.append({"way": way, "threads": threads, "songs_s": rate})
    for row in rows:
        row["mb_a_song"], row["mb_s"] = round(megabytes, 2), round(row["songs_s"] * megabytes)
        row["songs_s"] = round(row["songs_s"], 1)
    return rows


def main() -> None:
    """Measure every case and print two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="no case uses a GPU")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--repeats", type=int, default=5, help="times that each index is opened")
    parser.add_argument("--tiny", action="store_true", help="few and short songs, to try the script")
    arguments = parser.parse_args()

    sizes = [1000] if arguments.tiny else [10_000, 100_000, 1_000_000]
    songs, seconds, reads = (4, 3.0, 10) if arguments.tiny else (64, 240.0, 400)
    with tempfile.TemporaryDirectory() as folder:
        indexes = [open_index(size, Path(folder) / uuid.uuid4().hex, arguments.repeats) for size in sizes]
        reading = read_songs(Path(folder) / "cache", songs, seconds, reads)
    chip = platform.processor() or platform.machine()
    report = {"chip": chip, "pyarrow": pa.__version__, "index": indexes, "reads": reading}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{chip}, pyarrow {pa.__version__}")
    for rows in (indexes, reading):
        print(" | ".join(rows[0]))
        for row in rows:
            print(" | ".join(f"{value}".rjust(len(name)) for name, value in row.items()))


if __name__ == "__main__":
    main()
