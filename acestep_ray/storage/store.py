"""Directories on this machine or in object storage, behind one small class."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import posixpath
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import fsspec

from acestep_ray.errors import InputError
from acestep_ray.hidden_secrets import holds_secret, without_secrets
from acestep_ray.paths import expand_home, path_of_file_uri
from acestep_ray.plain_files import Limit, open_regular, read_limited
from acestep_ray.storage.clients import filesystem_of, read_hub, tried
from acestep_ray.storage.errors import S3, StorageError, is_past_the_end, not_found
from acestep_ray.storage.files import (
    FileStatus,
    ObjectReader,
    delete_if_abandoned,
    delete_local,
    status_of,
    status_of_local,
    unfinished_below,
    walk,
    written_whole,
)
from acestep_ray.storage.s3 import (
    ConditionFailedError,
    NoConditionsError,
    abort_uploads,
    conditional,
    delete_objects,
    read_if_same,
    write_if_same,
)
from acestep_ray.storage.scratch import scratch_folder

if TYPE_CHECKING:
    from acestep_ray.storage.stored_file import StoredFile

Made = TypeVar("Made")

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)

# A file written through hf:// is a commit of its own; web servers take no files at all.
_READ_ONLY = ("hf", "http", "https")
# Their URLs name buckets, and the addresses of web servers are compared at each connection.
_NO_STORAGE = {
    *("async_wrapper", "asyncwrapper", "blockcache", "cached", "data", "dir", "filecache", "generic", "git"),
    *("github", "gitlab", "libarchive", "reference", "lazy-reference", "simplecache", "tar", "zip"),
}
"""fsspec's clients that take another URL from within the first, or are no place for files."""
_OBJECTS = (*S3, "gs", "gcs", "hf", "http", "https", "memory")

_ONE_REQUEST_BYTES = 64 * 2**20
_READ_BYTES = 2**16
_DOWNLOADED_AT_ONCE = 16 * 2**20
_DOWNLOADS = 4
# From a web server, which may claim any size.
_LARGEST_DOWNLOAD = 64 << 30
_THREADS = 16


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a text is a URL (`protocol://…`), rather than a path on this machine."""
    return _URL.match(os.fspath(place)) is not None


@dataclass(frozen=True)
class Store:
    """A directory, local or in object storage. Names of files in it are relative, with `/` between their parts.

    Cheap to make, to send to other processes and to share between threads.

    Methods that read raise FileNotFoundError for what is not there, on object storage InputError where credentials
    or the bucket are missing, and StorageError for what else fails, after some attempts; on a local disk OSError.
    """

    url: str
    """Absolute path, or `protocol://bucket/prefix`; without a slash at the end."""

    @classmethod
    def at(cls, place: str | os.PathLike[str] | Store) -> Store:
        """The directory at a path or URL; it need not exist. Raises InputError for a URL that cannot be used."""
        if isinstance(place, Store):
            return place
        text = os.fspath(place)
        url = _URL.match(text)
        if url is None:
            return cls(os.path.abspath(expand_home(text)))
        protocol, rest = url[1].lower(), url[2]
        if protocol in ("file", "local"):
            return cls(os.path.abspath(path_of_file_uri(text)))
        if not rest.strip("/"):
            raise InputError("the URL names no bucket", where=text, fix=f"give {protocol}://BUCKET/FOLDER")
        is_of_storage = protocol in (*S3, "gs", "gcs", "http", "https")
        if holds_secret(text) or (is_of_storage and "@" in rest.partition("/")[0]):
            raise InputError(
                "credentials do not belong into a URL, which is shown and written down",
                where=without_secrets(text),
                fix="give them in the environment, as the storage's own tools take them",
            )
        if protocol in _NO_STORAGE:
            raise InputError("unknown kind of storage (it reads through others)", where=f"{protocol}://")
        if protocol not in _OBJECTS:
            from acestep_ray.storage.http import check_machine

            check_machine(protocol, text)
        store = cls(f"{protocol}://{rest.rstrip('/')}")
        _ = store.filesystem  # a missing package or an unknown protocol shows here
        return store

    @property
    def is_local(self) -> bool:
        """Whether it is a directory on this machine."""
        return self.protocol == "file"

    @property
    def protocol(self) -> str:
        """`s3`, `gs`, `hf`, …; `file` for a directory on this machine."""
        url = _URL.match(self.url)
        return "file" if url is None else url[1]

    @property
    def path(self) -> Path:
        """The local directory."""
        assert self.is_local, f"{self.url} is not on this machine"
        return Path(self.url)

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return posixpath.basename(self.url)

    @property
    def parent(self) -> Store:
        """The directory that this one is in."""
        return Store(posixpath.dirname(self.url))

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """fsspec's client, shared by the threads of this process where it allows that."""
        protocol = self.protocol
        # The Hub's client keeps what it has listed in plain dicts.
        thread = threading.get_ident() if protocol == "hf" else None
        return filesystem_of(protocol, os.getpid(), thread)

    def child(self, name: str) -> Store:
        """The directory `name` in this one."""
        return Store(self.url_of(name))

    def url_of(self, name: str) -> str:
        """The absolute path or URL of a file; of the empty name, of the directory itself."""
        return f"{self.url.rstrip('/')}/{name}" if name else self.url

    def place_of(self, name: str) -> Path | str:
        """A local file's path, or the URL of an object."""
        return Path(self.url_of(name)) if self.is_local else self.url_of(name)

    def file(self, name: str) -> StoredFile:
        """A file of this directory, there or not."""
        from acestep_ray.storage.stored_file import StoredFile

        return StoredFile(self, name)

    def status(self, name: str) -> FileStatus | None:
        """Size and version of a file; None where there is no such file (a directory is none)."""
        if self.is_local:
            try:
                return status_of_local(os.stat(self._local(name)))
            except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for NUL in a name
                return None
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
                    return None
                raise
        # Otherwise the Hub's client lists the whole folder, remembers it, and tells nothing of the content.
        options = {"expand_info": True, "refresh": True} if self.protocol == "hf" else {}
        try:
            return status_of(self._tried(name, lambda: self.filesystem.info(self.url_of(name), **options)))
        except FileNotFoundError:
            return None

    def read_bytes(self, name: str, limit: Limit | None = None) -> bytes:
        """The whole file, in one request. Raises OSError where it is larger than `limit`."""
        if limit is not None:
            return self._read_limited(name, limit)
        if self.is_local:
            with open_regular(self._local(name)) as file:
                return file.read()
        if self.protocol == "hf":
            return self._tried(name, lambda: read_hub(self.filesystem, self.url_of(name)))
        # Several at once take a request more, to learn the size first.
        options = {"max_concurrency": 1} if self.protocol in S3 else {}
        return self._tried(name, lambda: self.filesystem.cat_file(self.url_of(name), **options))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer where the file ends before; in one request."""
        assert start >= 0
        assert length >= 0
        if self.is_local:
            with open_regular(self._local(name)) as file:
                file.seek(start)
                return file.read(length)
        if length == 0:
            return b""
        return self._tried(name, lambda: self._read_range(name, start, start + length))

    def open(self, name: str) -> BinaryIO:
        """The file for reading at any place; of an object, only the blocks that are asked for are fetched.

        Reading raises StorageError where the object is replaced meanwhile, on storage that can tell (S3).
        """
        if self.is_local:
            return open_regular(self._local(name))
        status = self._status_of_object(name)
        reader = ObjectReader(lambda start, length: self._read_same(name, status, start, length), status.size)
        return io.BufferedReader(reader, buffer_size=_READ_BYTES)

    def download(self, name: str, target: str | os.PathLike[str]) -> None:
        """Copy a file to a place on this machine, whole or not at all, without holding it in memory."""
        if self.is_local:
            with open_regular(self._local(name)) as source, written_whole(Path(target)) as file:
                while some := source.read(_DOWNLOADED_AT_ONCE):
                    file.write(some)
            return
        status = self._status_of_object(name)
        if self.protocol in ("http", "https") and status.size > _LARGEST_DOWNLOAD:
            raise StorageError(f"a file of {status.size:,} bytes is not downloaded: {self.url_of(name)}")
        with written_whole(Path(target)) as file, ThreadPoolExecutor(_DOWNLOADS) as pool:

            def fetch(start: int) -> None:
                os.pwrite(file.fileno(), self._read_same(name, status, start, _DOWNLOADED_AT_ONCE), start)

            list(pool.map(fetch, range(0, status.size, _DOWNLOADED_AT_ONCE)))

    @contextlib.contextmanager
    def writer(self, name: str) -> Iterator[BinaryIO]:
        """A file to write to; at the end it is there, whole. After an exception it is as it was before.

        What is written to object storage waits in a temporary file and is uploaded at the end, in several parts if
        it is large.
        """
        self.check_writable()
        if self.is_local:
            with written_whole(Path(self._local(name))) as file:
                yield file
            return
        with scratch_folder() as folder:
            with open(folder / "content", "w+b") as file:
                yield file
            self.upload(folder / "content", name)

    def upload(self, source: str | os.PathLike[str], name: str) -> None:
        """Write a file with the content of one on this machine; whole, in several parts if it is large."""
        self.check_writable()
        if self.is_local or os.path.getsize(source) <= _ONE_REQUEST_BYTES:
            self.write_bytes(name, Path(source).read_bytes())
        else:
            self._tried(name, lambda: self.filesystem.put_file(os.fspath(source), self.url_of(name)))

    def write_bytes(self, name: str, content: Any) -> None:
        """Write a file whole, in one request where storage allows it. `content` is anything with a buffer."""
        self.check_writable()
        if self.is_local:
            with written_whole(Path(self._local(name))) as file:
                file.write(content)
            return
        content = bytes(content)
        self._tried(name, lambda: self.filesystem.pipe_file(self.url_of(name), content))

    def create(self, name: str, content: bytes) -> bool:
        """Write a small object unless there is one; False where there is. Not for local files.

        Of several at a time one succeeds, on storage that knows conditions. After an answer that was lost it may say
        False of what this call has written.
        """
        request = partial(self.filesystem.pipe_file, self.url_of(name), content, mode="create")
        try:
            self._tried(name, lambda: conditional(request))
        except ConditionFailedError:
            return False
        except NoConditionsError:
            if self.status(name) is not None:
                return False
            self.write_bytes(name, content)
        return True

    def exchange(self, name: str, content: bytes, expected: FileStatus) -> bool:
        """Write a small object that still has this status; False where it has not. Not for local files.

        S3 compares and writes at once; other storage is asked for the status before.
        """
        if self.protocol in S3:
            request = partial(write_if_same, self.filesystem, self.url_of(name), content, expected)
            with contextlib.suppress(NoConditionsError):
                try:
                    self._tried(name, lambda: conditional(request))
                except (ConditionFailedError, FileNotFoundError):
                    return False
                return True
        if self.status(name) != expected:
            return False
        self.write_bytes(name, content)
        return True

    def names(self, folder: str = "", suffix: str = "") -> dict[str, FileStatus]:
        """Every file in or below `folder`, by name relative to this store, sorted; empty where nothing is.

        Local folders that are links are not entered, and files that are being written are not listed.
        """
        if self.is_local:
            return dict(sorted(walk(self.path, folder, suffix)))
        filesystem = self.filesystem
        options = {"refresh": True} if self.protocol == "hf" else {}
        try:
            found = self._tried(folder, lambda: filesystem.find(self.url_of(folder), detail=True, **options))
        except FileNotFoundError:
            return {}
        root = filesystem._strip_protocol(self.url).rstrip("/") + "/"
        names = ((path.removeprefix(root), status_of(info)) for path, info in sorted(found.items()))
        return {
            name: status
            for name, status in names
            # A folder that is a file itself is listed as one.
            if status is not None and name != folder and name.endswith(suffix) and not name.endswith("/")
        }

    def move(self, name: str, new_name: str) -> None:
        """Rename a file: at once on a local disk, by a copy within object storage."""
        self.check_writable()
        if self.is_local:
            target = Path(self._local(new_name))
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._local(name), target)
            return
        self._tried(name, lambda: self.filesystem.cp_file(self.url_of(name), self.url_of(new_name)))
        self._tried(name, lambda: self.filesystem.rm_file(self.url_of(name)))

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; what is not there is no error. Local folders that are then empty go too."""
        self.check_writable()
        names = list(names)
        if self.is_local:
            delete_local(self.path, names)
        elif self.protocol in S3:
            delete_objects(self.filesystem, map(self.url_of, names), self.protocol)
        else:
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(self._delete_one, names))

    def delete_unfinished(self) -> int:
        """Delete what writers left that were killed in the middle, and return how many such files there were.

        Local temporary files, but those of living processes, and unfinished multipart uploads of S3; other storage
        deletes them automatically. Only for a time when nothing writes to this store.
        """
        if self.is_local:
            paths = unfinished_below(self.path)
            return sum(map(delete_if_abandoned, paths))
        return abort_uploads(self.filesystem, self.url, self.protocol) if self.protocol in S3 else 0

    def check_writable(self) -> None:
        """Raise InputError for storage that is only read."""
        if self.protocol in _READ_ONLY:
            raise InputError(
                f"{self.protocol}:// is read from, not written to",
                where=self.url,
                fix="write to a local directory, s3:// or gs://, and upload the finished files",
            )

    def _local(self, name: str) -> str:
        return os.path.join(self.url, name)

    def _read_limited(self, name: str, limit: Limit) -> bytes:
        if self.is_local:
            return read_limited(self._local(name), limit)
        content = self._tried(name, lambda: self._read_range(name, 0, limit.size + 1))
        if len(content) > limit.size:
            raise limit.error(self.url_of(name))
        return content

    def _status_of_object(self, name: str) -> FileStatus:
        status = self.status(name)
        if status is None:
            raise not_found(self.url_of(name))
        return status

    def _read_range(self, name: str, start: int, end: int, status: FileStatus | None = None) -> bytes:
        """Bytes of an object; on S3, where a status is given, of the object that still has it."""
        url, filesystem = self.url_of(name), self.filesystem
        try:
            if self.protocol == "hf":
                return read_hub(filesystem, url, start, end)
            if self.protocol in S3 and status is not None:
                return read_if_same(filesystem, url, start, end, status)
            return filesystem.cat_file(url, start=start, end=end)
        except Exception as error:
            if is_past_the_end(error):
                return b""
            raise

    def _read_same(self, name: str, status: FileStatus, start: int, length: int) -> bytes:
        """Bytes of the object that had this status, as many as it has there."""
        end = min(start + length, status.size)
        if end <= start:
            return b""
        try:
            content = self._tried(
                name, lambda: conditional(lambda: self._read_range(name, start, end, status))
            )
        except ConditionFailedError:
            content = b""
        if len(content) != end - start:
            raise StorageError(f"the object was replaced while it was read: {self.url_of(name)}")
        return content

    def _delete_one(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._tried(name, lambda: self.filesystem.rm_file(self.url_of(name)))

    def _tried(self, name: str, action: Callable[[], Made]) -> Made:
        return tried(action, self.url_of(name), self.protocol)
