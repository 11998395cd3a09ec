"""Songs stored in parts, each read back from its bytes in one.

A run writes parts to `.incoming/`, each followed by its sidecar, the ledger of its songs. A part without its sidecar
does not exist: that is how a file that a killed process has left is told from one that counts, also where files
cannot be renamed.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from acestep_ray.cache.schema import (
    INCOMING_LEDGERS,
    INCOMING_PARTS,
    INCOMING_REJECTS,
    LEDGER_SCHEMA,
    REJECT_SCHEMA,
    SAMPLE_SCHEMA,
    song_writer,
    table_to_bytes,
    with_added,
    without_added,
)
from acestep_ray.errors import AceStepError
from acestep_ray.foreign_files import seems_to_be
from acestep_ray.paths import shell_command
from acestep_ray.storage import Store

if TYPE_CHECKING:
    from acestep_ray.cache.songs import Reject

_MAGIC = b"PAR1"

# Columns of a row that its ledger takes over.
_ROW_COLUMNS = [name for name in SAMPLE_SCHEMA.names if name in LEDGER_SCHEMA.names]
_READ_FOR_LEDGER = [*_ROW_COLUMNS, "prompts", "lyric_languages"]


class CacheDamagedError(AceStepError):
    """A file of the cache does not hold what the cache says it does; the message's first line says which and why."""


def store_rows(cache: Store, rows: Iterable[pa.Table]) -> pa.Table:
    """Write songs, one-row tables of `SAMPLE_SCHEMA`, as one part that is safe from now on; returns its ledger."""
    name = uuid.uuid4().hex
    ledger = _write_part(cache, f"{INCOMING_PARTS}/{name}.parquet", rows)
    cache.write_bytes(f"{INCOMING_LEDGERS}/{name}.parquet", table_to_bytes(ledger, "file"))
    return ledger


def store_rejects(cache: Store, rejects: Sequence[Reject]) -> None:
    """Write down songs that cannot be used, so that a run that goes on after a kill need not try them."""
    if rejects:
        cache.write_bytes(
            f"{INCOMING_REJECTS}/{uuid.uuid4().hex}.parquet", table_to_bytes(reject_table(rejects))
        )


def reject_table(rejects: Iterable[Reject]) -> pa.Table:
    """Rejects in the columns of `REJECT_SCHEMA`."""
    return pa.Table.from_pylist([asdict(reject) for reject in rejects], schema=REJECT_SCHEMA)


def _write_part(cache: Store, name: str, rows: Iterable[pa.Table]) -> pa.Table:
    """Write songs as one part file, each range of it a Parquet file of its own (see `schema`); returns its ledger."""
    entries: list[dict[str, Any]] = []
    with cache.writer(name) as file:
        # The sink counts what goes through it, which is where the part's footer takes its offsets from.
        sink = pa.PythonFile(file, mode="w")
        with song_writer(sink) as writer:
            for row in rows:
                alone = _row_to_bytes(row)
                start = sink.tell() if entries else 0
                if entries:
                    sink.write(_MAGIC)
                writer.write_table(row)
                group_length = sink.tell() - start
                sink.write(alone.slice(group_length))
                entries.append(_ledger_entry(row, alone, group_length, name, start))
        num_bytes = sink.tell()
    for entry in entries:
        entry |= {"rows_in_file": len(entries), "bytes_in_file": num_bytes}
    return pa.Table.from_pylist(entries, schema=LEDGER_SCHEMA)


def _row_to_bytes(row: pa.Table) -> pa.Buffer:
    """A song's row as a Parquet file."""
    assert row.num_rows == 1
    sink = pa.BufferOutputStream()
    with song_writer(sink) as writer:
        writer.write_table(row)
    return sink.getvalue()


def _ledger_entry(
    row: pa.Table, alone: pa.Buffer, group_length: int, file: str, offset: int
) -> dict[str, Any]:
    sizes = _column_sizes(pq.read_metadata(pa.BufferReader(alone)).row_group(0))
    # Else the part's row group would not be the one that the song's own footer speaks of.
    assert len(_MAGIC) + sum(sizes.values()) == group_length
    return {
        **_ledger_columns(row.select(_READ_FOR_LEDGER).to_pylist()[0], sizes),
        "file": file,
        "offset": offset,
        "length": alone.size,
    }


def _column_sizes(group: pq.RowGroupMetaData) -> dict[str, int]:
    """Bytes of each column of a song by the name of its root in the schema."""
    sizes: dict[str, int] = {}
    for i in range(group.num_columns):
        column = group.column(i)
        root = column.path_in_schema.partition(".")[0]
        sizes[root] = sizes.get(root, 0) + column.total_compressed_size
    return sizes


def _ledger_columns(row: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    return {
        **{name: row.get(name) for name in _ROW_COLUMNS},
        "latents_bytes": sizes["latents"],
        "text_bytes": sizes["text_embeddings"],
        "ssl_bytes": sizes["ssl"],
        "prompt_count": len(row["prompts"] or ()),
        "languages": sorted({language for language in row["lyric_languages"] or () if language}),
    }


def ledger_of_part(cache: Store, name: str) -> pa.Table:
    """The ledger of a part in `samples/`, read from the part itself; empty if it is damaged or of another format."""
    try:
        with cache.open(name) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
            found = parquet.schema_arrow
            if not found.equals(SAMPLE_SCHEMA) and not found.equals(without_added(SAMPLE_SCHEMA)):
                return LEDGER_SCHEMA.empty_table()
            columns = [name for name in _READ_FOR_LEDGER if name in found.names]
            rows = parquet.read(columns=columns, use_threads=False).to_pylist()
            groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
            footer_bytes = parquet.metadata.serialized_size
            num_bytes = file.seek(0, os.SEEK_END)
    except (pa.ArrowException, OSError, ValueError):
        return LEDGER_SCHEMA.empty_table()
    starts = [group.column(0).data_page_offset - len(_MAGIC) for group in groups]
    # The part's own footer is followed by its length, four bytes, and the magic.
    ends = [*starts[1:], num_bytes - footer_bytes - 4 - len(_MAGIC)]
    entries = [
        {
            **_ledger_columns(row, _column_sizes(group)),
            "file": name,
            "offset": start,
            "length": end - start,
            "rows_in_file": len(groups),
            "bytes_in_file": num_bytes,
        }
        for row, group, start, end in zip(rows, groups, starts, ends, strict=True)
    ]
    return pa.Table.from_pylist(entries, schema=LEDGER_SCHEMA)


def read_row(
    cache: Store,
    file: str,
    offset: int,
    length: int,
    key: str,
    columns: Sequence[str] | None = None,
    checksums: bool = False,
) -> pa.Table:
    """A song's row from its bytes in a part, in one request.

    Raises CacheDamagedError if the bytes are not those of this song; with `checksums` also if any of them has changed.
    """
    try:
        content = cache.read_range(file, offset, length)
    except FileNotFoundError:
        raise damaged(cache, file, key, "the file does not exist") from None
    try:
        # Threads of the caller read ahead; more inside each read would only get in their way.
        with pq.ParquetFile(
            pa.BufferReader(content), pre_buffer=False, page_checksum_verification=checksums
        ) as parquet:
            row = parquet.read(columns=columns, use_threads=False)
        # Before any value is read, for the reason that `has_types` gives.
        expected = _schema_of(tuple(SAMPLE_SCHEMA.names if columns is None else columns))
        if row.schema.equals(without_added(expected)):
            row = with_added(row, expected)
        if not row.schema.equals(expected):
            raise pa.ArrowInvalid(f"its columns are not those of this version: {row.schema.names}")
        if row["key"].to_pylist() == [key]:
            return row
        reason = f"found {row['key'].to_pylist()}"
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        if cache.is_local and (found := seems_to_be(cache.path / file)):
            reason = f"its part is {found.what}; {found.fix}"
    raise damaged(cache, file, key, reason)


@lru_cache
def _schema_of(columns: tuple[str, ...]) -> pa.Schema:
    return pa.schema([field for field in SAMPLE_SCHEMA if field.name in columns])


def damaged(cache: Store, file: str, key: str, reason: str) -> CacheDamagedError:
    """The error for a song that its part does not hold as it should."""
    return CacheDamagedError(
        f"the song {key!r} cannot be read from {cache.url_of(file)} ({reason})\n"
        f"  → run `{shell_command('acestep-ray', 'cache', 'verify', cache.url)}`"
    )


def read_dims(cache: Store, rows: pa.Table) -> dict[str, Any]:
    """Widths of the features: `text_dim`, None without them, and `ssl` with that of each SSL model."""
    if not len(rows):
        return {"text_dim": None, "ssl": {}}
    first = rows.slice(0, 1).to_pylist()[0]
    place = {name: first[name] for name in ("file", "offset", "length", "key")}
    row = read_row(cache, **place, columns=["key", "text_dim", "ssl"]).to_pylist()[0]
    return {
        "text_dim": row["text_dim"],
        "ssl": {entry["name"]: entry["dim"] for entry in row["ssl"] or ()},
    }
