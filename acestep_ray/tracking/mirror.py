"""A folder of logs in object storage: written on this machine, and copied there now and then."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from acestep_ray.errors import AceStepError
from acestep_ray.storage import Store
from acestep_ray.storage.folders import files_below

COPY_SECONDS = 30.0
"""Between copies: what a process loses that is killed."""

Say = Callable[[str], None]
_Version = tuple[int, int]


class Mirror:
    """A folder on this machine whose files are copied to object storage on a thread of its own.

    A file that has changed is copied whole, and one that is deleted is deleted there. Other files that lie there, such
    as those of an earlier process, are left alone. Storage that fails is told once, and tried again.
    """

    def __init__(self, store: Store, *, brought: Iterable[str] = (), say: Say = print):
        """Files named in `brought` are brought here first, where they are there."""
        self.folder = Path(tempfile.mkdtemp(prefix="acestep-ray-"))
        self._store = store
        self._say = say
        self._copied: dict[str, _Version] = {}
        self._is_told = False
        for name in brought:
            self._bring(name)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._copy_until_ended, name="logs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copy what is left, and forget the folder; where storage fails it stays, and is told."""
        self._ended.set()
        self._thread.join()
        if self._copy():
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self._say(f"warning: the last logs are not in {self._store.url}; they stay in {self.folder}")

    def _bring(self, name: str) -> None:
        try:
            self._store.download(name, self.folder / name)
        except FileNotFoundError:
            return
        except (AceStepError, OSError) as error:
            self._say(
                f"warning: {self._store.url_of(name)} cannot be read, and what is in it is left out ({error})"
            )
            return
        self._copied[name] = _version(self.folder / name)

    def _copy_until_ended(self) -> None:
        while not self._ended.wait(COPY_SECONDS):
            self._copy()

    def _copy(self) -> bool:
        """Copy what has changed; False where some of it could not be."""
        try:
            names = files_below(self.folder)
            for name in names:
                self._copy_file(name)
            for name in [name for name in self._copied if name not in names]:
                self._store.delete([name])
                del self._copied[name]
        except (AceStepError, OSError) as error:
            if not self._is_told:
                self._say(
                    f"warning: {self._store.url} takes no logs ({error}); "
                    f"training goes on, and they wait in {self.folder}"
                )
            self._is_told = True
            return False
        if self._is_told:
            self._say(f"{self._store.url} takes logs again: those that waited")
            self._is_told = False
        return True

    def _copy_file(self, name: str) -> None:
        path = self.folder / name
        try:
            version = _version(path)
            if self._copied.get(name) != version:
                self._store.upload(path, name)
                self._copied[name] = version
        except FileNotFoundError:
            if path.exists():
                raise
            # It was deleted meanwhile.


def _version(path: Path) -> _Version:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
