"""`acestep-ray checkpoint fetch`: the released checkpoint, the SSL models and the lyric vocabulary in one directory."""

from __future__ import annotations

import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

from filelock import FileLock, Timeout
from huggingface_hub import constants, get_token

from acestep_ray.errors import InputError
from acestep_ray.fetch.download import PART_SUFFIX, Content, Downloader, Patience, shown
from acestep_ray.fetch.pins import PinnedModel, file_url, newest, read_pins, with_sha256, write_pins
from acestep_ray.fetch.progress import Progress
from acestep_ray.hints import one_of
from acestep_ray.models.checkpoint import (
    ACE_STEP_V1,
    LYRIC_VOCAB,
    LYRIC_VOCAB_VARIABLE,
    PARTS,
    CheckpointDir,
    Release,
)
from acestep_ray.models.fingerprints import noted_sha256
from acestep_ray.paths import expand_home
from acestep_ray.storage import Store
from acestep_ray.terminal import fact_table
from acestep_ray.units import size_text

LYRIC_PART = "lyric_vocab"
PART_NAMES = (*PARTS, LYRIC_PART)
DEFAULT_JOBS = 4

_RUNNING = ".fetch.lock"
# Room that a disk keeps for what else is written to it.
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class FetchSummary:
    """What was downloaded, and what was there already."""

    directory: str
    downloaded: list[str]
    kept: list[str]
    num_bytes: int
    """Of what was downloaded, also by runs that were broken off."""
    revisions: dict[str, str]
    """Commit of each repository."""
    wall_seconds: float

    def render(self) -> str:
        """The summary as a few lines of text."""
        return fact_table(
            [
                ("checkpoint", self.directory),
                (
                    "downloaded",
                    f"{len(self.downloaded)} files, {size_text(self.num_bytes)}, every sum is right",
                ),
                ("was there", f"{len(self.kept)} files, every sum is right"),
                *(("revision", f"{name} {revision}") for name, revision in self.revisions.items()),
                ("took", f"{self.wall_seconds:,.0f} s"),
            ]
        )


@dataclass(frozen=True)
class WantedFile:
    """A file of the directory, where it is published, and what it should be."""

    name: str
    """Relative to the directory."""
    url: str
    content: Content


def fetch_checkpoint(
    directory: str | Path,
    *,
    mirror: str | None = None,
    only: str | None = None,
    jobs: int = DEFAULT_JOBS,
    release: Release = ACE_STEP_V1,
    patience: Patience | None = None,
    stream: TextIO | None = None,
) -> FetchSummary:
    """Download a released checkpoint into `directory`, about 10 GB, `jobs` files at a time.

    A file that is there with the right sum is left alone; what a broken or killed run has of a file is gone on with.
    Files come from `mirror`, by default from $HF_ENDPOINT or huggingface.co, the lyric vocabulary from GitHub. The
    token of the Hub ($HF_TOKEN, `hf auth login`) is not sent to a mirror. `only` names parts, with commas between
    them. Progress goes to `stream` (standard error).

    Raises InputError for a mistake in the arguments and a disk that is too small, AceStepError where a server keeps
    failing or sends other files than it should.
    """
    started = time.monotonic()
    parts = _chosen_parts(only)
    endpoint = _endpoint(mirror)
    if jobs < 1:
        raise InputError("must be at least 1", where=f"--jobs {jobs}")
    root = Path(expand_home(os.fspath(directory)))
    token = get_token() if mirror is None else None
    downloader = Downloader(token=token, token_for=endpoint, patience=patience)
    progress = Progress(stream if stream is not None else sys.stderr)
    with _alone(root):
        pins = read_pins(root, release)
        for folder, repository in release.ssl_repositories.items():
            if _part_of(folder) in parts and folder not in pins:
                pins[folder] = newest(repository, endpoint, downloader, progress.say)
        write_pins(root, pins)
        wanted = [
            file
            for file in _wanted_files(release, pins, endpoint)
            if _part_of(file.name.partition("/")[0]) in parts
        ]
        _copy_lyric_vocab(root, wanted)
        missing = [file for file in wanted if not _is_right(root / file.name, file.content, progress.say)]
        missing = [_with_size(file, downloader, progress.say) for file in missing]
        _check_space(root, missing)
        _download_all(root, missing, downloader, progress, jobs)
        for folder, model in pins.items():
            if _part_of(folder) in parts:
                pins[folder] = with_sha256(root / folder, model)
        write_pins(root, pins)
    if set(parts) == set(PART_NAMES):
        CheckpointDir.open(root)
    return FetchSummary(
        directory=str(root),
        downloaded=[file.name for file in missing],
        kept=[file.name for file in wanted if file.name not in {file.name for file in missing}],
        num_bytes=sum((root / file.name).stat().st_size for file in missing),
        revisions={
            release.repository: release.revision,
            **{model.repository: model.revision for model in pins.values()},
        },
        wall_seconds=time.monotonic() - started,
    )


def _chosen_parts(only: str | None) -> tuple[str, ...]:
    if only is None:
        return PART_NAMES
    parts = tuple(part.strip() for part in only.split(","))
    unknown = [part for part in parts if part not in PART_NAMES]
    if unknown:
        raise InputError(
            f"no such part: {', '.join(map(repr, unknown))}",
            where=f"--only {only}",
            fix=f"{one_of(unknown[0], PART_NAMES)}; several with commas between them",
        )
    return parts


def _part_of(folder: str) -> str:
    """The part that lies in a folder of the directory."""
    return next((part for part, place in PARTS.items() if place == folder), LYRIC_PART)


def _endpoint(mirror: str | None) -> str:
    endpoint = constants.ENDPOINT if mirror is None else mirror
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        where = (
            f"--mirror {shown(endpoint)}" if mirror is not None else f"{shown(endpoint)} (from $HF_ENDPOINT)"
        )
        raise InputError("not the address of a server", where=where, fix="give https://HOST")
    return endpoint.rstrip("/")


def _wanted_files(release: Release, pins: Mapping[str, PinnedModel], endpoint: str) -> Iterator[WantedFile]:
    for name, sha256 in release.files.items():
        url = file_url(endpoint, release.repository, release.revision, name)
        yield WantedFile(name, url, Content(sha256=sha256))
    yield WantedFile(LYRIC_VOCAB, release.lyric_vocab_url, Content(sha256=release.lyric_vocab_sha256))
    for folder, model in pins.items():
        for name, content in model.files.items():
            url = file_url(endpoint, model.repository, model.revision, name)
            yield WantedFile(f"{folder}/{name}", url, content)


def _with_size(file: WantedFile, downloader: Downloader, say: Callable[[str], None]) -> WantedFile:
    if file.content.size is not None:
        return file
    size = downloader.describe(file.url, say).content.size
    return replace(file, content=replace(file.content, size=size))


def _is_right(path: Path, content: Content, say: Callable[[str], None]) -> bool:
    """Whether the file is there already; one that is another is told, and will be replaced."""
    if not path.is_file():
        return False
    if content.size in (None, path.stat().st_size) and content.sha256 is not None:
        is_right = noted_sha256(path) == content.sha256
    else:
        is_right = content.mismatch(path) is None
    if not is_right:
        say(f"{path} is not the released file: downloaded anew")
    return is_right


def _copy_lyric_vocab(root: Path, wanted: Sequence[WantedFile]) -> None:
    """Take the lyric vocabulary from $ACESTEP_LYRIC_VOCAB, where that is it: a mirror of the Hub does not have it."""
    elsewhere = os.environ.get(LYRIC_VOCAB_VARIABLE)
    content = next((file.content for file in wanted if file.name == LYRIC_VOCAB), None)
    if not elsewhere or content is None or (root / LYRIC_VOCAB).is_file():
        return
    source = Path(expand_home(elsewhere))
    if source.is_file() and content.mismatch(source) is None:
        Store.at(root).write_bytes(LYRIC_VOCAB, source.read_bytes())


def _check_space(root: Path, missing: Sequence[WantedFile]) -> None:
    """Raise InputError where the disk does not take what is missing."""
    needed = 0
    for file in missing:
        part = root / f"{file.name}{PART_SUFFIX}"
        needed += max(0, (file.content.size or 0) - (part.stat().st_size if part.exists() else 0))
    free = shutil.disk_usage(root).free
    if needed and needed + _SPARE_BYTES > free:
        raise InputError(
            f"not enough space on the disk: {size_text(needed)} are to be downloaded, {size_text(free)} are free",
            where=str(root.resolve()),
            fix="make room, or give a directory on a larger disk; --only downloads some parts",
        )


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """The directory, made and for this process alone. Raises InputError where another one downloads into it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / _RUNNING)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            "another process downloads into this directory", where=str(root), fix="wait for its end"
        ) from None
    except OSError as error:
        raise InputError(f"cannot write here ({error})", where=str(root)) from None
    try:
        yield
    finally:
        lock.release()


def _download_all(
    root: Path, files: Sequence[WantedFile], downloader: Downloader, progress: Progress, jobs: int
) -> None:
    """Download the files, the largest first; the first failure stops all, and is raised."""
    parts = (root / f"{file.name}{PART_SUFFIX}" for file in files)
    progress.begin(
        files=len(files),
        total=sum(file.content.size or 0 for file in files),
        done=sum(part.stat().st_size for part in parts if part.exists()),
    )
    waiting: queue.SimpleQueue[WantedFile] = queue.SimpleQueue()
    for file in sorted(files, key=lambda file: -(file.content.size or 0)):
        waiting.put(file)
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        while True:
            try:
                file = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                downloader.download(file.url, root / file.name, file.content, progress)
            except BaseException as error:
                ended.put(error)
                return
            progress.finish(file.name)
            ended.put(None)

    # Daemons: Ctrl-C does not wait for a server that sends nothing.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, len(files)))]
    for thread in threads:
        thread.start()
    try:
        for _ in files:
            error = _taken(ended)
            if error is not None:
                raise error
    finally:
        downloader.stop()
        for thread in threads:
            thread.join(timeout=1.0)
        progress.end()


def _taken(ended: queue.SimpleQueue[BaseException | None]) -> BaseException | None:
    """The next item, however long it takes."""
    while True:
        try:
            # A Ctrl-C that comes as a wait begins is seen at its end.
            return ended.get(timeout=1.0)
        except queue.Empty:
            continue
