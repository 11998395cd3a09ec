"""One writer at a time of an output: a locked file on this machine, a lease in object storage."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from collections.abc import Iterator

from acestep_ray.errors import InputError
from acestep_ray.storage.disk import NO_ROOM
from acestep_ray.storage.files import LOCK
from acestep_ray.storage.lease import HeldError, Lease
from acestep_ray.storage.locks import LockFile
from acestep_ray.storage.store import Store

_LONGEST_NAME = 255
_WAIT = "wait until it has ended, or write to another place"


@contextlib.contextmanager
def only_writer(folder: Store, where: str, *, lock: str = LOCK, needs_room: bool = True) -> Iterator[None]:
    """Hold the file `lock` in a folder, made if need be; `where` names the output, such as `--output_dir PLACE`.

    The lock of a killed process does not block: on this machine the system has released it, and a lease in object
    storage runs out within a minute. With `needs_room` false a full disk, on which no lock can be made, is no error.

    Raises InputError where another process holds it, or the folder cannot be written to.
    """
    folder.check_writable()
    if not folder.is_local:
        with _leased(folder, lock, where):
            yield
        return
    file = LockFile(folder.path / lock)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        if not file.acquire():
            raise _is_held(file.holder(), where)
    except OSError as error:
        if error.errno not in NO_ROOM or needs_room:
            raise InputError(
                f"cannot write here ({error.strerror or error})", where=where, fix="choose another place"
            ) from error
    try:
        yield
    finally:
        file.release()


def only_writer_of(output: Store, where: str) -> contextlib.AbstractContextManager[None]:
    """As `only_writer`, of a folder that is renamed to its place: on this machine the lock is beside it."""
    if output.is_local:
        return only_writer(output.parent, where, lock=lock_name(output.name))
    return only_writer(output, where)


def lock_name(name: str) -> str:
    """The hidden file that is locked for an output with this name, in the same folder."""
    lock = f".{name}.lock"
    if len(os.fsencode(lock)) <= _LONGEST_NAME:
        return lock
    return f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.lock"


@contextlib.contextmanager
def _leased(folder: Store, lock: str, where: str) -> Iterator[None]:
    lease = Lease(folder, lock, lost=_end_this_process)
    try:
        lease.acquire()
    except HeldError as error:
        raise _is_held(str(error), where) from None
    try:
        yield
    finally:
        lease.release()


def _end_this_process(why: str) -> None:
    """End as SIGTERM does, so that two processes do not write to one place."""
    print(f"{why}: this process was out of reach for too long, and ends", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_held(holder: str, where: str) -> InputError:
    return InputError(f"{holder} is writing to the same place", where=where, fix=_WAIT)
