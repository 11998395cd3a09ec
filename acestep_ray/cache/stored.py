"""What runs have stored in a directory: songs and rejects of its cache, and of a run that was killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from acestep_ray.cache.commit import part_name, with_files
from acestep_ray.cache.parts import ledger_of_part
from acestep_ray.cache.schema import (
    FORMAT_VERSION,
    INCOMING,
    INCOMING_LEDGERS,
    INCOMING_PARTS,
    INCOMING_REJECTS,
    LEDGER_SCHEMA,
    MANIFEST,
    REJECT_SCHEMA,
    SAMPLES,
    is_table_name,
    table_from_bytes,
)
from acestep_ray.errors import InputError
from acestep_ray.storage import DiskFullError, StorageError, Store
from acestep_ray.storage.files import LOCK

_CLAIM = f"{INCOMING}/claim"
# Requests to storage wait for the network, not for a core.
_THREADS = 32
_TABLES_JOINED = 512

_T = TypeVar("_T")
_R = TypeVar("_R")


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
    except DiskFullError:
        raise
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
        return cache.path.is_dir() and any(path.name != LOCK for path in cache.path.iterdir())
    return bool(cache.names().keys() - {LOCK})


def _manifest_if_readable(cache: Store) -> dict[str, Any] | None:
    try:
        manifest = json.loads(cache.read_bytes(MANIFEST))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None


def find_rows(cache: Store) -> pa.Table:
    """The ledger of every whole row on disk: those of the cache first, then those of a run that was killed.

    A file that is missing, cut short or unreadable has none. A key may be there more than once: with other
    fingerprints, and with the same one where a worker died after it had stored a block that was computed again.
    """
    sizes = {name: status.size for name, status in cache.names(SAMPLES, ".parquet").items()}
    sizes |= {name: status.size for name, status in cache.names(INCOMING_PARTS, ".parquet").items()}
    committed = _committed_table(cache, "ledger", LEDGER_SCHEMA, "file")
    described = set(committed["file"].unique().to_pylist())
    sidecars = cache.names(INCOMING_LEDGERS, ".parquet")

    def ledgers() -> Iterator[pa.Table]:
        yield committed
        for name, ledger in zip(sidecars, _map(lambda name: _sidecar(cache, name), sidecars), strict=True):
            part = f"{INCOMING_PARTS}/{name.removeprefix(INCOMING_LEDGERS + '/')}"
            if len(ledger) and part not in sizes:
                part = part_name(ledger)  # a commit that was killed has moved it already
            if part not in described:
                described.add(part)
                yield with_files(ledger, pa.repeat(part, len(ledger)))
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
    return join_tables([committed, *_map(read, cache.names(INCOMING_REJECTS, ".parquet"))])


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


def _map(function: Callable[[_T], _R], values: Iterable[_T]) -> Iterator[_R]:
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(function, values)
