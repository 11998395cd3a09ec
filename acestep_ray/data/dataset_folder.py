"""The directory of a dataset while it is written: the files of songs in it, and all of it whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from acestep_ray.errors import InputError
from acestep_ray.storage import Store, StoredFile
from acestep_ray.storage.disk import DiskFullError, full_disk_explained
from acestep_ray.storage.files import LOCK
from acestep_ray.storage.folders import files_below, upload_files
from acestep_ray.storage.scratch import scratch_folder
from acestep_ray.storage.swap import put_in_place, restore_previous
from acestep_ray.storage.writers import only_writer_of
from acestep_ray.terminal import Progress

MARKER = "prepare.json"
"""File in a dataset directory that says it was written here, and from what."""

# What readers look for first, of a Dataset and of a DatasetDict.
_INDEX = ("dataset_info.json", "state.json", "dataset_dict.json")
_COPIES = 8


class FilePlaces:
    """Puts files into one folder of a dataset, each once, under names that do not collide."""

    def __init__(self, dataset: Store, folder: str, copies: Copies):
        self._dataset = dataset
        self._folder = folder
        self._copies = copies
        self._places: dict[str, str] = {}
        self._taken: set[str] = set()

    def add(self, source: StoredFile, place: str) -> str:
        """Path of `source` in the dataset, relative to its directory; near `place` in the folder."""
        if source.url not in self._places:
            wanted = PurePosixPath(self._folder, place)
            stored, number = wanted, 1
            while self._is_taken(str(stored)):
                number += 1
                stored = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
            self._places[source.url] = str(stored)
            self._taken.add(str(stored))
            self._copies.add(source, self._dataset.file(str(stored)))
        return self._places[source.url]

    def _is_taken(self, name: str) -> bool:
        # Some disks take two names for one that differ in the size of a letter.
        return name in self._taken or (self._dataset.is_local and (self._dataset.path / name).exists())


class Copies:
    """Copies files: at once on this machine, several at a time from and to object storage."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool = pool
        self._pending: list[Future[None]] = []
        self.names: set[str] = set()
        """Of what was copied, within the dataset."""

    def add(self, source: StoredFile, target: StoredFile) -> None:
        """Begin to copy."""
        self.names.add(target.name)
        if source.store.is_local and target.store.is_local:
            target.path.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(source.path, target.path)
        else:
            self._pending.append(self._pool.submit(_copy, source, target))

    def finish(self) -> None:
        """Wait for all copies. Raises what ended one of them."""
        if self._pending:
            for pending in Progress("copying", len(self._pending), "files").over(self._pending):
                pending.result()


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that cannot be."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links, or somebody else's file
        shutil.copyfile(source, target)


def _copy(source: StoredFile, target: StoredFile) -> None:
    if target.store.is_local:
        target.path.parent.mkdir(parents=True, exist_ok=True)
        source.store.download(source.name, target.path)
    elif source.store.is_local:
        target.store.upload(source.path, target.name)
    else:
        with scratch_folder() as folder:
            source.store.download(source.name, folder / "content")
            target.store.upload(folder / "content", target.name)


@contextlib.contextmanager
def _copying() -> Iterator[Copies]:
    with ThreadPoolExecutor(_COPIES) as pool:
        copies = Copies(pool)
        try:
            yield copies
            copies.finish()
        finally:
            pool.shutdown(cancel_futures=True)


Write = Callable[[Path, Store, Copies], Any]
"""Writes a dataset: its rows into a folder of this machine, and the songs' files below the dataset."""


def write_dataset(output: Store, write: Write) -> Any:
    """Let `write` make a dataset at `output`, in place of the one that is there; returns what it returns.

    On a disk it is written beside its place and renamed. In object storage the songs' files are copied first, and the
    files that readers look for come last: until then what is there reads as a dataset that is not finished.
    """
    if not output.is_local:
        return _write_to_storage(output, write)
    return _write_to_disk(output.path, write)


@contextlib.contextmanager
def only_prepare(output: Store) -> Iterator[None]:
    """Hold the place of a dataset, and put back what a killed process has left of the one that was there.

    Raises InputError where another process is writing to it.
    """
    with only_writer_of(output, f"--output_dir {output.url}"):
        if output.is_local:
            restore_previous(output.path)
        yield


def _write_to_storage(output: Store, write: Write) -> Any:
    before = [name for name in output.names() if name != LOCK]
    output.write_bytes(MARKER, json.dumps({"format": 1, "unfinished": True}).encode())
    output.delete(name for name in before if name in _INDEX)
    with scratch_folder() as folder:
        with _copying() as copies:
            made = write(folder, output, copies)
        names = files_below(folder)
        last = [name for name in (*_INDEX, MARKER) if name in names]
        upload_files(folder, output, [name for name in names if name not in last])
        output.delete(set(before) - {*names, *copies.names})
        for name in last:
            output.upload(folder / name, name)
    return made


def _write_to_disk(output: Path, write: Write) -> Any:
    partial = output.with_name(f".{output.name}.partial")
    try:
        _remove(partial)
        partial.mkdir(parents=True)
        with full_disk_explained(output), _copying() as copies:
            made = write(partial, Store.at(partial), copies)
        with full_disk_explained(output):
            put_in_place(partial, output)
    except DiskFullError:
        raise
    except OSError as error:
        raise InputError(
            f"the dataset cannot be written ({error.strerror or error})",
            where=str(output),
            fix="check the permissions and the free space there",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        restore_previous(output)
    return made


def _remove(directory: Path) -> None:
    if os.path.exists(directory):
        shutil.rmtree(directory)
