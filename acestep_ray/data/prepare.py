"""Songs in a folder, a CSV or a JSON-lines file become a dataset that holds everything it needs.

Everything is read and checked first; if anything is wrong, every problem is told at once and nothing is written.
Audio is not decoded here: a damaged file becomes a reject of the feature cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Dataset, DatasetDict, disable_progress_bars

from acestep_ray.config import PrepareConfig
from acestep_ray.data.schema import dataset_features
from acestep_ray.data.sources import (
    TABLE_SUFFIXES,
    Findings,
    SourceSong,
    place_of,
    songs_of_folder,
    songs_of_table,
)
from acestep_ray.errors import InputError
from acestep_ray.storage import Store, StoredFile, is_url

MARKER = "prepare.json"
"""File in a dataset directory that says it was written here, and from what."""

_OUR_ENTRIES = re.compile(
    r"audio|speakers|train|test|prepare\.json|state\.json|dataset_info\.json|dataset_dict\.json"
    r"|(data|cache)-.*\.arrow"
)

_SHOWN_WARNINGS = 20


@dataclass(frozen=True)
class PrepareSummary:
    """What `prepare_dataset` wrote. `splits` counts rows; `warnings` name the file each is about."""

    output_dir: str
    songs: int
    rows: int
    splits: dict[str, int]
    without_lyrics: int
    warnings: list[str]

    def render(self) -> str:
        """The summary in a few lines for a terminal; the first 20 warnings are shown."""
        splits = ", ".join(f"{rows} {name}" for name, rows in self.splits.items())
        lines = [
            f"songs: {self.songs} ({self.without_lyrics} without lyrics), rows: {splits}, in {self.output_dir}"
        ]
        if self.warnings:
            lines.append(f"warnings: {len(self.warnings)}")
            lines += [f"  - {warning}" for warning in self.warnings[:_SHOWN_WARNINGS]]
        if len(self.warnings) > _SHOWN_WARNINGS:
            lines.append(f"  … and {len(self.warnings) - _SHOWN_WARNINGS} more")
        return "\n".join(lines)


def prepare_dataset(config: PrepareConfig) -> PrepareSummary:
    """Writes the dataset of `config.data_dir` to `config.output_dir`, whole or not at all.

    The audio files are hard-linked (copied, where that is not possible) below `audio/`, speaker embeddings
    below `speakers/`. A dataset that an earlier call wrote there is replaced.

    Raises InputError with every problem and its file: a missing audio file, a duplicate key, a text that is
    not UTF-8, no songs at all.
    """
    _refuse_urls(config)
    source, output = Path(config.data_dir).resolve(), Path(config.output_dir).resolve()
    _check_settings(config, source)
    _check_output(source, output)
    findings = Findings()
    folder = source if source.is_dir() else source.parent
    if source.is_dir():
        songs = list(songs_of_folder(Store.at(source), findings))
    else:
        songs = list(songs_of_table(StoredFile.at(source), findings))
    if not songs and not findings.problems:
        raise InputError("there are no songs", where=str(source), fix=_expected_in(source))
    for song in songs:
        findings.problems += song.problems
        _check_files(song, folder, findings)
    _check_keys(songs, findings)
    _stop_on_problems(findings, source)
    test_keys = _choose_test_songs([song.key for song in songs], config.test_fraction, config.seed)
    if not sys.stderr.isatty():
        disable_progress_bars()  # of `datasets`: they fill a log with lines
    splits = _write(songs, folder, test_keys, config, output)
    return PrepareSummary(
        output_dir=str(output),
        songs=len(songs),
        rows=sum(splits.values()),
        splits=splits,
        without_lyrics=sum(not song.lyrics for song in songs),
        warnings=findings.warnings,
    )


def _refuse_urls(config: PrepareConfig) -> None:
    for name in ("data_dir", "output_dir"):
        if is_url(getattr(config, name)):
            raise InputError(
                f"--{name} is a URL, and prepare works on local directories",
                where=getattr(config, name),
                fix="give songs in object storage to precompute as they are: --dataset_path takes a folder or a "
                "table of songs too",
            )


def _check_settings(config: PrepareConfig, source: Path) -> None:
    if config.repeat_count < 1:
        raise InputError("--repeat_count must be at least 1", where=str(config.repeat_count))
    if not 0 <= config.test_fraction < 1:
        raise InputError("--test_fraction must be at least 0 and below 1", where=str(config.test_fraction))
    # os.path throughout: the methods of Path raise where a folder above may not be entered.
    if not os.path.exists(source):
        raise InputError("--data_dir does not exist", where=str(source))
    is_table = os.path.isfile(source) and source.suffix.lower() in TABLE_SUFFIXES
    if not (is_table or os.path.isdir(source)):
        raise InputError(
            "--data_dir is neither a folder nor a table of songs",
            where=str(source),
            fix=f"give a folder of songs or a {', '.join(TABLE_SUFFIXES)} file",
        )


def _check_output(source: Path, output: Path) -> None:
    inside = source.is_relative_to(output) or (source.is_dir() and output.is_relative_to(source))
    if inside:
        raise InputError(
            "--data_dir and --output_dir lie inside each other",
            where=f"{source} and {output}",
            fix="write the dataset to a directory of its own, outside the songs",
        )
    if not os.path.exists(output):
        return
    if not os.path.isdir(output):
        raise InputError("--output_dir is a file", where=str(output), fix="give a directory")
    try:
        entries = sorted(name for name in os.listdir(output) if not name.startswith("."))
    except OSError as error:
        raise InputError(f"--output_dir cannot be read ({error.strerror})", where=str(output)) from None
    foreign = [name for name in entries if not _OUR_ENTRIES.fullmatch(name)]
    if entries and (foreign or MARKER not in entries):
        found = foreign or entries
        raise InputError(
            "--output_dir holds files that `acestep-ray prepare` did not write",
            where=f"{output} ({', '.join(found[:5])}{', …' if len(found) > 5 else ''})",
            fix="move them, or give a new directory: an earlier dataset would be replaced whole",
        )


def _expected_in(source: Path) -> str:
    if source.is_dir():
        return (
            "put audio files there (.wav, .flac, .mp3, .ogg, .opus, .aiff), each with NAME_prompt.txt "
            "and NAME_lyrics.txt beside it"
        )
    return "write one row for each song, with at least the column filename"


def _path_of(filename: str, folder: Path) -> Path:
    return Path(os.path.normpath(folder / filename))


def _check_files(song: SourceSong, folder: Path, findings: Findings) -> None:
    for filename in (song.filename, song.speaker):
        if not filename:
            continue
        origin = song.origin if filename == song.filename else f"{song.origin}: {filename}"
        if is_url(filename):
            findings.problems.append(
                f"{origin}: a URL; prepare reads local files, precompute reads the table as it is"
            )
        else:
            _check_readable(_path_of(filename, folder), origin, findings)


def _check_readable(path: Path, origin: str, findings: Findings) -> None:
    if not os.path.exists(path):
        target = " (a broken link)" if os.path.islink(path) else ""
        findings.problems.append(f"{origin}: the file does not exist{target}")
    elif not os.path.isfile(path):
        findings.problems.append(f"{origin}: not a file")
    elif not os.access(path, os.R_OK):
        findings.problems.append(f"{origin}: the file may not be read (its permissions)")


def _check_keys(songs: list[SourceSong], findings: Findings) -> None:
    origins: dict[str, list[str]] = defaultdict(list)
    for song in songs:
        origins[song.key].append(song.origin)
    findings.problems += [
        f"{', '.join(sharing)}: duplicate key {key!r}" for key, sharing in origins.items() if len(sharing) > 1
    ]


def _stop_on_problems(findings: Findings, source: Path) -> None:
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
    songs: list[SourceSong], folder: Path, test_keys: set[str], config: PrepareConfig, output: Path
) -> dict[str, int]:
    """Writes a dataset beside `output` and renames it into place; returns the number of rows of each split."""
    partial = output.with_name(f".{output.name}.partial")
    previous = output.with_name(f".{output.name}.previous")
    try:
        _remove(partial)
        partial.mkdir(parents=True)
        splits = _write_into(partial, songs, folder, test_keys, config)
        if os.path.exists(output):
            _remove(previous)
            output.rename(previous)
        partial.rename(output)
        _remove(previous)
    except OSError as error:
        raise InputError(
            f"the dataset cannot be written ({error.strerror or error})",
            where=str(output),
            fix="check the permissions and the free space there",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _put_back(previous, output)
    return splits


def _put_back(previous: Path, output: Path) -> None:
    """Undoes the first of the two renames, if a failure came between them, now or in an earlier run."""
    if os.path.exists(previous) and not os.path.exists(output):
        previous.rename(output)


def _remove(directory: Path) -> None:
    if os.path.exists(directory):
        shutil.rmtree(directory)


def _write_into(
    directory: Path, songs: list[SourceSong], folder: Path, test_keys: set[str], config: PrepareConfig
) -> dict[str, int]:
    audio, speakers = _FileStore(directory, "audio"), _FileStore(directory, "speakers")
    recaption_names = {name for song in songs for name in song.recaption}
    language = any(song.language for song in songs)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for song in songs:
        row = {
            "filename": audio.add(_path_of(song.filename, folder), place_of(song.filename, Store.at(folder))),
            "tags": song.tags,
            "norm_lyrics": song.lyrics,
            "speaker_emb_path": _stored_speaker(song, folder, speakers),
            "recaption": song.recaption,  # a dict in every row, also without recaptions: readers call its methods
        }
        if language:
            row["language"] = song.language
        split = rows["test" if song.key in test_keys else "train"]
        split.extend({"keys": key} | row for key in _repeated_keys(song.key, config.repeat_count))
    features = dataset_features(recaption_names, language=language)
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


def _stored_speaker(song: SourceSong, folder: Path, speakers: _FileStore) -> str:
    path = _path_of(song.speaker, folder)
    return speakers.add(path, path.name) if song.speaker else ""


def _repeated_keys(key: str, repeat_count: int) -> list[str]:
    return [key] if repeat_count == 1 else [f"{key}_{i:04d}" for i in range(1, repeat_count + 1)]


class _FileStore:
    """Puts files into one folder of a dataset, each once, under names that do not collide."""

    def __init__(self, dataset_dir: Path, folder: str):
        self._root = dataset_dir
        self._folder = folder
        self._places: dict[Path, str] = {}

    def add(self, source: Path, place: str) -> str:
        """Path of `source` in the dataset, relative to its directory; near `place` in the folder."""
        if source not in self._places:
            wanted = PurePosixPath(self._folder, place)
            stored, number = wanted, 1
            while (self._root / stored).exists():
                number += 1
                stored = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
            self._places[source] = str(stored)
            target = self._root / stored
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source, target)
        return self._places[source]


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links, or somebody else's file
        shutil.copyfile(source, target)
