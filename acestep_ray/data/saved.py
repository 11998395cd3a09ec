"""Datasets that `datasets.save_to_disk` wrote, as sources of songs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from acestep_ray.data.findings import Findings
from acestep_ray.data.schema import load_split, splits_of
from acestep_ray.data.sources import FilesBelow, SourceSong, song_of_row
from acestep_ray.data.tables import plain_columns
from acestep_ray.storage import Store, is_url

if TYPE_CHECKING:
    import datasets

MARKER = "prepare.json"
DATASET_FILES = ("dataset_dict.json", "state.json", "dataset_info.json", MARKER)
"""Any of these in a directory means that it is, or was, a dataset, and no folder of songs."""

# Rows by whose files it is found out what file names are relative to.
_LOOKED_AT = 100


def is_dataset(folder: Store) -> bool:
    """Whether a local folder is a saved dataset."""
    return folder.is_local and any(folder.status(name) is not None for name in DATASET_FILES[:2])


def songs_of_dataset(folder: Store, findings: Findings) -> Iterator[SourceSong]:
    """The songs of all splits of a saved dataset with a column of file names. Raises InputError."""
    splits = splits_of(folder.path, folder.url)
    unused: dict[str, str] = {}
    for split in splits:
        rows = load_split(folder.path, split, folder.url).with_format(None)
        rows = rows.select_columns(plain_columns(rows.features.arrow_schema))
        root = root_of_files(folder, rows, findings.warnings) if "filename" in rows.column_names else folder
        for number, row in enumerate(rows):
            origin = f"{split}, row {number}"
            song = song_of_row(row, origin, root, unused, findings, False, FilesBelow(folder))
            if song is not None:
                findings.layouts["a Hugging Face dataset"] += 1
                yield _within(song, root, folder)
    findings.close_groups()
    if len(splits) > 1:
        findings.warnings.append(
            f"the splits {', '.join(splits)} are one now; --test_fraction splits them again"
        )
    findings.warnings += [f"the column {name!r} is not used, {why}" for name, why in unused.items()]


def _within(song: SourceSong, root: Store, folder: Store) -> SourceSong:
    """A song with names of files that hold for `folder`; they are relative to `root`."""
    if root == folder:
        return song
    for name in ("filename", "speaker"):
        value = getattr(song, name)
        if value and not is_url(value):
            setattr(song, name, os.path.join(root.url, value))
    return song


def root_of_files(dataset: Store, rows: datasets.Dataset, warnings: list[str]) -> Store:
    """The directory that a dataset's file names are relative to.

    That is the dataset's own. The original reads them from the working directory, and its converter writes them so:
    where the dataset's directory has none of the first files, the working directory or the dataset's parent is taken,
    if it has one.
    """
    if not dataset.is_local or dataset.status(MARKER) is not None:
        return dataset
    names = [
        name for name in rows[:_LOOKED_AT]["filename"] if name and not (is_url(name) or name.startswith("/"))
    ]
    for root in (dataset, Store.at("."), Store.at(dataset.path.parent)):
        if any(os.path.exists(os.path.join(root.url, name)) for name in names):
            if root != dataset:
                warnings.append(f"{dataset.url}: its file names are taken as relative to {root.url}")
            return root
    return dataset
