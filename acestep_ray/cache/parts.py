"""The files of a cache: songs stored in parts, parts found again, and the commit that makes them the cache.

A run writes parts to `.incoming/`, each followed by its sidecar, the ledger of its songs. A part without its sidecar
does not exist: that is how a file that a killed process has left is told from one that counts, also where files
cannot be renamed. The commit moves whole parts to `samples/` and writes one ledger of them all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from acestep_ray.cache.schema import (
    FORMAT_VERSION,
    INCOMING,
    INDEX_SCHEMA,
    LEDGER_SCHEMA,
    MANIFEST,
    REJECT_SCHEMA,
    REJECTS,
    SAMPLE_SCHEMA,
    SAMPLES,
    hash_of,
    is_table_name,
    song_writer,
    table_from_bytes,
    table_to_bytes,
    write_json,
)
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.storage import StorageError, Store

if TYPE_CHECKING:
    from acestep_ray.cache.songs import Reject

PART_BYTES = 64 << 20
PART_ROWS = 256

_INCOMING_PARTS = f"{INCOMING}/parts"
_INCOMING_LEDGERS = f"{INCOMING}/ledgers"
_INCOMING_REJECTS = f"{INCOMING}/rejects"
_CLAIM = f"{INCOMING}/claim"

_MAGIC = b"PAR1"
# Requests to storage wait for the network, not for a core.
_THREADS = 32
_THREADS_OF_A_TASK = 8
_TABLES_JOINED = 512

# Columns of a row that its ledger takes over.
_ROW_COLUMNS = [name for name in SAMPLE_SCHEMA.names if name in LEDGER_SCHEMA.names]
_READ_FOR_LEDGER = [*_ROW_COLUMNS, "prompts", "lyric_languages"]

_T = TypeVar("_T")
_R = TypeVar("_R")


class CacheDamagedError(AceStepError):
    """A file of the cache does not hold what the cache says it does; the message's first line says which and why."""


def claim_output_dir(cache: Store) -> None:
    """Make the directory ready for a run. Raises InputError if it holds something other than a cache."""
    fix = "give an empty or a new --output_dir"
    try:
        if not _is_cache(cache) and _holds_something(cache):
            raise InputError(
                "the output directory holds something that is no feature cache", where=cache.url, fix=fix
            )
        # Whether the place can be written to shows now, and not when the first songs are encoded.
        cache.write_bytes(_CLAIM, b"")
    except (OSError, StorageError) as error:
        raise InputError(
            f"cannot write to the output directory ({error})", where=cache.url, fix=fix
        ) from None


def _is_cache(cache: Store) -> bool:
    """Whether a run has ended here, or was killed: what a cache does not list is going to be deleted."""
    manifest = _manifest_if_readable(cache)
    if manifest is not None:
        return "format_version" in manifest
    return bool(cache.names(INCOMING)) or (cache.is_local and (cache.path / INCOMING).is_dir())


def _holds_something(cache: Store) -> bool:
    if cache.is_local:
        return cache.path.is_dir() and any(cache.path.iterdir())
    return bool(cache.names())


def _manifest_if_readable(cache: Store) -> dict[str, Any] | None:
    try:
        manifest = json.loads(cache.read_bytes(MANIFEST))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None


def store_rows(cache: Store, rows: Iterable[pa.Table]) -> pa.Table:
    """Write songs, one-row tables of `SAMPLE_SCHEMA`, as one part that is safe from now on; returns its ledger."""
    name = uuid.uuid4().hex
    ledger = _write_part(cache, f"{_INCOMING_PARTS}/{name}.parquet", rows)
    cache.write_bytes(f"{_INCOMING_LEDGERS}/{name}.parquet", table_to_bytes(ledger, "file"))
    return ledger


def store_rejects(cache: Store, rejects: Sequence[Reject]) -> None:
    """Write down songs that cannot be used, so that a run that goes on after a kill need not try them."""
    if rejects:
        cache.write_bytes(
            f"{_INCOMING_REJECTS}/{uuid.uuid4().hex}.parquet", table_to_bytes(_reject_table(rejects))
        )


def _reject_table(rejects: Iterable[Reject]) -> pa.Table:
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
        **{name: row[name] for name in _ROW_COLUMNS},
        "latents_bytes": sizes["latents"],
        "text_bytes": sizes["text_embeddings"],
        "ssl_bytes": sizes["ssl"],
        "prompt_count": len(row["prompts"] or ()),
        "languages": sorted({language for language in row["lyric_languages"] or () if language}),
    }


def find_rows(cache: Store) -> pa.Table:
    """The ledger of every whole row on disk: those of the cache first, then those of a run that was killed.

    A file that is missing, cut short or unreadable has none. A key may be there more than once: with other
    fingerprints, and with the same one where a worker died after it had stored a block that was computed again.
    """
    sizes = {name: status.size for name, status in cache.names(SAMPLES, ".parquet").items()}
    sizes |= {name: status.size for name, status in cache.names(_INCOMING_PARTS, ".parquet").items()}
    committed = _committed_table(cache, "ledger", LEDGER_SCHEMA, "file")
    described = set(committed["file"].unique().to_pylist())
    sidecars = cache.names(_INCOMING_LEDGERS, ".parquet")

    def ledgers() -> Iterator[pa.Table]:
        yield committed
        for name, ledger in zip(sidecars, _map(lambda name: _sidecar(cache, name), sidecars), strict=True):
            part = f"{_INCOMING_PARTS}/{name.removeprefix(_INCOMING_LEDGERS + '/')}"
            if len(ledger) and part not in sizes:
                part = _part_name(ledger)  # a commit that was killed has moved it already
            if part not in described:
                described.add(part)
                yield _with_files(ledger, pa.repeat(part, len(ledger)))
        # Parts that no ledger speaks of any more speak for themselves.
        strays = [name for name in sizes if name.startswith(f"{SAMPLES}/") and name not in described]
        yield from _map(lambda name: ledger_of_part(cache, name), strays)

    rows = join_tables(ledgers())
    files = rows.select(["file", "bytes_in_file"]).group_by("file").aggregate([("bytes_in_file", "min")])
    whole = [
        file
        for file, num_bytes in zip(
            files["file"].to_pylist(), files["bytes_in_file_min"].to_pylist(), strict=True
        )
        if sizes.get(file) == num_bytes
    ]
    return rows.filter(pc.is_in(rows["file"], pa.array(whole, pa.string())))


def find_rejects(cache: Store) -> pa.Table:
    """The rejects of the cache, and then of a run that was killed, in the columns of `REJECT_SCHEMA`."""

    def read(name: str) -> pa.Table:
        return _readable_table(cache, name, REJECT_SCHEMA)

    committed = _committed_table(cache, "rejects", REJECT_SCHEMA)
    return join_tables([committed, *_map(read, cache.names(_INCOMING_REJECTS, ".parquet"))])


def join_tables(tables: Iterable[pa.Table]) -> pa.Table:
    """One table whose columns are whole, of any number of small ones: as they are read, those take 50 kB each."""
    tables, joined = iter(tables), []
    while some := list(islice(tables, _TABLES_JOINED)):
        joined.append(pa.concat_tables(some).combine_chunks())
    return pa.concat_tables(joined).combine_chunks()


def _committed_table(cache: Store, name: str, schema: pa.Schema, repeated: str | None = None) -> pa.Table:
    """A table that the manifest names; empty where there is none of this format."""
    manifest = _manifest_if_readable(cache)
    if manifest is None or manifest.get("format_version") != FORMAT_VERSION:
        return schema.empty_table()
    if not is_table_name(manifest.get(name)):
        return schema.empty_table()
    return _readable_table(cache, manifest[name], schema, repeated)


def _sidecar(cache: Store, name: str) -> pa.Table:
    return _readable_table(cache, name, LEDGER_SCHEMA, "file")


def _readable_table(cache: Store, name: str, schema: pa.Schema, repeated: str | None = None) -> pa.Table:
    """A table of the cache; empty if its file is missing or damaged: what it told of is then computed again."""
    try:
        content = cache.read_bytes(name)
    except FileNotFoundError:
        return schema.empty_table()
    try:
        return table_from_bytes(content, schema, repeated).cast(schema)
    except (pa.ArrowException, OSError):
        return schema.empty_table()


def ledger_of_part(cache: Store, name: str) -> pa.Table:
    """The ledger of a part in `samples/`, read from the part itself; empty if it is damaged or of another format."""
    try:
        with cache.open(name) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
            if not parquet.schema_arrow.equals(SAMPLE_SCHEMA):
                return LEDGER_SCHEMA.empty_table()
            rows = parquet.read(columns=_READ_FOR_LEDGER, use_threads=False).to_pylist()
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


@dataclass(frozen=True)
class CommitPlan:
    """What has to happen to the files before the rows can be committed."""

    kept: pa.Table
    """Ledger of the rows whose files stay as they are."""
    repack: list[pa.Table]
    """Ledgers of the rows that need another file, one for each new part."""


def plan_commit(rows: pa.Table) -> CommitPlan:
    """Which of the wanted rows are to be joined into new parts.

    A part stays as it is if all its songs are wanted and it is not small, that is, if it has at least half of
    `PART_BYTES` or of `PART_ROWS`. The songs of all others are joined in the order of their keys, unless there is
    only one such part and all its songs are wanted: what is once committed is not written again.
    """
    files = rows.group_by("file").aggregate([("length", "sum"), ("key", "count"), ("rows_in_file", "min")])
    wanted = files["key_count"].to_numpy()
    complete = wanted == files["rows_in_file_min"].to_numpy()
    small = (files["length_sum"].to_numpy() < PART_BYTES / 2) & (wanted < PART_ROWS / 2)
    loose = ~complete | small
    if loose.sum() == 1 and complete[loose].all():
        loose[:] = False
    is_loose = pc.is_in(rows["file"], files["file"].filter(pa.array(loose)).combine_chunks())
    return CommitPlan(kept=rows.filter(pc.invert(is_loose)), repack=_grouped(rows.filter(is_loose)))


def _grouped(rows: pa.Table) -> list[pa.Table]:
    """Rows in the order of their keys, in groups of at most `PART_BYTES` and `PART_ROWS`.

    Songs that fill half a part are alone in theirs. So at most one group is small, and what is grouped once is not
    grouped again by the next run.
    """
    rows = rows.sort_by("key")
    groups: list[list[int]] = []
    current: list[int] = []
    num_bytes = 0
    for i, length in enumerate(rows["length"].to_numpy().tolist()):
        if length >= PART_BYTES / 2:
            groups.append([i])
            continue
        if current and (num_bytes + length > PART_BYTES or len(current) == PART_ROWS):
            groups.append(current)
            current, num_bytes = [], 0
        current.append(i)
        num_bytes += length
    if current:
        groups.append(current)
    return [rows.take(group) for group in groups]


def repack(cache: Store, rows: pa.Table) -> pa.Table:
    """Copy songs from where they are into one new part in `.incoming/`; returns its ledger.

    Raises CacheDamagedError for a song that cannot be read.
    """
    places = list(zip(*(rows[name].to_pylist() for name in ("file", "offset", "length", "key")), strict=True))
    with ThreadPoolExecutor(_THREADS_OF_A_TASK) as pool:
        songs = pool.map(lambda place: read_row(cache, *place), places)
        return store_rows(cache, songs)


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
        if not row.schema.equals(_schema_of(tuple(SAMPLE_SCHEMA.names if columns is None else columns))):
            raise pa.ArrowInvalid(f"its columns are not those of this version: {row.schema.names}")
        if row["key"].to_pylist() == [key]:
            return row
        reason = f"found {row['key'].to_pylist()}"
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
    raise damaged(cache, file, key, reason)


@lru_cache
def _schema_of(columns: tuple[str, ...]) -> pa.Schema:
    return pa.schema([field for field in SAMPLE_SCHEMA if field.name in columns])


def damaged(cache: Store, file: str, key: str, reason: str) -> CacheDamagedError:
    """The error for a song that its part does not hold as it should."""
    return CacheDamagedError(
        f"the song {key!r} cannot be read from {cache.url_of(file)} ({reason})\n"
        f"  → run `acestep-ray cache verify {cache.url}`"
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


def commit(cache: Store, rows: pa.Table, rejects: Sequence[Reject], manifest: Mapping[str, Any]) -> None:
    """Make these rows and rejects the cache: parts, index, ledger and rejects, then the manifest, then nothing else.

    Until the manifest is in place the cache is the one that it was before. Each of the rows' files has to hold
    these rows and no others; `plan_commit` says which do not.
    """
    rows = _move_parts(cache, rows).sort_by("key")
    keys = rows["key"]
    assert pc.count_distinct(keys).as_py() == len(keys), "a key is there twice"
    index = rows.select(["key", "latent_frames", "file", "offset", "length"]).rename_columns(
        INDEX_SCHEMA.names
    )
    parts = pc.utf8_slice_codeunits(index["part"], start=len(SAMPLES) + 1)
    index = index.set_column(INDEX_SCHEMA.get_field_index("part"), "part", parts)
    listed = _reject_table(sorted(rejects, key=lambda reject: reject.key))
    written = {
        "index": _write_table(cache, "index", index, "part"),
        "ledger": _write_table(cache, "ledger", rows, "file"),
        "rejects": _write_table(cache, f"{REJECTS}/part", listed),
    }
    write_json(cache, MANIFEST, {**manifest, "fingerprint": fingerprint_of(rows), **written})
    files = {MANIFEST, *written.values(), *rows["file"].unique().to_pylist()}
    delete_leftovers(cache, leftovers(cache, files))


def _move_parts(cache: Store, rows: pa.Table) -> pa.Table:
    """Move parts from `.incoming/` to `samples/`; returns the ledger with their new names."""
    rows = rows.sort_by([("file", "ascending"), ("offset", "ascending")])
    files = rows["file"].combine_chunks().dictionary_encode()
    starts = np.flatnonzero(np.diff(files.indices.to_numpy(), prepend=-1))
    names, moves = files.dictionary.to_pylist(), []
    for i, part in enumerate(rows.slice(start, end - start) for start, end in pairwise([*starts, len(rows)])):
        assert part["rows_in_file"][0].as_py() == len(part), f"{names[i]} holds other rows too"
        if names[i].startswith(f"{INCOMING}/"):
            moves.append((names[i], _part_name(part)))
            names[i] = moves[-1][1]
    for _ in _map(lambda names: cache.move(*names), moves):
        pass
    return _with_files(rows, pa.DictionaryArray.from_arrays(files.indices, pa.array(names, pa.string())))


def _part_name(part: pa.Table) -> str:
    """Name of a part in `samples/`: the same songs in the same order, stored in as many bytes, have the same."""
    columns = (part[name].to_pylist() for name in ("key", "fingerprint", "length"))
    return f"{SAMPLES}/part-{hash_of(list(zip(*columns, strict=True)))[:16]}.parquet"


def _with_files(rows: pa.Table, files: pa.Array) -> pa.Table:
    i = LEDGER_SCHEMA.get_field_index("file")
    return rows.set_column(i, LEDGER_SCHEMA.field(i), files.cast(pa.string()))


def _write_table(cache: Store, prefix: str, table: pa.Table, repeated: str | None = None) -> str:
    content = table_to_bytes(table, repeated)
    name = f"{prefix}-{content_hash(content)}.parquet"
    cache.write_bytes(name, content)
    return name


def content_hash(content: Any) -> str:
    """The HASH in the name of an index, a ledger or rejects."""
    return hashlib.sha256(content).hexdigest()[:16]


def fingerprint_of(rows: pa.Table) -> str:
    """Hash (hex) over every key and fingerprint of a ledger that is sorted by key."""
    digest = hashlib.sha256()
    for start in range(0, len(rows), 1 << 16):
        some = rows.slice(start, 1 << 16)
        digest.update(hash_of(some["key"].to_pylist(), some["fingerprint"].to_pylist()).encode())
    return digest.hexdigest()


def leftovers(cache: Store, reached: set[str]) -> list[str]:
    """Files of the format that are not among those that a manifest reaches; other files are nobody's business."""
    return [name for name in cache.names() if name not in reached and _is_of_the_format(name)]


def _is_of_the_format(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if folder == INCOMING or folder.startswith(f"{INCOMING}/"):
        return True
    prefixes = {"": ("index-", "ledger-"), SAMPLES: ("part-",), REJECTS: ("part-",)}
    return file.startswith(prefixes.get(folder, ())) and file.endswith(".parquet")


def delete_leftovers(cache: Store, names: Sequence[str]) -> None:
    """Delete these files, what was half-written, and `.incoming/`."""
    cache.delete(names)
    cache.delete_unfinished()
    if cache.is_local:
        shutil.rmtree(cache.path / INCOMING, ignore_errors=True)


def _map(function: Callable[[_T], _R], values: Iterable[_T]) -> Iterator[_R]:
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(function, values)
