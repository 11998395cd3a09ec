"""Whole folders: written here and then at their place at once, or brought here for a time."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from acestep_ray.errors import InputError
from acestep_ray.storage.store import Store

_AT_ONCE = 8


def check_new(place: str | os.PathLike[str], flag: str = "--output_dir") -> None:
    """Raise InputError for a folder to write that exists already and holds something, or that cannot be written."""
    store = Store.at(place)
    store.check_writable()
    if store.is_local:
        path = store.path
        is_in_the_way = path.exists() and (not path.is_dir() or any(path.iterdir()))
    else:
        is_in_the_way = bool(store.names())
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

    Raises InputError where something is in the way, or the folder cannot be written.
    """
    check_new(place, flag)
    store = Store.at(place)
    if not store.is_local:
        with tempfile.TemporaryDirectory(prefix="acestep-ray-") as temporary:
            yield Path(temporary)
            upload_folder(Path(temporary), store, last=last)
        return
    partial = store.path.parent / f".{store.name}.{uuid.uuid4().hex}"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"cannot write here ({error.strerror or error})",
            where=f"{flag} {place}",
            fix="choose another directory",
        ) from None
    try:
        yield partial
        partial.replace(store.path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def updated_folder(store: Store, *, last: Iterable[str] = ()) -> Iterator[Path]:
    """A folder on this machine for files that replace those in `store`, one by one.

    Of a local one it is the folder itself. To object storage they are uploaded at the end of the block; those named in
    `last` are not there meanwhile.
    """
    if store.is_local:
        store.path.mkdir(parents=True, exist_ok=True)
        yield store.path
        return
    with tempfile.TemporaryDirectory(prefix="acestep-ray-") as folder:
        yield Path(folder)
        in_order = list(last)
        store.delete(in_order)
        names = files_below(Path(folder))
        upload_files(Path(folder), store, [name for name in names if name not in in_order])
        upload_files(Path(folder), store, [name for name in in_order if name in names])


@contextlib.contextmanager
def fetched(place: str | os.PathLike[str] | Store) -> Iterator[Path]:
    """A folder as it is on this machine; one in object storage is downloaded for the time of the block.

    Of what is not there the folder is missing or, from object storage, empty.
    """
    store = Store.at(place)
    if store.is_local:
        yield store.path
        return
    with tempfile.TemporaryDirectory(prefix="acestep-ray-") as temporary:
        folder = Path(temporary, store.name)
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
