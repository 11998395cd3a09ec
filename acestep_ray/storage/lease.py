"""One holder at a time of a folder in object storage, which has no locks.

The holder writes an object and writes it anew every few seconds. Who finds one watches it: if it changes, somebody is
at work; if it does not for a minute, nobody is, and the folder is taken over. So no clocks are compared. S3 and Google
Cloud Storage let one of two that begin at once succeed; on storage without such conditions the last one to write does,
and the other finds that out when it reads the object again.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from acestep_ray.errors import AceStepError
from acestep_ray.storage.errors import StorageError
from acestep_ray.storage.files import FileStatus
from acestep_ray.storage.store import Store

RENEWAL_SECONDS = 10.0
LEASE_SECONDS = 60.0
"""Without a renewal for so long, a holder is taken to be gone."""
SETTLE_SECONDS = 1.0
_LOOK_SECONDS = 1.0

Say = Callable[[str], None]


class HeldError(AceStepError):
    """Somebody else holds the lease; the message says who."""


class Lease:
    """A folder of object storage that this process holds, once `acquire` has returned, until `release`."""

    def __init__(self, store: Store, name: str, *, lost: Say, say: Say = print):
        """The lease is the object `name`. `lost` is called from a thread when somebody else has taken the folder."""
        self._store, self._name = store, name
        self._lost, self._say = lost, say
        self._owner = uuid.uuid4().hex
        self._renewals = 0
        self._status: FileStatus | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_ended, name="lease", daemon=True)

    def acquire(self) -> None:
        """Take the lease; that of a holder who is gone after a minute. Raises HeldError where somebody is at work."""
        told = False
        while not self._store.create(self._name, self._content()):
            holder, status = self._look()
            if holder.get("owner") == self._owner:
                break  # the answer was lost, and the object written
            if status is None:
                continue  # it was released meanwhile
            if not _is_gone(holder):
                if not told:
                    told = True
                    self._say(
                        f"{_described(holder)} holds {self._store.url}; "
                        f"looking for up to {LEASE_SECONDS:.0f} s whether it is still at work"
                    )
                if self._has_changed(status):
                    raise HeldError(_described(holder))
            if self._store.exchange(self._name, self._content(), status):
                break
        # Where storage takes no conditions, another one may have written after us.
        time.sleep(SETTLE_SECONDS)
        holder, self._status = self._look()
        if holder.get("owner") != self._owner:
            raise HeldError(_described(holder))
        self._thread.start()

    def release(self) -> None:
        """Let it go; where storage fails, others wait until it runs out."""
        self._ended.set()
        self._thread.join(LEASE_SECONDS)
        try:
            if self._look()[0].get("owner") == self._owner:
                self._store.delete([self._name])
        except (StorageError, OSError) as error:
            self._say(
                f"warning: {self._store.url_of(self._name)} is not deleted ({error}); it runs out by itself"
            )

    def _has_changed(self, status: FileStatus) -> bool:
        """Whether the object does not keep this status for the time of a lease; one that goes away has not changed."""
        end = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < end:
            time.sleep(min(_LOOK_SECONDS, LEASE_SECONDS / 10))
            now = self._store.status(self._name)
            if now != status:
                return now is not None
        return False

    def _renew_until_ended(self) -> None:
        told = False
        while not self._ended.wait(RENEWAL_SECONDS):
            try:
                if not self._renew():
                    return
                told = False
            except (AceStepError, OSError) as error:
                if not told:
                    told = True
                    self._say(
                        f"warning: the lease of {self._store.url} cannot be renewed ({error}); trying again"
                    )

    def _renew(self) -> bool:
        """Write the object anew; False where it is somebody else's."""
        self._renewals += 1
        content = self._content()
        is_written = self._status is not None and self._store.exchange(self._name, content, self._status)
        if not is_written and not self._store.create(self._name, content):
            holder, self._status = self._look()
            if holder.get("owner") not in (None, self._owner):
                self._lost(f"{_described(holder)} has taken {self._store.url}")
                return False
            return True
        self._status = self._store.status(self._name)
        return True

    def _look(self) -> tuple[dict[str, Any], FileStatus | None]:
        """What the object says, and its status before that was read; nothing where there is none."""
        status = self._store.status(self._name)
        try:
            holder = json.loads(self._store.read_bytes(self._name))
        except (FileNotFoundError, ValueError):
            return {}, status
        return (holder if isinstance(holder, dict) else {}), status

    def _content(self) -> bytes:
        return json.dumps(
            {"owner": self._owner, "renewals": self._renewals, **_this_process()}, ensure_ascii=False
        ).encode()


def _this_process() -> dict[str, Any]:
    """Who this is, and by what somebody on the same machine can tell whether it is still there."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": _machine(),
        "started": _started("self"),
    }


def _machine() -> str | None:
    """This machine since it was booted, as far as its process ids reach; None where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int | str) -> str | None:
    """When a process of this machine was started, in its own ticks; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a holder was a process of this machine and is not there any more."""
    is_here = holder.get("machine") is not None and holder["machine"] == _machine()
    return is_here and _started(holder.get("pid", "")) != holder.get("started")


def _described(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
