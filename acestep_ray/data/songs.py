"""What precompute reads: the songs of a dataset, of a folder or of a table, here or in object storage."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, BinaryIO

import datasets

from acestep_ray.data.findings import Findings
from acestep_ray.data.layouts import check_layout
from acestep_ray.data.saved import DATASET_FILES, root_of_files
from acestep_ray.data.schema import COLUMNS, OPTIONAL_COLUMNS, check_unique_keys, open_dataset, with_metas
from acestep_ray.data.sources import SourceSong, songs_of_folder, songs_of_table
from acestep_ray.data.tables import TABLE_SUFFIXES, what_to_give
from acestep_ray.data.texts import printable
from acestep_ray.data.unpacking import check_not_packed, find_packed, find_packed_in
from acestep_ray.errors import InputError
from acestep_ray.storage import Store, StoredFile

_SHOWN_PROBLEMS = 20


class SongTable:
    """Songs in their order: each a dict with the dataset's columns, of which only `keys` and `filename` are sure.

    A row of a folder or table has the column `problem` as well: why the song cannot be used (a text beside it that
    is not UTF-8, say), or "". Whether the audio is there and can be read is not looked at.

    Rows lie in files, not in memory, since a million songs may come with gigabytes of lyrics. They are read where the
    table was opened: other processes get rows.
    """

    def __init__(
        self,
        root: Store,
        rows: datasets.Dataset | _RowFile,
        warnings: list[str],
        layouts: Sequence[str] = (),
        tag_metas: bool = False,
    ):
        self.root = root
        """File names in the rows are relative to this directory (see `locate_file`)."""
        self.warnings = warnings
        """What is unusual in a folder or table, each with the file or row: a song without a prompt, say."""
        self.layouts = list(layouts)
        """What the texts of a folder or table were taken for, a line for each kind."""
        self._rows = rows
        self._tag_metas = tag_metas
        self.keys: list[str] = rows["keys"][:] if isinstance(rows, datasets.Dataset) else rows.keys

    @classmethod
    def open(
        cls,
        place: str | os.PathLike[str],
        split: str = "train",
        *,
        layout: str = "auto",
        tag_metas: bool = False,
    ) -> SongTable:
        """The songs of a Hugging Face dataset directory, of a folder of songs with texts beside them, or of a table
        (see `TABLE_SUFFIXES`): a path on this machine, or a URL (`s3://`, `gs://`, `hf://datasets/USER/NAME`).

        Folders and tables have the split `train` alone. File names in a table are relative to its folder, absolute
        paths, or URLs. `layout` is one of `TEXT_LAYOUTS`: what `NAME.txt` holds in a folder. With `tag_metas`, tempo
        and key of a song are among its tags.

        Raises InputError for a mistake that concerns the whole source: it is missing, holds no songs, cannot be read
        as a table, lacks a column, has duplicate keys.
        """
        check_layout(layout)
        root = Store.at(place)
        findings = Findings()
        if root.url.lower().endswith(TABLE_SUFFIXES) and (table := StoredFile.at(place)).status() is not None:
            _check_split(split, table.url)
            check_not_packed(find_packed(table.url), table.url)
            songs = songs_of_table(table, findings)
            return cls._of_source(table.store, songs, findings, table.url, tag_metas)
        if any(root.status(name) is not None for name in DATASET_FILES):
            check_not_packed(find_packed(root.url), root.url)
            columns = open_dataset(place, split, findings.warnings)
            # A column of audio would be decoded with every row.
            rows = columns.select_columns([name for name in COLUMNS if name in columns.column_names])
            files = root_of_files(root, rows, findings.warnings)
            return cls(files, rows, findings.warnings, tag_metas=tag_metas)
        if root.is_local and not os.path.isdir(root.url):
            what = (
                "is neither a directory nor a table of songs"
                if os.path.exists(root.url)
                else "does not exist"
            )
            raise InputError(
                f"the dataset {what}",
                where=root.url,
                fix=what_to_give(root.url),
            )
        check_not_packed(find_packed(root.url), root.url)
        _check_split(split, root.url)
        return cls._of_source(root, songs_of_folder(root, findings, layout), findings, root.url, tag_metas)

    @classmethod
    def _of_source(
        cls, root: Store, songs: Iterable[SourceSong], findings: Findings, where: str, tag_metas: bool
    ) -> SongTable:
        rows = _RowFile.write(_row_of(song) for song in songs)
        if findings.problems:
            raise _problems_of_source(findings.problems, where)
        if not len(rows):
            check_not_packed(find_packed_in(root), where)
            raise _no_songs(root, where)
        check_unique_keys(rows.keys, where)
        return cls(root, rows, findings.warnings, findings.layout_lines(), tag_metas)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, Any]:
        """The song at a position, counted from 0."""
        return self._with_settings(self._rows[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._with_settings, self._rows)

    def _with_settings(self, row: dict[str, Any]) -> dict[str, Any]:
        return with_metas(row) if self._tag_metas else row


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


def _row_of(song: SourceSong) -> dict[str, Any]:
    texts = song.texts
    row = {
        "keys": song.key,
        "filename": printable(song.filename),
        "tags": texts.tags,
        "norm_lyrics": texts.lyrics,
        "speaker_emb_path": song.speaker,
        "recaption": texts.recaption,
        "language": texts.language,
        "problem": "; ".join(song.problems),
    }
    facts = {name: getattr(texts, name) for name in OPTIONAL_COLUMNS}
    return {**{name: value for name, value in facts.items() if value not in ("", None)}, **row}


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
