"""Writing a folder whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from acestep_ray.errors import InputError


def check_new(directory: Path) -> None:
    """Raise InputError for a folder to write that exists already and holds something."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(
            "this is written to a new directory, and there is something here",
            where=f"--output_dir {directory}",
            fix="choose another directory, or delete this one",
        )


@contextlib.contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` to write into, which takes its place once the block has ended well.

    Raises InputError where something is in the way.
    """
    check_new(directory)
    partial = directory.parent / f".{directory.name}.{uuid.uuid4().hex}"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"cannot write here ({error.strerror or error})",
            where=f"--output_dir {directory}",
            fix="choose another directory",
        ) from None
    try:
        yield partial
        partial.replace(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
