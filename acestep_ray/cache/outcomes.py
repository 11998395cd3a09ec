"""What earlier runs have left of each song: found again, compared, and at the end counted. No Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa

from acestep_ray.cache.decoding import file_versions, rows_are_current
from acestep_ray.cache.songs import FileVersions, Recipe, Reject, Song
from acestep_ray.data.schema import RejectReason
from acestep_ray.errors import AceStepError
from acestep_ray.storage import Store

_ROW_COLUMNS = (
    "fingerprint",
    "window",
    "is_last_window",
    "audio_sha256",
    "audio_version",
    "speaker_sha256",
    "speaker_version",
    "decoded_share",
)


@dataclass(frozen=True)
class Candidate:
    """An outcome of a song on disk, made by this recipe of files whose bytes or versions are noted here."""

    song: Song
    number: int
    versions: FileVersions | None
    """Of the files that its rows were made of; None where it has no rows."""
    audio_sha256: str
    speaker_sha256: str | None
    reject_fingerprint: str | None
    """Of its rejects; None where it has none."""


class Outcomes:
    """Rows and rejects on disk, by song. A song may have several outcomes: its file was another before."""

    def __init__(self, rows: pa.Table, rejects: list[Reject]):
        self.rows, self.rejects = rows, rejects
        # A table would look for the column, and for the chunk of the row, again and again.
        self._columns = {name: rows[name].combine_chunks() for name in _ROW_COLUMNS}
        self._rows_of: dict[str, list[int]] = {}
        for place, key in enumerate(rows["song_key"].to_pylist()):
            self._rows_of.setdefault(key, []).append(place)
        self._rejects_of: dict[str, list[int]] = {}
        for place, reject in enumerate(rejects):
            self._rejects_of.setdefault(reject.song_key, []).append(place)
        self._places: list[tuple[list[int], list[int]]] = []

    def __bool__(self) -> bool:
        return bool(self._rows_of or self._rejects_of)

    def candidates(self, song: Song, recipe: Recipe) -> list[Candidate]:
        """The song's complete outcomes by this recipe; which is right, its files tell."""
        found = []
        for row_version, rejects_version in product(
            [None, *self._row_versions(song, recipe)], [None, *self._reject_versions(song)]
        ):
            rows = row_version or {}
            # A window that was computed in another run than the one that rejected it is there once.
            rejects = {w: place for w, place in (rejects_version or {}).items() if w not in rows}
            if self._is_complete(rows, rejects):
                found.append(self._candidate(song, list(rows.values()), list(rejects.values())))
        return found

    def _row_versions(self, song: Song, recipe: Recipe) -> list[dict[int, int]]:
        """Places of rows that are this recipe's, by window, for each version of the song's files."""
        versions: dict[str, dict[int, int]] = {}
        for place in self._rows_of.get(song.key, ()):
            values = self._row(place)
            expected = recipe.row_fingerprint(song, values["audio_sha256"], values["speaker_sha256"])
            share = values["decoded_share"]
            is_enough = share is None or share >= recipe.min_decoded
            if values["fingerprint"] == expected and is_enough:
                versions.setdefault(expected, {}).setdefault(values["window"], place)
        return list(versions.values())

    def _reject_versions(self, song: Song) -> list[dict[int, int]]:
        versions: dict[str, dict[int, int]] = {}
        for place in self._rejects_of.get(song.key, ()):
            reject = self.rejects[place]
            reason = RejectReason.of(reject.reason)
            if reject.fingerprint is not None and not reason.is_transient:
                versions.setdefault(reject.fingerprint, {}).setdefault(reject.window, place)
        return list(versions.values())

    def _is_complete(self, rows: dict[int, int], rejects: dict[int, int]) -> bool:
        """Whether these are all windows of a song, the last one included."""
        ends = [window for window, place in rows.items() if self._columns["is_last_window"][place].as_py()]
        ends += [window for window, place in rejects.items() if self.rejects[place].is_last_window]
        windows = sorted([*rows, *rejects])
        return bool(windows) and windows == list(range(len(windows))) and ends == [len(windows) - 1]

    def _candidate(self, song: Song, rows: list[int], rejects: list[int]) -> Candidate:
        self._places.append((rows, rejects))
        values = self._row(rows[0]) if rows else {}
        return Candidate(
            song=song,
            number=len(self._places) - 1,
            versions=FileVersions(values["audio_version"], values["speaker_version"]) if rows else None,
            audio_sha256=values.get("audio_sha256", ""),
            speaker_sha256=values.get("speaker_sha256"),
            reject_fingerprint=self.rejects[rejects[0]].fingerprint if rejects else None,
        )

    def _row(self, place: int) -> dict[str, Any]:
        return {name: column[place].as_py() for name, column in self._columns.items()}

    def of(self, candidates: Iterable[Candidate]) -> tuple[pa.Table, list[Reject]]:
        """Rows and rejects of these candidates, one for a song."""
        chosen = {candidate.song.key: self._places[candidate.number] for candidate in candidates}
        rows = sorted(place for places, _ in chosen.values() for place in places)
        rejects = sorted(place for _, places in chosen.values() for place in places)
        return self.rows.take(pa.array(rows, pa.int64())), [self.rejects[place] for place in rejects]


def rejects_of(table: pa.Table) -> list[Reject]:
    return [Reject(**values) for values in table.to_pylist()]


def unchanged_songs(root: Store, recipe: Recipe, candidates: list[Candidate]) -> list[Candidate]:
    """Those whose files are still the ones that they were."""
    return [candidate for candidate in candidates if _is_unchanged(root, recipe, candidate)]


def _is_unchanged(root: Store, recipe: Recipe, candidate: Candidate) -> bool:
    song = candidate.song
    if candidate.reject_fingerprint is not None:
        versions = file_versions(root, song)
        if recipe.reject_fingerprint(song, versions) != candidate.reject_fingerprint:
            return False
    return candidate.versions is None or rows_are_current(
        root, song, candidate.versions, candidate.audio_sha256, candidate.speaker_sha256
    )


def first_of_each(rows: pa.Table) -> pa.Table:
    """The first row of every key: a task that was run twice may have stored its songs twice."""
    first = (
        rows.append_column("place", pa.array(np.arange(len(rows))))
        .group_by("key")
        .aggregate([("place", "min")])
    )
    return rows.take(first["place_min"].sort())


def check_complete(keys: Iterable[str], rows: pa.Table, rejects: Sequence[Reject]) -> None:
    """Every song is in exactly one of samples and rejects, with all its windows, or some were lost or doubled.

    Raises AceStepError with the keys.
    """
    outcomes = zip(
        *(rows[name].to_pylist() for name in ("song_key", "window", "is_last_window")), strict=True
    )
    seen = Counter((key, window) for key, window, _ in outcomes)
    seen.update((reject.song_key, reject.window) for reject in rejects)
    outcomes = zip(
        *(rows[name].to_pylist() for name in ("song_key", "window", "is_last_window")), strict=True
    )
    last = [(key, window) for key, window, is_last in outcomes if is_last]
    last += [(reject.song_key, reject.window) for reject in rejects if reject.is_last_window]
    windows, ends = Counter(key for key, _ in seen), dict(last)
    wrong = {key for (key, _), count in seen.items() if count > 1}
    wrong |= {key for key, count in Counter(key for key, _ in last).items() if count > 1}
    wrong |= {key for key, count in windows.items() if ends.get(key) != count - 1}
    wrong |= set(keys) ^ set(windows)
    if wrong:
        raise AceStepError(f"{len(wrong)} songs were lost or doubled on the way, among them {min(wrong)!r}")
