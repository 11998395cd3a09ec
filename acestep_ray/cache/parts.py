"""The files of a cache: rows found on disk, songs joined into part files, and the commit that makes them a cache."""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from acestep_ray.cache.schema import (
    INCOMING,
    INDEX_SCHEMA,
    MANIFEST,
    REJECT_SCHEMA,
    REJECTS,
    SAMPLE_SCHEMA,
    SAMPLES,
    hash_of,
    parquet_writer,
    write_json,
    written_whole,
)
from acestep_ray.cache.stages import Reject
from acestep_ray.errors import InputError

_ATTEMPTS = f"{INCOMING}/attempts"

PART_BYTES = 256 << 20
PART_ROWS = 256
# On average every 64th song, by its key, ends its part: a song that comes or goes moves its neighbours, not all.
_SONGS_BETWEEN_CUTS = 64


@dataclass(frozen=True)
class StoredRow:
    """A song's row that is whole on disk, and what is known of it without reading its features."""

    key: str
    fingerprint: str
    audio_sha256: str
    speaker_sha256: str | None
    latent_frames: int
    duration_seconds: float
    num_bytes: int
    file: str
    """Path of its file in the cache."""
    row_group: int


@dataclass(frozen=True)
class Part:
    """Rows that share a file, sorted by key."""

    rows: list[StoredRow]

    @cached_property
    def name(self) -> str:
        return f"part-{_hash_of_rows(self.rows)[:16]}.parquet"

    @property
    def is_written(self) -> bool:
        file = f"{SAMPLES}/{self.name}"
        return all(row.file == file and row.row_group == i for i, row in enumerate(self.rows))


def claim_output_dir(cache: Path) -> None:
    """Make the directory ready for a run. Raises InputError if it holds something other than a cache."""
    fix = "give an empty or a new --output_dir"
    if cache.is_dir() and any(cache.iterdir()) and not _is_cache(cache):
        raise InputError(
            "the output directory holds something that is no feature cache", where=str(cache), fix=fix
        )
    try:
        (cache / INCOMING).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(cache / _ATTEMPTS, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"cannot write to the output directory ({error})", where=str(cache), fix=fix
        ) from None


def _is_cache(directory: Path) -> bool:
    """Whether a run has ended here, or was killed: what a cache does not list is going to be deleted."""
    if (directory / INCOMING).is_dir():
        return True
    try:
        return "format_version" in json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


@contextlib.contextmanager
def counted_attempt(cache: Path, stage: str, key: str) -> Iterator[int]:
    """Which attempt of this run at a song this is, counted from 1, if all before it ended with their process."""
    marker = cache / _ATTEMPTS / f"{stage}-{hash_of(key)}"
    marker.parent.mkdir(parents=True, exist_ok=True)
    with open(marker, "ab") as file:
        file.write(b".")
        attempt = file.tell()
    try:
        yield attempt
    finally:
        marker.unlink(missing_ok=True)


def incoming_file(fingerprint: str) -> str:
    """Path in the cache of a song that no part holds yet."""
    return f"{INCOMING}/{fingerprint[:2]}/{fingerprint}.parquet"


def row_to_bytes(row: pa.Table) -> pa.Buffer:
    """A song's row as a Parquet file."""
    sink = pa.BufferOutputStream()
    with parquet_writer(sink, SAMPLE_SCHEMA) as writer:
        writer.write_table(row)
    return sink.getvalue()


def store_song(cache: Path, content: pa.Buffer) -> StoredRow:
    """Write what `row_to_bytes` made of a song to the cache, safe from now on."""
    (row,) = _rows_of(pa.BufferReader(content), file="")
    file = incoming_file(row.fingerprint)
    with written_whole(cache / file) as unfinished:
        unfinished.write_bytes(content)
    return StoredRow(**{**asdict(row), "file": file})


def find_rows(cache: Path) -> dict[str, list[StoredRow]]:
    """Every whole row on disk by key, those of a run that was killed included. A damaged file has none."""
    files = sorted((cache / SAMPLES).glob("part-*.parquet")) + sorted((cache / INCOMING).glob("*/*.parquet"))
    names = [file.relative_to(cache).as_posix() for file in files]
    found: dict[str, list[StoredRow]] = {}
    with ThreadPoolExecutor(max_workers=16) as pool:
        for rows in pool.map(lambda name: _rows_in_file(cache, name), names):
            for row in rows:
                found.setdefault(row.key, []).append(row)
    return found


def _rows_in_file(cache: Path, name: str) -> list[StoredRow]:
    try:
        return _rows_of(cache / name, name)
    except (pa.ArrowException, OSError):
        return []  # its songs are computed again, and the commit removes the file


def _rows_of(source: Path | pa.BufferReader, file: str) -> list[StoredRow]:
    with pq.ParquetFile(source, pre_buffer=False) as parquet:
        if not parquet.schema_arrow.equals(SAMPLE_SCHEMA):
            return []
        columns = [
            "key",
            "fingerprint",
            "audio_sha256",
            "speaker_sha256",
            "latent_frames",
            "duration_seconds",
        ]
        table = parquet.read(columns=columns, use_threads=False)
        sizes = [parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups)]
    return [
        StoredRow(**row, num_bytes=num_bytes, file=file, row_group=i)
        for i, (row, num_bytes) in enumerate(zip(table.to_pylist(), sizes, strict=True))
    ]


def plan_parts(rows: Iterable[StoredRow]) -> list[Part]:
    """Join rows into parts of at most `PART_BYTES` and `PART_ROWS`, in the order of their keys.

    A function of the rows' keys, fingerprints and sizes alone: the same songs make the same files.
    """
    parts: list[Part] = []
    current: list[StoredRow] = []
    num_bytes = 0
    for row in sorted(rows, key=lambda row: row.key):
        if current and (num_bytes + row.num_bytes > PART_BYTES or len(current) == PART_ROWS):
            parts.append(Part(current))
            current, num_bytes = [], 0
        current.append(row)
        num_bytes += row.num_bytes
        if zlib.crc32(row.key.encode()) % _SONGS_BETWEEN_CUTS == 0:
            parts.append(Part(current))
            current, num_bytes = [], 0
    if current:
        parts.append(Part(current))
    return parts


def write_part(cache: Path, part: Part) -> None:
    """Copy the part's rows, one in memory at a time, from where they are into the part's file."""
    with (
        written_whole(cache / SAMPLES / part.name) as unfinished,
        parquet_writer(unfinished, SAMPLE_SCHEMA) as writer,
    ):
        opened, source = None, None
        for row in part.rows:
            if row.file != opened:
                opened, source = row.file, pq.ParquetFile(cache / row.file, pre_buffer=False)
            writer.write_table(source.read_row_group(row.row_group))


def read_dims(cache: Path, part: Part) -> dict[str, Any]:
    """Widths of the features: `text_dim`, and `ssl` with that of each SSL model."""
    with pq.ParquetFile(cache / SAMPLES / part.name, pre_buffer=False) as parquet:
        row = parquet.read_row_group(0, columns=["text_dim", "ssl.list.element.name", "ssl.list.element.dim"])
    song = row.to_pylist()[0]
    return {"text_dim": song["text_dim"], "ssl": {entry["name"]: entry["dim"] for entry in song["ssl"]}}


def commit(
    cache: Path, parts: Sequence[Part], rejects: Sequence[Reject], manifest: Mapping[str, Any]
) -> None:
    """Make the parts and rejects the cache: index and rejects first, then the manifest, then nothing else is left.

    Until the manifest is in place the cache is the one that it was before.
    """
    rows = [row for part in parts for row in part.rows]
    fingerprint = _hash_of_rows(rows)
    index = f"index-{fingerprint[:16]}.parquet"
    columns = {
        "key": [row.key for row in rows],
        "fingerprint": [row.fingerprint for row in rows],
        "latent_frames": [row.latent_frames for row in rows],
        "part": [part.name for part in parts for _ in part.rows],
        "row_group": [i for part in parts for i in range(len(part.rows))],
    }
    _write_table(cache / index, pa.table(columns, schema=INDEX_SCHEMA))

    listed = [asdict(reject) for reject in sorted(rejects, key=lambda reject: reject.key)]
    rejects_file = f"part-{hash_of(listed)[:16]}.parquet"
    _write_table(cache / REJECTS / rejects_file, pa.Table.from_pylist(listed, schema=REJECT_SCHEMA))

    write_json(cache / MANIFEST, {**manifest, "fingerprint": fingerprint, "index": index})

    kept = {cache / index, cache / REJECTS / rejects_file, *(cache / SAMPLES / part.name for part in parts)}
    for pattern in ("index-*.parquet", f"{SAMPLES}/part-*.parquet", f"{REJECTS}/part-*.parquet"):
        for file in set(cache.glob(pattern)) - kept:
            file.unlink()
    for unfinished in (*cache.glob(".*.tmp"), *cache.glob("*/.*.tmp")):
        unfinished.unlink()
    shutil.rmtree(cache / INCOMING, ignore_errors=True)


def _write_table(path: Path, table: pa.Table) -> None:
    with written_whole(path) as unfinished, parquet_writer(unfinished, table.schema) as writer:
        writer.write_table(table)


def _hash_of_rows(rows: Iterable[StoredRow]) -> str:
    return hash_of([[row.key, row.fingerprint] for row in rows])
