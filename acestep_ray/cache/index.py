"""Which songs a feature cache holds, how long they are, and where each one lies."""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa

from acestep_ray.cache.schema import (
    FEATURE_GROUPS,
    FORMAT_VERSION,
    INCOMING,
    INDEX_SCHEMA,
    MANIFEST,
    SAMPLES,
    is_table_name,
    table_from_bytes,
)
from acestep_ray.errors import InputError
from acestep_ray.foreign_files import FIRST_BYTES, seems_to_be, start_of_impostor
from acestep_ray.storage import Store

_FIX = "run `acestep-ray precompute` again: it computes only what is missing"

# A column of a song's row has less than 2 GB, as Arrow counts it.
_LONGEST = 2**32


class Keys(Sequence[str]):
    """The keys of a cache in their order, which is sorted; a million of them take 45 MB and no time to open."""

    def __init__(self, array: pa.Array | pa.ChunkedArray):
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        return self._array[i].to_pylist() if isinstance(i, slice) else self._array[int(i)].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 1 << 16):
            yield from self._array.slice(start, 1 << 16).to_pylist()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._place(key) is not None

    def index(self, key: str, start: int = 0, stop: int | None = None) -> int:
        """Position of a key. Raises ValueError for one that is not there."""
        place = self._place(key)
        if place is None or place not in range(*slice(start, stop).indices(len(self))):
            raise ValueError(f"no song has the key {key!r}")
        return place

    def _place(self, key: str) -> int | None:
        # Arrow sorts by the bytes of UTF-8, Python by code points: the same order.
        place = bisect_left(self, key)
        return place if place < len(self) and self[place] == key else None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Keys):
            return self._array.equals(other._array)
        return list(self) == other if isinstance(other, list) else NotImplemented

    def __repr__(self) -> str:
        shown = ", ".join(repr(key) for key in self[:3])
        return f"Keys({shown}{', …' if len(self) > 3 else ''})"


@dataclass(frozen=True, eq=False)
class CacheIndex:
    """The songs of a cache, sorted by key; song `i` is the same everywhere below."""

    store: Store
    """The cache's directory."""
    fingerprint: str
    """Hash (hex) over every key and row fingerprint, in order."""
    keys: Keys
    latent_frames: np.ndarray
    """Length of each song in latent frames, int32 (songs,)."""
    parts: list[str]
    """File names in `samples/`."""
    part_numbers: np.ndarray
    """Which of `parts` holds each song, int32 (songs,)."""
    offsets: np.ndarray
    """Where each song begins in its part, in bytes, int64 (songs,)."""
    lengths: np.ndarray
    """Bytes of each song, int64 (songs,)."""
    features: tuple[str, ...]
    """The feature groups that the songs have, of `FEATURE_GROUPS`."""
    ssl_dims: dict[str, int]
    """Width of the features of each SSL model; empty for a cache without SSL features."""
    ssl_frame_stride: int
    text_dim: int | None
    """Width of the text embeddings; None for a cache without them."""
    speaker_dim: int
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.keys)

    def position(self, key: str) -> int:
        """Which song has this key. Raises KeyError if none has."""
        try:
            return self.keys.index(key)
        except ValueError:
            raise KeyError(key) from None

    @classmethod
    def open(cls, place: str | os.PathLike[str] | Store) -> CacheIndex:
        """Read the manifest and the index, not the songs.

        Raises InputError if at this path or URL is no complete cache, or one without songs.
        """
        store = place if isinstance(place, Store) else Store.at(place)
        manifest = read_manifest(store)
        if manifest["counts"]["samples"] == 0:
            raise InputError(
                "the feature cache holds no songs",
                where=store.url,
                fix="its rejects/ say why each song was left out",
            )
        table = read_index_table(store, manifest)
        part = table["part"].unify_dictionaries().combine_chunks()
        index = cls(
            store=store,
            fingerprint=manifest["fingerprint"],
            keys=Keys(table["key"].combine_chunks()),
            latent_frames=table["latent_frames"].fill_null(0).to_numpy(),
            parts=part.dictionary.to_pylist(),
            part_numbers=part.indices.to_numpy(),
            offsets=table["offset"].to_numpy(),
            lengths=table["length"].to_numpy(),
            features=tuple(manifest["settings"].get("features", FEATURE_GROUPS)),
            ssl_dims=manifest["ssl"],
            ssl_frame_stride=manifest["settings"]["ssl_frame_stride"],
            text_dim=manifest["text_dim"],
            speaker_dim=manifest["settings"]["speaker_dim"],
            manifest=manifest,
        )
        index._check_places()
        index._check_parts()
        return index

    def _check_places(self) -> None:
        """Raise InputError for songs at places that no part has: as many bytes as are asked for would be allocated."""
        ends = self.offsets + self.lengths
        if (
            self.offsets.min() < 0
            or self.lengths.min() < 1
            or self.lengths.max() > _LONGEST
            or ends.min() < 0
        ):
            raise InputError(
                "the cache's index is damaged: it names places that no file has",
                where=self.store.url,
                fix=_FIX,
            )

    def _check_parts(self) -> None:
        """Raise InputError if a part is missing, as in a copy that was interrupted."""
        if self.store.is_local:
            # Sizes, for which each file is looked at, would take longer than all else.
            folder = self.store.path / SAMPLES
            present = set(os.listdir(folder)) if folder.is_dir() else set()
        else:
            present = {name.rpartition("/")[2] for name in self.store.names(SAMPLES)}
        missing = [part for part in self.parts if part not in present]
        if missing:
            raise InputError(
                f"{len(missing)} of the cache's {len(self.parts)} parts are missing",
                where=self.store.url_of(f"{SAMPLES}/{missing[0]}"),
                fix=_FIX,
            )
        # A clone without Git LFS has a pointer for every part: the first one shows it, before training starts.
        if self.store.is_local and self.parts:
            part = self.store.path / SAMPLES / self.parts[0]
            if found := seems_to_be(part):
                raise InputError(f"a part of the cache is {found.what}", where=str(part), fix=found.fix)


def read_index_table(store: Store, manifest: dict[str, Any]) -> pa.Table:
    """The index as it is stored, `part` dictionary-encoded. Raises InputError if it is missing or damaged."""
    try:
        content = store.read_bytes(manifest["index"])
    except OSError as error:
        raise InputError(f"the cache's index cannot be read ({error})", where=store.url, fix=_FIX) from None
    try:
        table = table_from_bytes(content, INDEX_SCHEMA, "part")
        table.validate(full=True)  # otherwise a name that is not UTF-8 is found when it is used
        return table
    except (OSError, pa.ArrowException) as error:
        where = store.url_of(manifest["index"])
        reason, fix = _explained(content, where, error)
        raise InputError(f"the cache's index cannot be read ({reason})", where=where, fix=fix) from None


def _explained(content: bytes, where: str, reason: object) -> tuple[str, str]:
    """Why a file of the cache cannot be read, and what to do."""
    found = start_of_impostor(content[:FIRST_BYTES], where)
    return (f"it is {found.what}", found.fix) if found is not None else (str(reason), _FIX)


def read_manifest(store: Store) -> dict[str, Any]:
    """What the cache says of itself. Raises InputError if it is not there, damaged or of another version."""
    where = store.url_of(MANIFEST)
    try:
        content = store.read_bytes(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        unfinished = bool(store.names(SAMPLES) or store.names(INCOMING))
        raise InputError(
            "the feature cache is not complete" if unfinished else "this is not a feature cache",
            where=f"{where} does not exist",
            fix=_FIX if unfinished else "give the directory that `acestep-ray precompute` wrote",
        ) from None
    try:
        manifest = json.loads(content)
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason, fix = _explained(content, where, repr(error))
        raise InputError(f"the cache's manifest cannot be read ({reason})", where=where, fix=fix) from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"the feature cache has the format version {version}, this program reads {FORMAT_VERSION}",
            where=where,
            fix="install a newer version of the program (`pip install -U acestep-ray`), which wrote it"
            if isinstance(version, int) and version > FORMAT_VERSION
            else "run `acestep-ray precompute` again with this version of the program",
        )
    if not isinstance(manifest, dict) or not all(
        is_table_name(manifest.get(name)) for name in ("index", "ledger", "rejects")
    ):
        raise InputError("the cache's manifest names no files of a cache", where=where, fix=_FIX)
    try:
        _check_values(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the cache's manifest cannot be read ({error!r})", where=where, fix=_FIX) from None
    return manifest


def _check_values(manifest: dict[str, Any]) -> None:
    """Raise KeyError or ValueError where the manifest does not hold what `commit` writes."""
    counts, settings, ssl = manifest["counts"], manifest["settings"], manifest["ssl"]
    if not all(isinstance(values, dict) for values in (counts, settings, ssl)):
        raise ValueError("`counts`, `settings` and `ssl` are no objects")
    sizes = [counts[name] for name in ("inputs", "samples", "rejects")]
    sizes += [settings["ssl_frame_stride"] - 1, settings["speaker_dim"] - 1, *ssl.values()]
    sizes += [] if manifest["text_dim"] is None else [manifest["text_dim"]]
    if not all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < _LONGEST for size in sizes
    ):
        raise ValueError("it holds sizes that cannot be")
    features = settings.get("features", list(FEATURE_GROUPS))
    if not isinstance(features, list) or not set(map(str, features)) <= set(FEATURE_GROUPS):
        raise ValueError("it names other features")
    if not isinstance(manifest["fingerprint"], str):
        raise ValueError("its fingerprint is no text")
