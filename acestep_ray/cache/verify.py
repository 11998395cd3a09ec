"""`acestep-ray cache verify`: whether a feature cache is whole."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from acestep_ray.cache.commit import content_hash, fingerprint_of, leftovers
from acestep_ray.cache.index import read_index_table, read_manifest
from acestep_ray.cache.parts import CacheDamagedError, ledger_of_part, read_row
from acestep_ray.cache.prune import reached
from acestep_ray.cache.reader import song_of_row
from acestep_ray.cache.schema import (
    FEATURE_GROUPS,
    LEDGER_SCHEMA,
    MANIFEST,
    REJECT_SCHEMA,
    SAMPLE_SCHEMA,
    SAMPLES,
    CachedSong,
    table_from_bytes,
)
from acestep_ray.paths import shell_command
from acestep_ray.storage import Store
from acestep_ray.terminal import Progress, fact_table
from acestep_ray.units import size_text

_THREADS = 8
_SHOWN_PROBLEMS = 100


@dataclass(frozen=True)
class VerifySummary:
    """A cache in which every song was read and nothing is wrong."""

    cache: str
    songs: int
    parts: int
    rejects: int
    num_bytes: int
    leftovers: int
    wall_seconds: float

    def render(self) -> str:
        """The summary as a few lines of text."""
        rows: list[tuple[str, object]] = [
            ("cache", self.cache),
            ("songs", f"{self.songs} in {self.parts} parts, {size_text(self.num_bytes)}: all whole"),
            ("rejects", self.rejects),
        ]
        if self.leftovers:
            prune = shell_command("acestep-ray", "cache", "prune", self.cache)
            rows.append(("leftovers", f"{self.leftovers} files: `{prune}` deletes them"))
        return fact_table([*rows, ("took", f"{self.wall_seconds:,.0f} s")])


def verify_cache(place: str, stream: TextIO | None = None) -> VerifySummary:
    """Read every song of the cache at a path or URL, and compare it with what the cache's other files say.

    Tells now and then how far it is, on `stream` (standard error). Raises InputError if there is no complete cache,
    CacheDamagedError with a list of all that is wrong.
    """
    started = time.monotonic()
    store = Store.at(place)
    manifest = read_manifest(store)
    problems: list[str] = []
    index = _indexed(read_index_table(store, manifest))
    ledger = verified_table(store, manifest, "ledger", LEDGER_SCHEMA, problems)
    rejects = verified_table(store, manifest, "rejects", REJECT_SCHEMA, problems)
    if content_hash(store.read_bytes(manifest["index"])) not in manifest["index"]:
        problems.append(f"{manifest['index']}: its content has changed")
    problems += _table_problems(manifest, index, ledger, rejects)

    sizes = {name: status.size for name, status in store.names(SAMPLES).items()}
    parts = _songs_by_part(index, ledger)
    names = [part["file"][0].as_py() for part in parts]
    progress = _Progress(Progress("reading", len(index), "songs", stream=stream))

    def check(name: str, part: pa.Table) -> list[str]:
        return list(_part_problems(store, manifest, name, part.to_pylist(), sizes, progress))

    with progress.bar, ThreadPoolExecutor(_THREADS) as pool:
        problems += [problem for found in pool.map(check, names, parts) for problem in found]
    if problems:
        raise CacheDamagedError(_told(store, problems))
    return VerifySummary(
        cache=store.url,
        songs=len(index),
        parts=len(parts),
        rejects=len(rejects),
        num_bytes=sum(sizes[name] for name in names),
        leftovers=len(leftovers(store, reached(manifest, names))),
        wall_seconds=time.monotonic() - started,
    )


def _told(store: Store, problems: Sequence[str]) -> str:
    lines = [f"{len(problems)} things are wrong in the feature cache {store.url}"]
    lines += [f"  - {problem}" for problem in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        lines.append(f"  … and {len(problems) - _SHOWN_PROBLEMS} more")
    lines.append(
        "  → delete the parts that are named and run `acestep-ray precompute` again: it computes their songs anew"
    )
    return "\n".join(lines)


def verified_table(
    store: Store, manifest: Mapping[str, Any], name: str, schema: pa.Schema, problems: list[str]
) -> pa.Table:
    """A table that the manifest names; what is wrong with its file goes to `problems`."""
    try:
        content = store.read_bytes(manifest[name])
        table = table_from_bytes(content, schema).cast(schema)
    except (OSError, pa.ArrowException) as error:
        problems.append(f"{manifest[name]}: cannot be read ({error})")
        return schema.empty_table()
    if content_hash(content) not in manifest[name]:
        problems.append(f"{manifest[name]}: its content has changed")
    return table


def _table_problems(
    manifest: Mapping[str, Any], index: pa.Table, ledger: pa.Table, rejects: pa.Table
) -> Iterator[str]:
    counts = manifest["counts"]
    for name, table in (("samples", index), ("rejects", rejects)):
        if counts[name] != len(table):
            yield f"{MANIFEST}: it counts {counts[name]} {name}, there are {len(table)}"
    if counts["inputs"] != counts["samples"] + counts["rejects"]:
        yield f"{MANIFEST}: its inputs are not its samples and rejects together"
    keys = index["key"].to_pylist()
    for before, key in pairwise(keys):
        if not before < key:
            yield f"{manifest['index']}: the key {key!r} is there twice, or not in its place"
    for key, count in Counter(rejects["key"].to_pylist()).items():
        if count > 1:
            yield f"{manifest['rejects']}: the key {key!r} is there {count} times"
    for key in sorted(set(keys) & set(rejects["key"].to_pylist())):
        yield f"the song {key!r} is both in the samples and in the rejects"
    if ledger["key"].to_pylist() != keys:
        yield f"{manifest['ledger']}: its songs are not those of {manifest['index']}"
        return
    listed = ledger.select(index.column_names)
    if not index.equals(listed):
        for row, entry in zip(index.to_pylist(), listed.to_pylist(), strict=True):
            if row != entry:
                yield f"{manifest['ledger']}: the song {row['key']!r} is not as {manifest['index']} says"
    if manifest["fingerprint"] != fingerprint_of(ledger):
        yield f"{MANIFEST}: its fingerprint is not that of the songs"


def _indexed(index: pa.Table) -> pa.Table:
    """The index with the names of files in the cache instead of those in `samples/`."""
    files = pc.binary_join_element_wise(SAMPLES, index["part"].cast(pa.string()), "/")
    return index.set_column(index.column_names.index("part"), "file", files)


def _songs_by_part(index: pa.Table, ledger: pa.Table) -> list[pa.Table]:
    """The songs of each part in the order in which they lie there, with what the ledger says of them."""
    if index["key"].to_pylist() == ledger["key"].to_pylist():
        for name in ledger.column_names:
            # Where the two differ, which is told already, the index is what training goes by.
            if name not in index.column_names:
                index = index.append_column(name, ledger[name])
    songs = index.sort_by([("file", "ascending"), ("offset", "ascending")])
    files = songs["file"].combine_chunks().dictionary_encode().indices.to_numpy()
    starts = np.flatnonzero(np.diff(files, prepend=-1))
    return [songs.slice(start, end - start) for start, end in pairwise([*starts, len(songs)])]


def _part_problems(
    store: Store,
    manifest: Mapping[str, Any],
    part: str,
    songs: Sequence[Mapping[str, Any]],
    sizes: Mapping[str, int],
    progress: _Progress,
) -> Iterator[str]:
    """What is wrong with a part and its songs."""
    if part not in sizes:
        progress.show(len(songs))
        yield f"{part}: it does not exist, and its {len(songs)} songs with it"
        return
    song_problems = []
    for song in songs:
        try:
            row = read_row(store, part, song["offset"], song["length"], song["key"], checksums=True)
        except CacheDamagedError as error:
            song_problems.append(f"{part}: {str(error).splitlines()[0]}")
        else:
            found = row_problems(row, song, manifest)
            song_problems += [f"{part}: the song {song['key']!r}: {problem}" for problem in found]
        progress.show(1)
    yield from song_problems
    num_bytes = songs[0].get("bytes_in_file")
    if num_bytes is not None and sizes[part] != num_bytes:
        yield f"{part}: it has {sizes[part]} bytes, it should have {num_bytes}"
    elif not song_problems:
        # Training would not notice.
        found = ledger_of_part(store, part)
        places = zip(found["key"].to_pylist(), found["offset"].to_pylist(), strict=True)
        if list(places) != [(song["key"], song["offset"]) for song in songs]:
            yield f"{part}: other programs find other songs in it, or cannot read it"


def row_problems(row: pa.Table, expected: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a song's row, given what index and ledger say of it and the manifest of the cache."""
    if not row.schema.equals(SAMPLE_SCHEMA):
        yield "its columns are not those of this version"
        return
    for name in SAMPLE_SCHEMA.names:
        if name in expected and row[name].to_pylist() != [expected[name]]:
            yield f"its {name} is {row[name][0].as_py()!r}, the index or the ledger says {expected[name]!r}"
    settings = manifest["settings"]
    try:
        song = song_of_row(row, settings["speaker_dim"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        yield f"its features have the wrong sizes ({error})"
        return
    features = settings.get("features", FEATURE_GROUPS)
    frames = row["latent_frames"][0].as_py() or 0
    if ("latents" in features) != (frames > 0) or song.latents.shape[-1] != frames:
        yield f"it has {song.latents.shape[-1]} latent frames, its row says {frames}"
    if ("text" in features) != bool(song.prompts) or len(song.prompts) != len(song.text_embeddings):
        yield f"it has {len(song.text_embeddings)} embeddings of {len(song.prompts)} prompts"
    if song.text_embeddings and row["text_dim"][0].as_py() != manifest["text_dim"]:
        yield f"its text embeddings have another width than {manifest['text_dim']}"
    yield from _ssl_problems(song, manifest["ssl"], settings["ssl_frame_stride"])
    arrays = {"latents": [song.latents], "text embeddings": song.text_embeddings, "speaker": [song.speaker]}
    for name, tensors in arrays.items():
        if not all(np.isfinite(tensor.numpy()).all() for tensor in tensors):
            yield f"its {name} are not finite"


def _ssl_problems(song: CachedSong, dims: Mapping[str, int], stride: int) -> Iterator[str]:
    if set(song.ssl) != set(dims):
        yield f"it has the SSL features {sorted(song.ssl)}, the cache {sorted(dims)}"
        return
    for name, dim in dims.items():
        kept = -(-song.ssl_frames[name] // stride)
        if song.ssl[name].shape != (kept, dim):
            yield f"its {name} features have the shape {tuple(song.ssl[name].shape)}, not {(kept, dim)}"


class _Progress:
    """How many songs were read; any thread may tell."""

    def __init__(self, bar: Progress):
        self.bar = bar
        self.done = 0
        self.lock = threading.Lock()

    def show(self, songs: int) -> None:
        with self.lock:
            self.done += songs
            self.bar.update(self.done)
