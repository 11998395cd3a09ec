"""Songs in a folder, a CSV or a JSON-lines file become a dataset that holds everything it needs.

Everything is read and checked first; if anything is wrong, every problem is told at once and nothing is written.
Audio is not decoded here: a damaged file becomes a reject of the feature cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, disable_progress_bars

from acestep_ray.config import PrepareConfig
from acestep_ray.data.dataset_folder import MARKER, Copies, FilePlaces, only_prepare, write_dataset
from acestep_ray.data.file_names import file_at
from acestep_ray.data.findings import Findings
from acestep_ray.data.layouts import check_layout
from acestep_ray.data.same_names import names_alike, told_apart
from acestep_ray.data.saved import is_dataset, songs_of_dataset
from acestep_ray.data.schema import OPTIONAL_COLUMNS, dataset_features, with_metas
from acestep_ray.data.sources import SourceSong, place_of, songs_of_folder, songs_of_table
from acestep_ray.data.tables import TABLE_SUFFIXES, what_to_give
from acestep_ray.data.unpacking import find_packed, find_packed_in, unpacked
from acestep_ray.errors import InputError
from acestep_ray.plain_files import is_of_the_kernel
from acestep_ray.storage import AccessDeniedError, Store, StoredFile, is_url
from acestep_ray.terminal import Progress, fact_table

_OUR_ENTRIES = re.compile(
    r"audio|speakers|train|test|prepare\.json|state\.json|dataset_info\.json|dataset_dict\.json"
    r"|(data|cache)-.*\.arrow"
)

_SHOWN_WARNINGS = 20
_NAMED = 3
# Of a song's letters.
_WARNED_SHARE = 0.05
# A request is mostly waiting.
_CHECKED_AT_ONCE = 32


@dataclass(frozen=True)
class PrepareSummary:
    """What `prepare_dataset` wrote. `splits` counts rows; `warnings` name the file each is about."""

    output_dir: str
    songs: int
    rows: int
    splits: dict[str, int]
    without_lyrics: int
    warnings: list[str]
    layouts: list[str] = field(default_factory=list)
    """What the texts were taken for, a line for each kind: `120 songs in ACE-Step 1.5's layout`."""

    def render(self) -> str:
        """The summary in a few lines for a terminal; the first 20 warnings are shown."""
        warnings = list(self.warnings[:_SHOWN_WARNINGS])
        if len(self.warnings) > _SHOWN_WARNINGS:
            warnings.append(f"… and {len(self.warnings) - _SHOWN_WARNINGS} more")
        return fact_table(
            [
                ("dataset", self.output_dir),
                ("songs", f"{self.songs} ({self.without_lyrics} without lyrics)"),
                ("rows", ", ".join(f"{rows} {name}" for name, rows in self.splits.items())),
                *(("texts", layout) for layout in self.layouts),
                *(("warning", warning) for warning in warnings),
            ]
        )


def prepare_dataset(config: PrepareConfig) -> PrepareSummary:
    """Writes the dataset of `config.data_dir` to `config.output_dir`, whole or not at all.

    The audio files are hard-linked (copied, where that is not possible) below `audio/`, speaker embeddings
    below `speakers/`. A dataset that an earlier call wrote there is replaced. Both may be URLs.

    Raises InputError with every problem and its file: a missing audio file, a duplicate key, a text that is
    not UTF-8, no songs at all.
    """
    source, output = _resolved(config.data_dir), Store.at(_resolved(config.output_dir))
    _check_values(config)
    findings = Findings()
    with contextlib.ExitStack() as stack:
        packed = find_packed(source)
        table = _table_at(source) if packed is None else None
        folder = Store.at(source) if table is None else table.store
        _check_output(source, folder, output)
        stack.enter_context(only_prepare(output))
        if packed is None:
            found = _read(folder, table, config, findings)
            if not found.songs and found.table is None and not findings.problems:
                packed = find_packed_in(folder)
        if packed is not None:
            place = stack.enter_context(unpacked(packed, output, findings))
            table = _table_at(place)
            found = _read(Store.at(place) if table is None else table.store, table, config, findings)
        if not found.songs and not findings.problems:
            raise InputError("there are no songs", where=source, fix=_expected_in(found.table))
        _check(found, findings, source)
        splits = _write_all(found, output, config)
    layouts = findings.layout_lines()
    if packed is not None:
        # A table that was written while unpacking is nothing that the user has.
        count = len(found.songs)
        layouts = [
            f"{count:,} song{'s' * (count != 1)} in {packed.kind}",
            *(layouts if found.table is None else []),
        ]
    return PrepareSummary(
        output_dir=output.url,
        songs=len(found.songs),
        rows=sum(splits.values()),
        splits=splits,
        without_lyrics=sum(not song.texts.lyrics for song in found.songs),
        warnings=findings.warnings,
        layouts=layouts,
    )


@dataclass(frozen=True)
class _Found:
    """The songs of a source, whose file names are relative to a folder."""

    songs: list[SourceSong]
    folder: Store
    table: StoredFile | None


def _read(folder: Store, table: StoredFile | None, config: PrepareConfig, findings: Findings) -> _Found:
    """Read the songs of a folder, or of a table in it."""
    return _Found(list(_songs_at(folder, table, findings, config.texts)), folder, table)


def _check(found: _Found, findings: Findings, source: str) -> None:
    """Raise InputError with every problem of the songs and their files."""
    # Of a folder in object storage the listing has told what is there.
    is_checked = found.table is not None or found.folder.is_local
    with ThreadPoolExecutor(_CHECKED_AT_ONCE) as pool:
        look = partial(_problems_of_files, folder=found.folder)
        problems_of = pool.map(look, found.songs) if is_checked else repeat([])
        songs = Progress("checking", len(found.songs), "songs").over(found.songs)
        for song, problems in zip(songs, problems_of, strict=False):
            findings.problems += [*song.problems, *problems]
    _check_keys(found.songs, findings)
    findings.warnings += _warnings_of_scripts(found.songs)
    _stop_on_problems(findings, source)


def _write_all(found: _Found, output: Store, config: PrepareConfig) -> dict[str, int]:
    """Write the dataset; returns the number of rows of each split."""
    test_keys = _choose_test_songs([song.key for song in found.songs], config.test_fraction, config.seed)
    disable_progress_bars()  # of `datasets`: ours tells how far it is
    return write_dataset(output, partial(_write, found.songs, found.folder, test_keys, config))


def _songs_at(
    folder: Store, table: StoredFile | None, findings: Findings, layout: str
) -> Iterator[SourceSong]:
    if table is not None:
        return songs_of_table(table, findings)
    if is_dataset(folder):
        return songs_of_dataset(folder, findings)
    return songs_of_folder(folder, findings, layout)


def _resolved(place: str) -> str:
    return place if is_url(place) else os.path.realpath(place)


def _check_values(config: PrepareConfig) -> None:
    """Raise InputError for settings that cannot be used."""
    check_layout(config.texts)
    if config.repeat_count < 1:
        raise InputError("--repeat_count must be at least 1", where=str(config.repeat_count))
    if not 0 <= config.test_fraction < 1:
        raise InputError("--test_fraction must be at least 0 and below 1", where=str(config.test_fraction))


def _table_at(source: str) -> StoredFile | None:
    """The table of songs at `source`, or None for a folder. Raises InputError where there is neither."""
    is_named_as_table = source.lower().endswith(TABLE_SUFFIXES)
    if is_named_as_table and (table := StoredFile.at(source)).status() is not None:
        return table
    store = Store.at(source)
    # os.path throughout: the methods of Path raise where a folder above may not be entered.
    if not (os.path.exists(store.url) if store.is_local else store.names()):
        raise InputError("--data_dir does not exist", where=source)
    if store.is_local and not os.path.isdir(store.url):
        raise InputError(
            "--data_dir is neither a folder nor a table of songs", where=source, fix=what_to_give(source)
        )
    return None


def _check_output(source: str, folder: Store, output: Store) -> None:
    is_folder = folder.url == source.rstrip("/")
    if _is_inside(source, output.url) or (is_folder and _is_inside(output.url, folder.url)):
        raise InputError(
            "--data_dir and --output_dir lie inside each other",
            where=f"{source} and {output.url}",
            fix="write the dataset to a directory of its own, outside the songs",
        )
    output.check_writable()
    entries = _entries(output)
    foreign = [name for name in entries if not _OUR_ENTRIES.fullmatch(name)]
    if entries and (foreign or MARKER not in entries):
        found = foreign or entries
        raise InputError(
            "--output_dir holds files that `acestep-ray prepare` did not write",
            where=f"{output.url} ({', '.join(found[:5])}{', …' if len(found) > 5 else ''})",
            fix="move them, or give a new directory: an earlier dataset would be replaced whole",
        )


def _is_inside(place: str, folder: str) -> bool:
    return f"{place}/".startswith(f"{folder.rstrip('/')}/")


def _entries(output: Store) -> list[str]:
    """Names in a folder, but hidden ones."""
    if not output.is_local:
        names = {name.partition("/")[0] for name in output.names()}
    elif not os.path.exists(output.url):
        names = set()
    elif not os.path.isdir(output.url):
        raise InputError("--output_dir is a file", where=output.url, fix="give a directory")
    else:
        try:
            names = set(os.listdir(output.url))
        except OSError as error:
            raise InputError(f"--output_dir cannot be read ({error.strerror})", where=output.url) from None
    return sorted(name for name in names if not name.startswith("."))


def _expected_in(table: StoredFile | None) -> str:
    if table is None:
        return (
            "put audio files there (.wav, .flac, .mp3, .ogg, .opus, .aiff), each with NAME_prompt.txt "
            "and NAME_lyrics.txt beside it"
        )
    return "write one row for each song, with at least the column filename"


def _problems_of_files(song: SourceSong, folder: Store) -> list[str]:
    """What is wrong with the files of a table's song, or of a song in a local folder."""
    problems = []
    for filename in (song.filename, song.speaker):
        if not filename:
            continue
        origin = song.origin if filename == song.filename else f"{song.origin}: {filename}"
        try:
            file = file_at(filename, folder)
            if file.store.is_local:
                problems += _problems_of_path(file.path, origin)
            elif file.status() is None:
                problems.append(f"{origin}: the file does not exist")
        except (InputError, AccessDeniedError) as error:
            problems.append(f"{origin}: {str(error).splitlines()[0]}")
    return problems


def _problems_of_path(path: Path, origin: str) -> list[str]:
    if not os.path.exists(path):
        if os.path.islink(path):
            return [f"{origin}: the file does not exist (a broken link)"]
        alike = told_apart([path.name, *names_alike(str(path))])
        hint = f": {alike[0]} looks like {' and '.join(alike[1:])}" if len(alike) > 1 else ""
        return [f"{origin}: the file does not exist{hint}"]
    if not os.path.isfile(path) or is_of_the_kernel(path):
        return [f"{origin}: not a file"]
    if not os.access(path, os.R_OK):
        return [f"{origin}: the file may not be read (its permissions)"]
    return []


def _check_keys(songs: list[SourceSong], findings: Findings) -> None:
    origins: dict[str, list[str]] = defaultdict(list)
    for song in songs:
        origins[song.key].append(song.origin)
    findings.problems += [
        f"{', '.join(told_apart(sharing))}: duplicate key {key!r}"
        for key, sharing in origins.items()
        if len(sharing) > 1
    ]


def _warnings_of_scripts(songs: list[SourceSong]) -> list[str]:
    """Which songs are sung in scripts that ACE-Step v1 has no tokens for, a line for each script."""
    from acestep_ray.data.lyrics import percent, scripts_without_tokens

    found: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for song in songs:
        for script, share in scripts_without_tokens(song.texts.lyrics).items():
            if share > _WARNED_SHARE:
                found[script].append((share, song.origin))
    lines = []
    for script, lacking in found.items():
        lacking.sort(key=lambda each: (-each[0], each[1]))
        named = ", ".join(f"{origin} {percent(share)}" for share, origin in lacking[:_NAMED])
        more = ", …" if len(lacking) > _NAMED else ""
        lines.append(
            f"lyrics of {len(lacking)} song{'s' * (len(lacking) != 1)} have letters in {script}, for which "
            f"ACE-Step v1 has no tokens: {named}{more}; precompute rejects songs that are mostly unknown"
        )
    return lines


def _stop_on_problems(findings: Findings, source: str) -> None:
    if findings.problems:
        count = len(findings.problems)
        listed = "".join(f"\n  - {problem}" for problem in findings.problems)
        raise InputError(
            f"{count} problem{'s' * (count > 1)} in the songs, nothing was written",
            where=f"{source}{listed}",
            fix="correct this and run prepare again",
        )


def _choose_test_songs(keys: list[str], fraction: float, seed: int) -> set[str]:
    """Keys of the songs in the test split: at least one, and never all."""
    if fraction == 0:
        return set()
    if len(keys) < 2:
        raise InputError("one song cannot be split", where="--test_fraction", fix="set it to 0 or add songs")
    count = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    return set(sorted(keys, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())[:count])


def _write(
    songs: list[SourceSong],
    folder: Store,
    test_keys: set[str],
    config: PrepareConfig,
    directory: Path,
    dataset: Store,
    copies: Copies,
) -> dict[str, int]:
    """Writes the rows to `directory`, and the songs' files to `dataset`; returns the number of rows of each split."""
    audio, speakers = FilePlaces(dataset, "audio", copies), FilePlaces(dataset, "speakers", copies)
    recaption_names = {name for song in songs for name in song.texts.recaption}
    optional = [
        name
        for name in OPTIONAL_COLUMNS
        if any(getattr(song.texts, name) not in ("", None) for song in songs)
    ]
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for song in Progress("copying", len(songs), "songs").over(songs):
        row = {
            "filename": audio.add(file_at(song.filename, folder), place_of(song.filename, folder)),
            "tags": song.texts.tags,
            "norm_lyrics": song.texts.lyrics,
            "speaker_emb_path": _stored_speaker(song, folder, speakers),
            # A dict in every row, also without recaptions: readers call its methods.
            "recaption": song.texts.recaption,
            **{name: getattr(song.texts, name) for name in optional},
        }
        if config.tag_metas:
            row = with_metas(row)
        split = rows["test" if song.key in test_keys else "train"]
        split.extend({"keys": key} | row for key in _repeated_keys(song.key, config.repeat_count))
    features = dataset_features(recaption_names, optional)
    if test_keys:
        splits = {name: Dataset.from_list(split, features=features) for name, split in rows.items()}
        DatasetDict(splits).save_to_disk(directory)
    else:
        del rows["test"]
        Dataset.from_list(rows["train"], features=features).save_to_disk(directory)
    counts = {name: len(split) for name, split in rows.items()}
    marker = {"format": 1, "settings": asdict(config), "songs": len(songs), "rows": counts}
    (directory / MARKER).write_text(json.dumps(marker, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return counts


def _stored_speaker(song: SourceSong, folder: Store, speakers: FilePlaces) -> str:
    if not song.speaker:
        return ""
    file = file_at(song.speaker, folder)
    return speakers.add(file, posixpath.basename(file.name))


def _repeated_keys(key: str, repeat_count: int) -> list[str]:
    return [key] if repeat_count == 1 else [f"{key}_{i:04d}" for i in range(1, repeat_count + 1)]
