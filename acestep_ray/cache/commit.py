"""The commit: songs that are stored, and rejects, become the cache.

Songs of small parts are joined in new ones first. Then whole parts are moved to `samples/`, one ledger is written of
them all, and the manifest.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from acestep_ray.cache.parts import read_row, reject_table, store_rows
from acestep_ray.cache.schema import (
    INCOMING,
    INDEX_SCHEMA,
    LEDGER_SCHEMA,
    MANIFEST,
    REJECTS,
    SAMPLES,
    hash_of,
    table_to_bytes,
    write_json,
)
from acestep_ray.storage import Store

if TYPE_CHECKING:
    from acestep_ray.cache.songs import Reject

PART_BYTES = 64 << 20
PART_ROWS = 256

# Requests to storage wait for the network, not for a core; several tasks of a node read at once.
_MOVED_AT_ONCE, _READ_AT_ONCE = 32, 8


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
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        songs = pool.map(lambda place: read_row(cache, *place), places)
        return store_rows(cache, songs)


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
    listed = reject_table(sorted(rejects, key=lambda reject: reject.key))
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
            moves.append((names[i], part_name(part)))
            names[i] = moves[-1][1]
    with ThreadPoolExecutor(_MOVED_AT_ONCE) as pool:
        for _ in pool.map(lambda names: cache.move(*names), moves):
            pass
    return with_files(rows, pa.DictionaryArray.from_arrays(files.indices, pa.array(names, pa.string())))


def part_name(part: pa.Table) -> str:
    """Name of a part in `samples/`: the same songs in the same order, stored in as many bytes, have the same."""
    columns = (part[name].to_pylist() for name in ("key", "fingerprint", "length"))
    return f"{SAMPLES}/part-{hash_of(list(zip(*columns, strict=True)))[:16]}.parquet"


def with_files(rows: pa.Table, files: pa.Array) -> pa.Table:
    """A ledger whose songs lie in other files."""
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
