"""What precompute reads: the songs of a dataset, of a folder or of a table, here or in object storage."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, BinaryIO

import datasets

from acestep_ray.data.schema import COLUMNS, check_unique_keys, open_dataset
from acestep_ray.data.sources import TABLE_SUFFIXES, Findings, SourceSong, songs_of_folder, songs_of_table
from acestep_ray.data.texts import printable
from acestep_ray.errors import InputError
from acestep_ray.storage import Store, StoredFile, is_url

# Any of these in a directory means that it is, or was, a dataset, and no folder of songs.
_MARKER = "prepare.json"
_DATASET_FILES = ("dataset_dict.json", "state.json", "dataset_info.json", _MARKER)

_SHOWN_PROBLEMS = 20
# Rows by whose files it is found out what file names are relative to.
_LOOKED_AT = 100


class SongTable:
    """Songs in their order: each a dict with the dataset's columns, of which only `keys` and `filename` are sure.

    A row of a folder or table has the column `problem` as well: why the song cannot be used (a text beside it that
    is not UTF-8, say), or "". Whether the audio is there and can be read is not looked at.

    Rows lie in files, not in memory, since a million songs may come with gigabytes of lyrics. They are read where the
    table was opened: other processes get rows.
    """

    def __init__(self, root: Store, rows: datasets.Dataset | _RowFile, warnings: list[str]):
        self.root = root
        """File names in the rows are relative to this directory (see `locate_file`)."""
        self.warnings = warnings
        """What is unusual in a folder or table, each with the file or row: a song without a prompt, say."""
        self._rows = rows
        self.keys: list[str] = rows["keys"][:] if isinstance(rows, datasets.Dataset) else rows.keys

    @classmethod
    def open(cls, place: str | os.PathLike[str], split: str = "train") -> SongTable:
        """The songs of a Hugging Face dataset directory, of a folder of songs with texts beside them, or of a table
        (.csv, .tsv, .jsonl, .ndjson): a path on this machine, or a URL (`s3://`, `gs://`, `hf://datasets/USER/NAME`).

        Folders and tables have the split `train` alone. File names in a table are relative to its folder, absolute
        paths, or URLs.

        Raises InputError for a mistake that concerns the whole source: it is missing, holds no songs, cannot be read
        as a table, lacks a column, has duplicate keys.
        """
        root = Store.at(place)
        findings = Findings()
        if root.url.lower().endswith(TABLE_SUFFIXES) and (table := StoredFile.at(place)).status() is not None:
            _check_split(split, table.url)
            return cls._of_source(table.store, songs_of_table(table, findings), findings, table.url)
        if any(root.status(name) is not None for name in _DATASET_FILES):
            columns = open_dataset(place, split, findings.warnings)
            # A column of audio would be decoded with every row.
            rows = columns.select_columns([name for name in COLUMNS if name in columns.column_names])
            return cls(_root_of_files(root, rows, findings.warnings), rows, findings.warnings)
        if root.is_local and not os.path.isdir(root.url):
            what = (
                "is neither a directory nor a table of songs"
                if os.path.exists(root.url)
                else "does not exist"
            )
            raise InputError(
                f"the dataset {what}",
                where=root.url,
                fix="give the directory that `acestep-ray prepare` wrote, a folder of songs, "
                f"or a {', '.join(TABLE_SUFFIXES)} file",
            )
        _check_split(split, root.url)
        return cls._of_source(root, songs_of_folder(root, findings), findings, root.url)

    @classmethod
    def _of_source(
        cls, root: Store, songs: Iterable[SourceSong], findings: Findings, where: str
    ) -> SongTable:
        rows = _RowFile.write(_row_of(song) for song in songs)
        if findings.problems:
            raise _problems_of_source(findings.problems, where)
        if not len(rows):
            raise _no_songs(root, where)
        check_unique_keys(rows.keys, where)
        return cls(root, rows, findings.warnings)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, Any]:
        """The song at a position, counted from 0."""
        return self._rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)


class _RowFile:
    """Rows as lines of JSON in a temporary file that is gone with this object."""

    def __init__(self, file: BinaryIO, offsets: array[int], keys: list[str]):
        self._file = file
        self._offsets = offsets
        self.keys = keys

    @classmethod
    def write(cls, rows: Iterable[dict[str, Any]]) -> _RowFile:
        file = tempfile.TemporaryFile(prefix="acestep-ray-")  # noqa: SIM115 - it is open as long as the rows
        offsets, keys = array("q", [0]), []
        for row in rows:
            line = json.dumps(row).encode()
            file.write(line)
            offsets.append(offsets[-1] + len(line))
            keys.append(row["keys"])
        file.flush()
        return cls(file, offsets, keys)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start, end = self._offsets[index], self._offsets[index + 1]
        return json.loads(os.pread(self._file.fileno(), end - start, start))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start, end in pairwise(self._offsets):
            yield json.loads(os.pread(self._file.fileno(), end - start, start))


def _root_of_files(dataset: Store, rows: datasets.Dataset, warnings: list[str]) -> Store:
    """The directory that a dataset's file names are relative to.

    That is the dataset's own. The original reads them from the working directory, and its converter writes them so:
    where the dataset's directory has none of the first files, the working directory or the dataset's parent is taken,
    if it has one.
    """
    if not dataset.is_local or dataset.status(_MARKER) is not None:
        return dataset
    names = [name for name in rows[:_LOOKED_AT]["filename"] if not (is_url(name) or name.startswith("/"))]
    for root in (dataset, Store.at("."), Store.at(dataset.path.parent)):
        if any(os.path.exists(os.path.join(root.url, name)) for name in names):
            if root != dataset:
                warnings.append(f"{dataset.url}: its file names are taken as relative to {root.url}")
            return root
    return dataset


def _row_of(song: SourceSong) -> dict[str, Any]:
    return {
        "keys": song.key,
        "filename": printable(song.filename),
        "tags": song.tags,
        "norm_lyrics": song.lyrics,
        "speaker_emb_path": song.speaker,
        "recaption": song.recaption,
        "language": song.language,
        "problem": "; ".join(song.problems),
    }


def _check_split(split: str, where: str) -> None:
    if split != "train":
        raise InputError(
            f"the songs have no split {split!r}",
            where=where,
            fix="it has: train; `acestep-ray prepare --test_fraction` makes a dataset with a test split",
        )


def _problems_of_source(problems: list[str], where: str) -> InputError:
    count = len(problems)
    listed = "".join(f"\n  - {problem}" for problem in problems[:_SHOWN_PROBLEMS])
    more = f"\n  … and {count - _SHOWN_PROBLEMS} more" if count > _SHOWN_PROBLEMS else ""
    return InputError(f"{count} problem{'s' * (count > 1)} in the songs", where=f"{where}{listed}{more}")


def _no_songs(root: Store, where: str) -> InputError:
    if root.status("manifest.json") is not None:
        fix = "this looks like a feature cache; give the dataset that it was computed from"
    elif root.protocol == "hf":
        fix = "give hf://datasets/USER/NAME; for a private repository set HF_TOKEN on every node"
    else:
        fix = "put audio files there, each with NAME_prompt.txt and NAME_lyrics.txt beside it, or name the right place"
    return InputError("there are no songs", where=where, fix=fix)
