"""Whole folders: written here and then at their place at once, or brought here for a time."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from acestep_ray.errors import InputError
from acestep_ray.storage.disk import full_disk_explained
from acestep_ray.storage.files import LOCK, flush_below, flush_folder
from acestep_ray.storage.scratch import scratch_folder
from acestep_ray.storage.store import Store
from acestep_ray.storage.swap import put_in_place
from acestep_ray.storage.writers import only_writer_of

_AT_ONCE = 8


def check_new(place: str | os.PathLike[str], flag: str = "--output_dir") -> None:
    """Raise InputError for a folder to write that exists already and holds something, or that cannot be written."""
    store = Store.at(place)
    store.check_writable()
    if store.is_local:
        path = store.path
        is_in_the_way = path.exists() and (not path.is_dir() or any(path.iterdir()))
    else:
        is_in_the_way = bool(store.names().keys() - {LOCK})
    if is_in_the_way:
        raise InputError(
            "this is written to a new directory, and there is something here",
            where=f"{flag} {place}",
            fix="choose another directory, or delete this one",
        )


@contextlib.contextmanager
def output_folder(
    place: str | os.PathLike[str], *, last: Iterable[str] = (), flag: str = "--output_dir"
) -> Iterator[Path]:
    """A new folder on this machine to write into; it is at `place`, whole, once the block has ended well.

    A local folder is renamed into its place. Of one in object storage, where nothing can be renamed, the files are
    uploaded at the end, those named in `last` after all others and in this order: what readers look for first. After
    an exception there is nothing at `place`; a process that is killed while it uploads leaves files without the last.
    What killed processes have left of the same folder is deleted.

    Raises InputError where something is in the way, the folder cannot be written, or another process is writing it;
    DiskFullError where the disk takes no more.
    """
    check_new(place, flag)
    store = Store.at(place)
    with only_writer_of(store, f"{flag} {place}"):
        check_new(place, flag)  # another process may have ended meanwhile
        if store.is_local:
            with _renamed_folder(store.path, f"{flag} {place}") as folder:
                yield folder
            return
        with scratch_folder() as folder:
            yield folder
            upload_folder(folder, store, last=last)


@contextlib.contextmanager
def _renamed_folder(path: Path, where: str) -> Iterator[Path]:
    """A folder beside `path` that is renamed to it. Only for the one writer of `path`."""
    _delete_left(path)
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"cannot write here ({error.strerror or error})",
            where=where,
            fix="choose another directory",
        ) from None
    try:
        with full_disk_explained(path):
            yield partial
            flush_below(partial)
            partial.replace(path)
            flush_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _delete_left(path: Path) -> None:
    """Delete the folders that killed writers of `path` have left beside it."""
    left = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{32}")
    for name in os.listdir(path.parent):
        if left.fullmatch(name):
            shutil.rmtree(path.parent / name, ignore_errors=True)


@contextlib.contextmanager
def replaced_folder(store: Store, *, last: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write into, whose files take the place of all those in `store` at the end of the block.

    On a disk in one step. In object storage the files named in `last` are not there until the others are. Only for
    the one writer of `store`.
    """
    if store.is_local:
        with scratch_folder(store.path.parent) as folder:
            partial = folder / "new"
            partial.mkdir()
            yield partial
            put_in_place(partial, store.path)
        return
    with scratch_folder() as folder:
        yield folder
        before, names, in_order = list(store.names()), files_below(folder), list(last)
        store.delete(in_order)
        upload_files(folder, store, [name for name in names if name not in in_order])
        store.delete(set(before) - set(names) - {LOCK})
        upload_files(folder, store, [name for name in in_order if name in names])


@contextlib.contextmanager
def updated_folder(store: Store, *, last: Iterable[str] = ()) -> Iterator[Path]:
    """A folder on this machine for files that replace those in `store` at the end of the block, each whole.

    Those named in `last` come after all others; in object storage they are not there meanwhile.
    """
    in_order = list(last)
    with scratch_folder(store.path if store.is_local else None) as folder:
        yield folder
        names = files_below(folder)
        names = [name for name in names if name not in in_order] + [
            name for name in in_order if name in names
        ]
        if store.is_local:
            flush_below(folder)
            for name in names:
                (store.path / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / name, store.path / name)
            flush_folder(store.path)
            return
        store.delete(in_order)
        first = [name for name in names if name not in in_order]
        upload_files(folder, store, first)
        upload_files(folder, store, names[len(first) :])


@contextlib.contextmanager
def fetched(place: str | os.PathLike[str] | Store) -> Iterator[Path]:
    """A folder as it is on this machine; one in object storage is downloaded for the time of the block.

    Of what is not there the folder is missing or, from object storage, empty.
    """
    store = Store.at(place)
    if store.is_local:
        yield store.path
        return
    with scratch_folder() as temporary:
        folder = temporary / store.name
        folder.mkdir()
        download_files(store, store.names(), folder)
        with told_of(store, folder):
            yield folder


@contextlib.contextmanager
def told_of(store: Store, folder: Path) -> Iterator[None]:
    """Mistakes found in the copy of a folder as those of the folder itself."""
    try:
        yield
    except InputError as error:
        if error.where is None:
            raise
        where = error.where.replace(str(folder), store.url)
        raise InputError(error.what, where=where, fix=error.fix) from error.__cause__


def download_files(store: Store, names: Iterable[str], folder: Path) -> None:
    """Copy files of a store into a folder on this machine, several at once."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda name: store.download(name, folder / name), names))


def upload_folder(folder: Path, store: Store, *, last: Iterable[str] = ()) -> None:
    """Copy a folder's files to a store, several at once and `last` after all others; all or, after an error, none."""
    names = files_below(folder)
    in_order = [name for name in last if name in names]
    try:
        upload_files(folder, store, [name for name in names if name not in in_order])
        for name in in_order:
            store.upload(folder / name, name)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            store.delete([*reversed(in_order), *names])
        raise


def upload_files(folder: Path, store: Store, names: Iterable[str]) -> None:
    """Copy files of a folder on this machine to a store, several at once; each is written over whole."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda name: store.upload(folder / name, name), names))


def files_below(folder: Path) -> list[str]:
    """Names of the files in a folder and below, relative to it, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
