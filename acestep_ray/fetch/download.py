"""Files over HTTP: whole and with the sum that they should have, or not at all; what a broken download left is used."""

from __future__ import annotations

import email.utils
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from huggingface_hub import get_session
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from acestep_ray.errors import AceStepError, InputError
from acestep_ray.fetch.progress import Progress
from acestep_ray.models.fingerprints import file_sha256

PART_SUFFIX = ".part"
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 10
# Besides all of 500 and above: the server asks for another try.
_PASSING = (408, 425, 429)
_LONGEST_RETRY_AFTER = 600.0
_GOES_ON = "run the same command again: it goes on where it stopped"

Result = TypeVar("Result")


class NotPublishedError(AceStepError):
    """The server has no file at this address."""


class StoppedError(AceStepError):
    """`Downloader.stop` was called."""


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for, and how often it is asked again."""

    stall_seconds: float = 30.0
    """A connection that brings no byte for so long is given up, and another one made."""
    attempts: int = 6
    """In a row and without a new byte; then the download fails."""
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 60.0
    """Between two attempts, unless the server asks for more."""


@dataclass(frozen=True)
class Content:
    """What is known of a file before it is there."""

    size: int | None = None
    """Bytes."""
    sha256: str | None = None
    """In hex."""
    git_blob: str | None = None
    """Its id in git, in hex: the Hub publishes it of files that are too small for a SHA-256."""

    @property
    def has_sum(self) -> bool:
        return self.sha256 is not None or self.git_blob is not None

    def mismatch(self, path: Path) -> str | None:
        """The sum that the file at `path` has and the one that it should have; None where they agree."""
        if self.size is not None and (size := path.stat().st_size) != self.size:
            return f"{size} bytes and not {self.size}"
        if self.sha256 is not None and (sha256 := file_sha256(path)) != self.sha256:
            return f"SHA-256 {sha256} and not {self.sha256}"
        if self.git_blob is not None and (git_blob := _git_blob(path)) != self.git_blob:
            return f"git's id {git_blob} and not {self.git_blob}"
        return None


@dataclass(frozen=True)
class Described:
    """What a server tells of a file without sending it."""

    content: Content
    commit: str | None
    """Of the Hub's repository that the file is in; None from other servers."""


class Downloader:
    """Makes requests and asks again after what passes; any number of threads may use one.

    `token` goes to the server of `token_for` alone, never to where that one redirects.
    """

    def __init__(
        self, *, token: str | None = None, token_for: str | None = None, patience: Patience | None = None
    ):
        self._token = token
        self._token_origin = None if token_for is None else _origin(token_for)
        self._patience = patience or Patience()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let every download end at once with `StoppedError`; parts stay."""
        self._stopped.set()

    def describe(self, url: str, say: Callable[[str], None]) -> Described:
        """Size and sums of a file. Raises `NotPublishedError` where there is none, else `AceStepError`."""
        return self._persistently(url, lambda: self._describe(url), lambda: 0, say)

    def download(self, url: str, path: Path, content: Content, progress: Progress) -> None:
        """Bring a file to `path`, whole.

        Until then its bytes are in `PATH.part`, where also a killed process's are found again. Raises `AceStepError`
        where the server keeps failing, the disk fails, or the file is not the one that it should be; that one is
        deleted.
        """
        part = path.with_name(path.name + PART_SUFFIX)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._persistently(
                url,
                lambda: self._append(url, part, content.size, progress),
                lambda: _size(part),
                progress.say,
            )
            with part.open("rb") as file:
                os.fsync(file.fileno())
            mismatch = content.mismatch(part)
            if mismatch is None:
                os.replace(part, path)
                return
            part.unlink()
        except OSError as error:
            raise AceStepError(f"cannot write {part}: {error}\n  → mend it, then {_GOES_ON}") from error
        raise AceStepError(
            f"{shown(url)} came with {mismatch}; the file was deleted\n"
            "  → run the same command again; if it says so again, what is published there has changed"
        )

    def _describe(self, url: str) -> Described:
        # Some servers sign addresses for GET alone.
        for method, headers in (("HEAD", {}), ("GET", {"Range": "bytes=0-0"})):
            with self._answer(method, url, headers, ends_at="x-linked-size") as response:
                if method == "HEAD" and response.status_code in (400, 403, 405, 501):
                    continue
                if "x-linked-size" not in response.headers:
                    _check_status(response, url)
                return _described(response)
        raise AssertionError("the second answer returns or raises")

    def _append(self, url: str, part: Path, size: int | None, progress: Progress) -> None:
        """Add to `part` what it lacks, and nothing past `size`."""
        start = _size(part)
        if start == size:
            return
        with self._answer("GET", url, {"Range": f"bytes={start}-"} if start else {}) as response:
            if response.status_code == 416 and start:
                if size is None:  # nothing is left to send
                    return
                progress.add(-start)
                part.unlink()
                raise _PassingError("it is shorter there than what was downloaded of it")
            _check_status(response, url)
            resumes = response.status_code == 206 and _first_byte(response) == start
            if response.status_code == 206 and not resumes and start:
                raise _PassingError("the server sends another part of it than it was asked for")
            with part.open("ab" if resumes else "wb") as file:
                if not resumes:
                    progress.add(-start)
                    start = 0
                for block in response.iter_raw():
                    self._check_running()
                    block = block[: size - start] if size is not None else block
                    file.write(block)
                    file.flush()
                    start += len(block)
                    progress.add(len(block))
                    if start == size:
                        return
        if size is not None:
            raise _PassingError(f"the connection ended after {start} of {size} bytes")

    @contextmanager
    def _answer(self, method: str, url: str, headers: Mapping[str, str], ends_at: str = "") -> Iterator[Any]:
        """The answer to a request, after redirects or the first one that has the header `ends_at`."""
        for _ in range(_MOST_REDIRECTS):
            self._check_running()
            sent = {"Accept-Encoding": "identity", **headers}
            if self._token is not None and _origin(url) == self._token_origin:
                sent["Authorization"] = f"Bearer {self._token}"
            with get_session().stream(
                method, url, headers=sent, follow_redirects=False, timeout=self._patience.stall_seconds
            ) as response:
                if response.status_code not in _REDIRECTS or ends_at in response.headers:
                    yield response
                    return
                target = urljoin(url, response.headers.get("Location", ""))
            schemes = ("https",) if urlsplit(url).scheme == "https" else ("http", "https")
            if urlsplit(target).scheme not in schemes:
                raise AceStepError(f"cannot download {shown(url)}: it redirects to {shown(target)}")
            url = target
        raise AceStepError(f"cannot download {shown(url)}: it redirects again and again")

    def _persistently(
        self,
        url: str,
        attempt: Callable[[], Result],
        reached: Callable[[], int],
        say: Callable[[str], None],
    ) -> Result:
        """What `attempt` returns, made again after what passes; attempts that get further are not counted."""
        failures, furthest = 0, reached()
        while True:
            retry_after = 0.0
            try:
                return attempt()
            except _PassingError as error:
                reason, retry_after = str(error), error.retry_after
            except OfflineModeIsEnabled:
                raise InputError(
                    f"cannot download {shown(url)}", where="$HF_HUB_OFFLINE is set", fix="unset it"
                ) from None
            except HTTPError as error:
                reason = str(error) or type(error).__name__
            failures = 1 if reached() > furthest else failures + 1
            furthest = max(furthest, reached())
            if failures >= self._patience.attempts:
                raise AceStepError(
                    f"cannot download {shown(url)}: {reason}, {failures} times in a row\n  → {_GOES_ON}"
                )
            wait = self._patience.first_wait_seconds * 2.0 ** (failures - 1)
            wait = max(min(wait, self._patience.longest_wait_seconds), min(retry_after, _LONGEST_RETRY_AFTER))
            say(f"{shown(url)}: {reason}; asked again in {wait:.0f} s")
            self._stopped.wait(wait)

    def _check_running(self) -> None:
        if self._stopped.is_set():
            raise StoppedError(f"the download was stopped\n  → {_GOES_ON}")


class _PassingError(Exception):
    """A failure that another attempt may not meet."""

    def __init__(self, reason: str, retry_after: float = 0.0):
        super().__init__(reason)
        self.retry_after = retry_after


def shown(url: str) -> str:
    """An address for messages: without name and password, and without the signature of a redirect's query."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _check_status(response: Any, url: str) -> None:
    """Raise what an answer's status means, unless it brings the file."""
    status = response.status_code
    if status in (200, 206):
        return
    told = f"the server answers {status} {response.reason_phrase}".rstrip()
    if status in _PASSING or status >= 500:
        raise _PassingError(told, _retry_after(response))
    if status in (404, 410):
        raise NotPublishedError(f"cannot download {shown(url)}: {told}\n  → nothing is published there")
    fix = _GOES_ON
    if status in (401, 403):
        fix = (
            "set HF_TOKEN to a token that may read it; a token that has ended is refused everywhere: unset it"
        )
    raise AceStepError(f"cannot download {shown(url)}: {told}\n  → {fix}")


def _retry_after(response: Any) -> float:
    """Seconds that the server asks to wait, given as such or as a date; 0 where it does not ask."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return max(0.0, date.timestamp() - time.time())


def _described(response: Any) -> Described:
    headers = response.headers
    commit = headers.get("X-Repo-Commit")
    size = headers.get("X-Linked-Size")
    if size is None and response.status_code == 206:
        size = headers.get("Content-Range", "").rpartition("/")[2]
    elif size is None:
        size = headers.get("Content-Length", "")
    # Of other servers than the Hub an entity tag can be anything.
    tag = headers.get("X-Linked-Etag") or headers.get("ETag") if commit is not None else None
    tag = (tag or "").removeprefix("W/").strip('"')
    content = Content(
        size=int(size) if size.isdigit() else None,
        sha256=tag if re.fullmatch("[0-9a-f]{64}", tag) else None,
        git_blob=tag if re.fullmatch("[0-9a-f]{40}", tag) else None,
    )
    return Described(content, commit)


def _first_byte(response: Any) -> int | None:
    """Where in the file a partial answer begins, which it must say."""
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _git_blob(path: Path) -> str:
    """The id that git gives a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
