"""One file on this machine or in object storage."""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from acestep_ray.errors import InputError
from acestep_ray.paths import expand_home
from acestep_ray.plain_files import Limit
from acestep_ray.storage.files import FileStatus
from acestep_ray.storage.store import Store, is_url


@dataclass(frozen=True)
class StoredFile:
    """One file of a store."""

    store: Store
    name: str

    @property
    def url(self) -> str:
        """Absolute path or URL."""
        return self.store.url_of(self.name)

    @property
    def suffix(self) -> str:
        """With its dot, in lower case."""
        return posixpath.splitext(self.name)[1].lower()

    @property
    def local_path(self) -> Path | None:
        """Where the file lies on this machine; None for an object."""
        return Path(self.url) if self.store.is_local else None

    @property
    def path(self) -> Path:
        """Of a file on this machine."""
        return self.store.path / self.name

    def status(self) -> FileStatus | None:
        return self.store.status(self.name)

    def read_bytes(self, limit: Limit | None = None) -> bytes:
        return self.store.read_bytes(self.name, limit)

    def open(self) -> BinaryIO:
        return self.store.open(self.name)

    @classmethod
    def at(cls, place: str | os.PathLike[str]) -> StoredFile:
        """The file at a path or URL. Raises InputError for a URL that cannot be used."""
        text = expand_home(os.fspath(place))
        if not is_url(text) or text.lower().startswith(("file://", "local://")):
            folder, name = os.path.split(Store.at(text).url)
            return cls(Store(folder), name)
        folder, _, name = text.rpartition("/")
        if not name or folder.endswith("/"):
            raise InputError("the URL names no file", where=text)
        return cls(Store.at(folder), name)

    def __str__(self) -> str:
        return self.url
