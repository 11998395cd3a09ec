"""Directories and files on this machine or in object storage (`s3://`, `gs://`, `hf://`), behind one small class.

A file is written whole or not at all: a local one beside its place and then renamed, an object in one upload that only
its end makes visible. So what can be read was never half-written.

Credentials come from where the storage's own tools take them (environment, profile, instance role); other options of
the client from fsspec's configuration, such as FSSPEC_S3_ANON=true for a public bucket.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import posixpath
import re
import shutil
import stat
import tempfile
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.config import conf as fsspec_config

from acestep_ray.errors import AceStepError, InputError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)

_S3 = ("s3", "s3a")
# A file written through hf:// is a commit of its own; web servers take no files at all.
_READ_ONLY = ("hf", "http", "https")

# The extra of this project that brings the package behind a protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}

# An endpoint that does not answer is given up after half a minute, one that stalls in every answer after five.
_S3_CONFIG = {
    "connect_timeout": 5,
    "read_timeout": 20,
    "retries": {"mode": "standard", "total_max_attempts": 5},
    "max_pool_connections": 64,
}
_S3_READ_ATTEMPTS = 3

# What storage calls a mistake of its user, in its errors' codes and its client's classes.
_BAD_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "SSOTokenLoadError",
    "ProfileNotFound",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "DefaultCredentialsError",
    "RefreshError",
    "401",
}
_DENIED = {"AccessDenied", "AllAccessDisabled", "403"}
_PAST_THE_END = {"InvalidRange", "416"}
_NO_BUCKET = {"NoSuchBucket"}

_ONE_REQUEST_BYTES = 64 * 2**20
_BLOCK_BYTES = 4 * 2**20
_BLOCKS_KEPT = 8
_READ_BYTES = 2**16
_DELETED_AT_ONCE = 1000  # S3 takes no more keys in one request
_THREADS = 16

_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.tmp")


class StorageError(AceStepError):
    """Object storage could not be read or written, after its client's own retries."""


class AccessDeniedError(StorageError):
    """The credentials give no right to an object or a bucket."""


@dataclass(frozen=True, slots=True)
class FileStatus:
    """What is known of a file without reading it."""

    size: int
    """Bytes."""
    version: str
    """Changes when the content changes: times of a local file, the entity tag of an object."""


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a text is a URL (`protocol://…`), rather than a path on this machine."""
    return _URL.match(os.fspath(place)) is not None


@dataclass(frozen=True)
class Store:
    """A directory, local or in object storage. Names of files in it are relative, with `/` between their parts.

    Cheap to make, to send to other processes and to share between threads.

    Methods that read raise FileNotFoundError for what is not there, on object storage InputError where credentials
    or the bucket are missing, and StorageError for what else fails; on a local disk OSError.
    """

    url: str
    """Absolute path, or `protocol://bucket/prefix`; without a slash at the end."""

    @classmethod
    def at(cls, place: str | os.PathLike[str]) -> Store:
        """The directory at a path or URL; it need not exist. Raises InputError for a URL that cannot be used."""
        text = os.fspath(place)
        url = _URL.match(text)
        if url is None:
            return cls(os.path.abspath(text))
        protocol, rest = url[1].lower(), url[2]
        if protocol in ("file", "local"):
            return cls(os.path.abspath("/" + rest.lstrip("/")))
        if not rest.strip("/"):
            raise InputError("the URL names no bucket", where=text, fix=f"give {protocol}://BUCKET/FOLDER")
        store = cls(f"{protocol}://{rest.rstrip('/')}")
        _ = store.filesystem  # a missing package or an unknown protocol shows here
        return store

    @property
    def is_local(self) -> bool:
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
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """fsspec's client, shared by the threads of this process where it allows that."""
        protocol = self.protocol
        # The Hub's client keeps what it has listed in plain dicts.
        thread = threading.get_ident() if protocol == "hf" else None
        return _filesystem(protocol, os.getpid(), thread)

    def child(self, name: str) -> Store:
        """The directory `name` in this one."""
        return Store(self.url_of(name))

    def url_of(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}" if name else self.url

    def file(self, name: str) -> StoredFile:
        return StoredFile(self, name)

    def status(self, name: str) -> FileStatus | None:
        """Size and version of a file; None where there is no such file (a directory is none)."""
        if self.is_local:
            try:
                return _status_of_local(os.stat(self._local(name)))
            except (FileNotFoundError, NotADirectoryError):
                return None
        # Otherwise the Hub's client lists the whole folder, remembers it, and tells nothing of the content.
        options = {"expand_info": True, "refresh": True} if self.protocol == "hf" else {}
        try:
            with self._explained(name):
                info = self.filesystem.info(self.url_of(name), **options)
        except FileNotFoundError:
            return None
        return _status_of(info)

    def read_bytes(self, name: str) -> bytes:
        """The whole file, in one request."""
        if self.is_local:
            with open(self._local(name), "rb") as file:
                return file.read()
        with self._explained(name):
            if self.protocol == "hf":
                return _read_hub(self.filesystem, self.url_of(name))
            # Several at once take a request more, to learn the size first.
            options = {"max_concurrency": 1} if self.protocol in _S3 else {}
            return self.filesystem.cat_file(self.url_of(name), **options)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer where the file ends before; in one request."""
        assert start >= 0
        assert length >= 0
        if self.is_local:
            with open(self._local(name), "rb") as file:
                file.seek(start)
                return file.read(length)
        if length == 0:
            return b""
        url, end = self.url_of(name), start + length
        with self._explained(name):
            try:
                if self.protocol == "hf":
                    return _read_hub(self.filesystem, url, start, end)
                return self.filesystem.cat_file(url, start=start, end=end)
            except Exception as error:
                if _codes(error) & _PAST_THE_END:
                    return b""
                raise

    def open(self, name: str) -> BinaryIO:
        """The file for reading at any place; of an object, only the blocks that are asked for are fetched."""
        if self.is_local:
            return open(self._local(name), "rb")
        status = self.status(name)
        if status is None:
            raise _not_found(self.url_of(name))
        return io.BufferedReader(_ObjectReader(self, name, status.size), buffer_size=_READ_BYTES)

    def download(self, name: str, target: str | os.PathLike[str]) -> None:
        """Copy a file to a place on this machine, without holding it in memory."""
        if self.is_local:
            shutil.copyfile(self._local(name), target)
            return
        with self._explained(name):
            self.filesystem.get_file(self.url_of(name), os.fspath(target))

    @contextlib.contextmanager
    def writer(self, name: str) -> Iterator[BinaryIO]:
        """A file to write to; at the end it is there, whole. After an exception it is as it was before.

        What is written to object storage waits in a temporary file and is uploaded at the end, in several parts if
        it is large.
        """
        self._check_writable()
        if self.is_local:
            with _written_whole(Path(self._local(name))) as file:
                yield file
            return
        with tempfile.NamedTemporaryFile(prefix="acestep-ray-") as file:
            yield file
            file.flush()
            if os.path.getsize(file.name) <= _ONE_REQUEST_BYTES:
                self.write_bytes(name, Path(file.name).read_bytes())
                return
            with self._explained(name):
                self.filesystem.put_file(file.name, self.url_of(name))

    def write_bytes(self, name: str, content: Any) -> None:
        """Write a file whole, in one request where storage allows it. `content` is anything with a buffer."""
        self._check_writable()
        if self.is_local:
            with _written_whole(Path(self._local(name))) as file:
                file.write(content)
            return
        with self._explained(name):
            self.filesystem.pipe_file(self.url_of(name), bytes(content))

    def names(self, folder: str = "", suffix: str = "") -> dict[str, FileStatus]:
        """Every file in or below `folder`, by name relative to this store, sorted; empty where nothing is.

        Local folders that are links are not entered, and files that are being written are not listed.
        """
        if self.is_local:
            return dict(sorted(self._walk_local(folder, suffix)))
        filesystem = self.filesystem
        options = {"refresh": True} if self.protocol == "hf" else {}
        try:
            with self._explained(folder):
                found = filesystem.find(self.url_of(folder), detail=True, **options)
        except FileNotFoundError:
            return {}
        root = filesystem._strip_protocol(self.url).rstrip("/") + "/"
        names = ((path.removeprefix(root), _status_of(info)) for path, info in sorted(found.items()))
        return {
            name: status
            for name, status in names
            # A folder that is a file itself is listed as one.
            if status is not None and name != folder and name.endswith(suffix) and not name.endswith("/")
        }

    def move(self, name: str, new_name: str) -> None:
        """Rename a file: at once on a local disk, by a copy within object storage."""
        self._check_writable()
        if self.is_local:
            target = Path(self._local(new_name))
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._local(name), target)
            return
        with self._explained(name):
            self.filesystem.cp_file(self.url_of(name), self.url_of(new_name))
            self.filesystem.rm_file(self.url_of(name))

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; what is not there is no error. Local folders that are then empty go too."""
        self._check_writable()
        names = list(names)
        if self.is_local:
            for name in names:
                Path(self._local(name)).unlink(missing_ok=True)
            for folder in sorted({posixpath.dirname(name) for name in names}, key=len, reverse=True):
                while folder:
                    try:
                        os.rmdir(self._local(folder))
                    except OSError:
                        break
                    folder = posixpath.dirname(folder)
        elif self.protocol in _S3:
            remaining = iter(names)
            while some := list(islice(remaining, _DELETED_AT_ONCE)):
                self._delete_s3(some)
        else:
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(self._delete_one, names))

    def delete_unfinished(self) -> int:
        """Delete what writers left that were killed in the middle, and return how many such files there were.

        Local temporary files and unfinished multipart uploads of S3; other storage forgets them by itself. Only for
        a time when nothing writes to this store.
        """
        if self.is_local:
            paths = [
                os.path.join(directory, name)
                for directory, _, names in os.walk(self.url)
                for name in names
                if _UNFINISHED.fullmatch(name)
            ]
            for path in paths:
                Path(path).unlink(missing_ok=True)
            return len(paths)
        if self.protocol not in _S3:
            return 0
        with self._explained(""):
            filesystem = self.filesystem
            bucket, prefix, _ = filesystem.split_path(self.url)
            options = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
            count = 0
            while uploads := filesystem.call_s3("list_multipart_uploads", **options).get("Uploads"):
                for upload in uploads:
                    with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
                        filesystem.abort_mpu(bucket, upload["Key"], upload["UploadId"])
                count += len(uploads)
        return count

    def _local(self, name: str) -> str:
        return os.path.join(self.url, name)

    def _check_writable(self) -> None:
        if self.protocol in _READ_ONLY:
            raise InputError(
                f"{self.protocol}:// is read from, not written to",
                where=self.url,
                fix="write to a local directory, s3:// or gs://, and upload the finished files",
            )

    def _walk_local(self, folder: str, suffix: str) -> Iterator[tuple[str, FileStatus]]:
        for directory, _, files in os.walk(self._local(folder)):
            for file in files:
                if not file.endswith(suffix) or _UNFINISHED.fullmatch(file):
                    continue
                path = os.path.join(directory, file)
                with contextlib.suppress(FileNotFoundError):  # another process has deleted or renamed it
                    status = _status_of_local(os.stat(path))
                    if status is not None:
                        yield os.path.relpath(path, self.url), status

    def _delete_s3(self, names: list[str]) -> None:
        # s3fs takes names for patterns (`a[1].wav`), and does not tell what was not deleted.
        with self._explained(names[0]):
            filesystem = self.filesystem
            places = [filesystem.split_path(self.url_of(name)) for name in names]
            answer = filesystem.call_s3(
                "delete_objects",
                Bucket=places[0][0],
                Delete={"Objects": [{"Key": key} for _, key, _ in places], "Quiet": True},
            )
        for error in answer.get("Errors", []):
            raise StorageError(
                f"an object cannot be deleted ({error.get('Code')}: {error.get('Message')}): {error.get('Key')}"
            )

    def _delete_one(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._explained(name):
            self.filesystem.rm_file(self.url_of(name))

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Errors of the storage's client as those that the class promises."""
        try:
            yield
        except AceStepError:
            raise
        except Exception as error:  # every client has errors of its own
            raise _told(error, self.url_of(name), self.protocol) from error


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

    def status(self) -> FileStatus | None:
        return self.store.status(self.name)

    def read_bytes(self) -> bytes:
        return self.store.read_bytes(self.name)

    def open(self) -> BinaryIO:
        return self.store.open(self.name)

    @classmethod
    def at(cls, place: str | os.PathLike[str]) -> StoredFile:
        """The file at a path or URL. Raises InputError for a URL that cannot be used."""
        text = os.fspath(place)
        if not is_url(text) or text.lower().startswith(("file://", "local://")):
            folder, name = os.path.split(Store.at(text).url)
            return cls(Store(folder), name)
        folder, _, name = text.rpartition("/")
        if not name or folder.endswith("/"):
            raise InputError("the URL names no file", where=text)
        return cls(Store.at(folder), name)

    def __str__(self) -> str:
        return self.url


class _ObjectReader(io.RawIOBase):
    """An object as a file: fetched in blocks, of which the last few are kept."""

    def __init__(self, store: Store, name: str, size: int):
        self._store = store
        self._name = name
        self._size = size
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"position {start + offset} is before the start of the file")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._position >= self._size:
            return 0
        index, offset = divmod(self._position, _BLOCK_BYTES)
        part = self._block(index)[offset : offset + len(view)]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def readall(self) -> bytes:
        content = self._store.read_range(self._name, self._position, max(0, self._size - self._position))
        self._position += len(content)
        return content

    def _block(self, index: int) -> bytes:
        if index not in self._blocks:
            if len(self._blocks) == _BLOCKS_KEPT:
                self._blocks.popitem(last=False)
            self._blocks[index] = self._store.read_range(self._name, index * _BLOCK_BYTES, _BLOCK_BYTES)
        self._blocks.move_to_end(index)
        return self._blocks[index]


@lru_cache(maxsize=64)
def _filesystem(protocol: str, process: int, thread: int | None) -> fsspec.AbstractFileSystem:
    """A client; `process` and `thread` are those that may use it, since none survives a fork."""
    # Listings that are remembered would hide what other processes write.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in _S3:
        options["config_kwargs"] = {**_S3_CONFIG, **fsspec_config.get("s3", {}).get("config_kwargs", {})}
    try:
        filesystem = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        fix = f"pip install 'acestep-ray[{extra}]'" if extra else f"install its package ({error})"
        raise InputError(f"{protocol}:// needs a package that is not installed", fix=fix) from None
    except ValueError as error:
        raise InputError(f"unknown kind of storage ({error})", where=f"{protocol}://") from None
    if protocol in _S3:
        filesystem.retries = _S3_READ_ATTEMPTS
    return filesystem


def _read_hub(filesystem: Any, url: str, start: int | None = None, end: int | None = None) -> bytes:
    """A file of the Hub, or its bytes from `start` to before `end`; the client itself would list the folder first."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    place = filesystem.resolve_path(url)
    if not hasattr(place, "repo_id"):  # a storage bucket, not a repository
        return filesystem.cat_file(url, start=start, end=end)
    address = hf_hub_url(
        place.repo_id,
        place.path_in_repo,
        repo_type=place.repo_type,
        revision=place.revision,
        endpoint=filesystem.endpoint,
    )
    headers = build_hf_headers(token=filesystem.token)
    if start is not None and end is not None:
        headers["Range"] = f"bytes={start}-{end - 1}"
    response = http_backoff("GET", address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    hf_raise_for_status(response)
    return response.content


def _status_of_local(status: os.stat_result) -> FileStatus | None:
    if not stat.S_ISREG(status.st_mode):
        return None
    return FileStatus(status.st_size, f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}")


def _status_of(info: dict[str, Any]) -> FileStatus | None:
    """Status from what a client tells of a file; None for a directory."""
    if info["type"] != "file":
        return None
    names = ("ETag", "etag", "blob_id", "xet_hash", "generation", "created", "mtime", "LastModified")
    tag = next((info[name] for name in names if info.get(name)), "")
    if isinstance(tag, datetime):  # listings have it as a number
        tag = tag.timestamp()
    return FileStatus(info["size"], f"{info['size']}-{tag}".replace('"', ""))


def _codes(error: BaseException) -> set[str]:
    """What an error and its causes are called: classes, codes of S3, statuses of HTTP."""
    codes: set[str] = set()
    seen: BaseException | None = error
    while seen is not None:
        codes.add(type(seen).__name__)
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            codes.add(str(response.get("Error", {}).get("Code")))
        codes |= {str(getattr(response, "status_code", None)), str(getattr(seen, "code", None))}
        seen = seen.__cause__
    return codes


def _told(error: Exception, url: str, protocol: str) -> Exception:
    """The error that a user is told for one of a storage's client."""
    codes = _codes(error)
    if codes & _BAD_CREDENTIALS:
        return InputError(
            f"object storage does not take the credentials ({error})",
            where=url,
            fix=_credentials_fix(protocol),
        )
    if codes & _NO_BUCKET:
        return InputError("the bucket does not exist", where=url, fix="create it, or correct its name")
    if isinstance(error, FileNotFoundError) or "404" in codes:
        return _not_found(url)
    if codes & _DENIED:
        return AccessDeniedError(
            f"object storage denies access ({error}): {url}\n"
            "  → the credentials need the right to list, read and, for an output, write and delete there"
        )
    return StorageError(f"object storage failed ({type(error).__name__}: {error}): {url}")


def _not_found(url: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)


def _credentials_fix(protocol: str) -> str:
    if protocol in _S3:
        return (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role, on every node; "
            "FSSPEC_S3_ANON=true for a public bucket"
        )
    if protocol in ("gs", "gcs"):
        return (
            "set GOOGLE_APPLICATION_CREDENTIALS on every node, or run `gcloud auth application-default login`"
        )
    if protocol == "hf":
        return "set HF_TOKEN on every node to a token that may read the repository"
    return "give the storage's credentials as its own tools take them, on every node"


def _flush_folder(folder: Path) -> None:
    """Make the names in a local folder survive a loss of power, where its system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders, some network file systems flush none
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _flush_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)
