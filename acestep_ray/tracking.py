"""MLflow and TensorBoard behind one small class; neither ends a run when it fails.

MLflow's metrics are sent by a thread of their own. While the server takes none they wait in `mlflow-buffer.jsonl` in
the run's log folder, a line each, and whoever tracks the run next sends them first. What is sent twice, because an
answer was lost, is one metric to MLflow: it has the same time.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import os
import platform
import re
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from acestep_ray import __version__
from acestep_ray.errors import InputError

OFF = "none"
BUFFER_FILE = "mlflow-buffer.jsonl"
CHANGED_PARAM = "resumed."
"""Begins the names of tags: MLflow takes no second value of a param, so a continued run has the new one as a tag."""

# Longer values are cut: servers refuse them.
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 5000
REQUEST_METRICS = 1000

REQUEST_SECONDS = 10
UPLOAD_REQUEST_SECONDS = 60
FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 60.0
UPLOAD_ATTEMPTS = 4
CLOSE_SECONDS = 60.0
CLOSE_IDLE_SECONDS = 10.0
"""`close` waits no more when nothing was sent for so long."""
GIT_SECONDS = 5.0

# What may wait in memory: metrics where the disk fails too, events where it does.
MEMORY_METRICS = 50_000
MEMORY_EVENT_BYTES = 64 * 2**20

Say = Callable[[str], None]

# MLflow's settings are those of the process.
_short_requests = threading.Lock()


@dataclass(frozen=True)
class MLflowRun:
    """Where a run's metrics go: the driver makes the run, the first worker writes to it."""

    tracking_uri: str
    run_id: str


def mlflow_uri(tracking_uri: str | None, logger_dir: Path) -> str | None:
    """The MLflow address that the settings mean; None when MLflow is off or, by default, not installed.

    Raises InputError when an address is given and MLflow is not installed.
    """
    if tracking_uri == OFF:
        return None
    if importlib.util.find_spec("mlflow") is None:
        if tracking_uri is None:
            return None
        raise InputError(
            "MLflow is not installed",
            where=f"--tracking_uri {tracking_uri}",
            fix="pip install mlflow, or `none`",
        )
    return tracking_uri or f"sqlite:///{logger_dir.resolve()}/mlflow.db"


def start_mlflow_run(
    uri: str,
    experiment: str,
    run_name: str,
    params: dict,
    run_id: str | None,
    *,
    tags: Mapping[str, str] | None = None,
    say: Say = print,
) -> MLflowRun:
    """Make a run, or go on with `run_id`, and note its settings and tags.

    A param that has another value than the run was begun with is noted as a tag, `resumed.NAME`. A run that was deleted
    is told and made anew. Raises InputError when the server takes no new run; a known one then goes on all the same,
    with a warning.
    """
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it creates
    values = {name: str(value)[:PARAM_CHARACTERS] for name, value in params.items()}
    labels = {name: value[:TAG_CHARACTERS] for name, value in (tags or {}).items()}
    try:
        with short_requests(uri, REQUEST_SECONDS):
            client = MlflowClient(uri)
            if run_id is not None:
                if _continue_run(client, run_id, values, labels):
                    return MLflowRun(uri, run_id)
                say(f"warning: MLflow's run {run_id} was deleted at {_public(uri)}; a new one is made")
                run_id = None
            return MLflowRun(uri, _make_run(client, uri, experiment, run_name, values, labels))
    except Exception as error:  # every kind of store and network has errors of its own
        if run_id is not None:
            say(
                f"warning: MLflow at {_public(uri)} does not answer ({_reason(error)}); "
                "the run goes on, and its metrics are sent when it does"
            )
            return MLflowRun(uri, run_id)
        raise InputError(
            f"MLflow does not take the run ({_reason(error)})",
            where=f"--tracking_uri {_public(uri)}",
            fix="check the address, or `none`",
        ) from None


def end_mlflow_run(run: MLflowRun, status: str, *, say: Say = print) -> None:
    """Mark the run FINISHED, FAILED or KILLED; a server that does not answer is told."""
    from mlflow.tracking import MlflowClient

    try:
        with short_requests(run.tracking_uri, REQUEST_SECONDS):
            MlflowClient(run.tracking_uri).set_terminated(run.run_id, status=status)
    except Exception as error:  # every kind of store and network has errors of its own
        say(
            f"warning: MLflow at {_public(run.tracking_uri)} does not answer ({_reason(error)}); "
            f"it goes on showing the run {run.run_id} as it was before it was {status}"
        )


def environment_tags() -> dict[str, str]:
    """What a run ran with: `version.PACKAGE`, `device`, `platform`, and MLflow's own tags of the git commit.

    The commit is that of the checkout this package is tracked in, or else of the current folder; without one, none.
    """
    import torch

    tags = {
        "version.acestep_ray": __version__,
        "version.python": platform.python_version(),
        "version.torch": str(torch.__version__),  # unlike the package's, it tells of CUDA
    }
    for package in ("ray", "peft", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{package}"] = importlib.metadata.version(package)
    tags["platform"] = platform.platform()
    if torch.cuda.is_available():
        tags["device"] = torch.cuda.get_device_name()
    package = Path(__file__).resolve().parent
    tracked = _git(package, "ls-files", "--error-unmatch", Path(__file__).name) is not None
    checkout = package if tracked else Path()
    commit = _git(checkout, "rev-parse", "HEAD")
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
        changes = _git(checkout, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        if changes is not None:
            tags["mlflow.source.git.dirty"] = str(changes != "").lower()
    return tags


class Tracker:
    """Writes metrics by step to TensorBoard, where it is installed, and to MLflow, where there is a run.

    Nothing here raises for a server or a disk that fails, or waits for one but `close`: it is told, tried again, and
    told when it works.
    """

    def __init__(self, log_dir: Path, run: MLflowRun | None, first_step: int = 0, *, say: Say = print):
        """`first_step` discards what an interrupted run wrote, or left unsent, beyond its last checkpoint."""
        self._events = None
        if importlib.util.find_spec("tensorboard") is not None:
            self._events = _EventFile(log_dir, first_step, say)
        self._sender = None if run is None else _Sender(run, log_dir / BUFFER_FILE, first_step, say)

    def log(self, metrics: dict[int, dict[str, float]]) -> None:
        """Write metrics by name, by step; what TensorBoard was given survives a kill."""
        if self._events is not None:
            from torch.utils.tensorboard.summary import scalar

            self._events.write(
                (step, scalar(name, value))
                for step, values in metrics.items()
                for name, value in values.items()
            )
        if self._sender is not None:
            now = int(time.time() * 1000)
            self._sender.send(
                [
                    _Metric(step, name, float(value), now)
                    for step, values in metrics.items()
                    for name, value in values.items()
                ]
            )

    def log_audio(self, name: str, waveform: np.ndarray, sample_rate: int, step: int) -> None:
        """Give TensorBoard a sound to play; `waveform` (channels, n) in [−1, 1], mixed to mono."""
        if self._events is not None:
            from torch.utils.tensorboard.summary import audio

            self._events.write([(step, audio(name, waveform.mean(axis=0), sample_rate=sample_rate))])

    def log_artifacts(self, directory: Path, name: str) -> None:
        """Give MLflow a folder's files as the artifacts `name/…`; they are read later and have to stay."""
        if self._sender is not None:
            self._sender.upload(directory, name)

    def close(self) -> None:
        """Write what is left; what MLflow does not take within seconds stays in the buffer file, which is told."""
        if self._events is not None:
            self._events.close()
        if self._sender is not None:
            self._sender.close()


class _Metric(NamedTuple):
    step: int
    name: str
    value: float
    time_ms: int
    """Since 1970."""


@dataclass
class _Retry:
    """When to try again what fails: after waits that grow."""

    failures: int = 0
    at: float = 0.0
    """By the monotonic clock."""

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self.at

    def failed(self) -> None:
        wait = min(FIRST_RETRY_SECONDS * 2.0 ** min(self.failures, 20), LONGEST_RETRY_SECONDS)
        self.failures += 1
        self.at = time.monotonic() + wait

    def succeeded(self) -> None:
        self.failures, self.at = 0, 0.0


@dataclass
class _Upload:
    directory: Path
    name: str
    retry: _Retry = field(default_factory=_Retry)


class _Sender:
    """Sends a run's metrics and artifacts to MLflow, in order, on a thread of its own."""

    def __init__(self, run: MLflowRun, buffer_file: Path, first_step: int, say: Say):
        import mlflow.tracking  # noqa: F401, not in the thread, beside the imports of others

        self._run = run
        self._where = f"MLflow at {_public(run.tracking_uri)}"
        self._buffer_file = buffer_file
        self._say = say
        self._client: Any = None
        # Held for all below, and told of what is new and of what is done.
        self._changed = threading.Condition()
        self._metrics = _MetricQueue(buffer_file, first_step, say)
        self._uploads: deque[_Upload] = deque()
        self._retry = _Retry()
        self._closing = self._ended = False
        self._is_last_try = False
        self._sent_at = 0.0
        threading.Thread(target=self._work, name="mlflow", daemon=True).start()

    def send(self, metrics: Iterable[_Metric]) -> None:
        with self._changed:
            self._metrics.add(metrics)
            self._changed.notify_all()

    def upload(self, directory: Path, name: str) -> None:
        with self._changed:
            self._uploads.append(_Upload(directory, name))
            self._changed.notify_all()

    def close(self) -> None:
        """Wait while what is left is being sent; what does not go stays in the buffer file."""
        with self._changed:
            self._closing = True
            self._sent_at = time.monotonic()
            self._changed.notify_all()
            end = self._sent_at + CLOSE_SECONDS
            while not self._ended:
                left = min(end, self._sent_at + CLOSE_IDLE_SECONDS) - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            self._ended = True  # an answer that comes later changes nothing
            kept, lost = self._metrics.keep(), self._metrics.lost
        if kept:
            self._say(
                f"warning: {self._where} has not taken {kept} metrics; "
                f"they are in {self._buffer_file} and are sent when the run goes on"
            )
        if lost:
            self._say(f"warning: {lost} metrics are lost: {self._where} and {self._buffer_file} take none")
        for upload in self._uploads:
            self._say(self._not_uploaded(upload, "the run has ended"))

    def _work(self) -> None:
        uri, run_id = self._run.tracking_uri, self._run.run_id
        while (work := self._next()) is not None:
            is_upload = isinstance(work, _Upload)
            try:
                with short_requests(uri, UPLOAD_REQUEST_SECONDS if is_upload else REQUEST_SECONDS):
                    if self._client is None:
                        from mlflow.tracking import MlflowClient

                        self._client = MlflowClient(uri)
                    if is_upload:
                        self._client.log_artifacts(run_id, str(work.directory), work.name)
                    else:
                        self._client.log_batch(run_id, metrics=[_entity(metric) for metric in work])
            except Exception as error:  # every kind of store and network has errors of its own
                self._failed(work, error)
            else:
                self._succeeded(work)

    def _next(self) -> list[_Metric] | _Upload | None:
        """Wait for what is to be sent now: the oldest metrics, or an upload; None at the end."""
        with self._changed:
            while not self._ended:
                if self._retry.failures:
                    self._metrics.spill()  # what the server does not take survives a kill
                # Uploads wait while the server takes no metrics: they have few attempts.
                retry = self._retry if self._metrics else self._uploads[0].retry if self._uploads else None
                if retry is None and self._closing:
                    self._end()
                elif retry is None:
                    self._changed.wait()
                elif self._closing or retry.is_due:
                    self._is_last_try = self._closing
                    if work := self._metrics.first() if self._metrics else self._uploads[0]:
                        return work
                else:
                    self._changed.wait(retry.at - time.monotonic())
        return None

    def _succeeded(self, work: list[_Metric] | _Upload) -> None:
        told = None
        with self._changed:
            if self._ended:
                return
            self._sent_at = time.monotonic()
            if isinstance(work, _Upload):
                self._uploads.popleft()
            else:
                self._metrics.remove(len(work))
                if self._retry.failures:
                    told = f"{self._where} answers again; the metrics that waited are sent"
                self._retry.succeeded()
        if told is not None:
            self._say(told)

    def _failed(self, work: list[_Metric] | _Upload, error: Exception) -> None:
        told = None
        with self._changed:
            if self._ended:
                return
            retry = work.retry if isinstance(work, _Upload) else self._retry
            retry.failed()
            if isinstance(work, _Upload):
                if self._is_last_try or retry.failures == UPLOAD_ATTEMPTS:
                    self._uploads.popleft()
                    told = self._not_uploaded(work, _reason(error))
            elif retry.failures == 1:
                told = (
                    f"warning: {self._where} takes no metrics ({_reason(error)}); "
                    f"training does not wait for it, they are kept in {self._buffer_file}"
                )
        if told is not None:
            self._say(told)
        if self._is_last_try:
            self._end()

    def _not_uploaded(self, upload: _Upload, reason: str) -> str:
        return (
            f"warning: {upload.directory} was not uploaded to {self._where} ({reason}); its files stay there"
        )

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class _MetricQueue:
    """Metrics that are not sent yet, oldest first: those in a file of JSON lines, then those in memory.

    For one thread at a time. The file is deleted when all of it is sent; while it takes nothing, metrics stay in
    memory, up to a bound.
    """

    def __init__(self, path: Path, first_step: int, say: Say):
        """Takes over what an earlier run has left in the file, of the steps before `first_step`."""
        self.lost = 0
        """Metrics for which there was no place."""
        self._path = path
        self._memory: deque[_Metric] = deque()
        self._in_file = self._start = self._end = 0
        """How many metrics in the file are not sent; their first byte, and the one after their last."""
        self._usable = True
        try:
            self._take_over(first_step)
        except OSError as error:
            self._usable = False
            say(f"warning: the metrics in {path} cannot be read, and MLflow does not get them ({error})")

    def __len__(self) -> int:
        return self._in_file + len(self._memory)

    def add(self, metrics: Iterable[_Metric]) -> None:
        for metric in metrics:
            if len(self._memory) >= MEMORY_METRICS and not self.spill():
                self.lost += 1
            else:
                self._memory.append(metric)

    def first(self) -> list[_Metric]:
        """The oldest, as many as one request takes."""
        if self._in_file:
            metrics = [_parsed(line) for line in self._lines(min(self._in_file, REQUEST_METRICS))]
            if None not in metrics:
                return metrics
            self._forget_file()
        return list(itertools.islice(self._memory, REQUEST_METRICS))

    def remove(self, count: int) -> None:
        """Forget the oldest, which were sent; they may have come to the file since `first`."""
        if not self._in_file:
            for _ in range(count):
                self._memory.popleft()
            return
        lines = self._lines(count)
        if b"" in lines:
            self._forget_file()
            return
        self._start += sum(map(len, lines))
        self._in_file -= count
        if not self._in_file:
            self._start = self._end = 0
            with contextlib.suppress(OSError):  # then they are sent once more, to no harm
                self._path.unlink(missing_ok=True)

    def spill(self) -> bool:
        """Move what is in memory to the file; False where that fails, and nothing was moved."""
        if not self._memory:
            return True
        if self._in_file and not self._lines(1)[0]:
            self._forget_file()
        if not self._usable:
            return False
        content = b"".join(map(_line, self._memory))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab") as file:
                file.truncate(self._end)  # an attempt that failed may have left a part
                file.write(content)
        except OSError:
            return False
        self._in_file += len(self._memory)
        self._end += len(content)
        self._memory.clear()
        return True

    def keep(self) -> int:
        """Leave in the file what is not sent, and only that; returns how many. What it does not take is lost."""
        if not self.spill():
            self.lost += len(self._memory)
            self._memory.clear()
        if self._start and self._in_file:
            with contextlib.suppress(OSError):  # then some are sent once more, to no harm
                self._rewrite(filter(None, map(_parsed, self._lines(self._in_file))))
        return self._in_file

    def _take_over(self, first_step: int) -> None:
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            # A line that a kill has cut is none.
            metrics = filter(None, map(_parsed, file))
            self._rewrite(metric for metric in metrics if metric.step < first_step)

    def _rewrite(self, metrics: Iterable[_Metric]) -> None:
        """Write the file anew; where there are no metrics, there is no file."""
        unfinished = self._path.with_suffix(".tmp")
        count = size = 0
        with open(unfinished, "wb") as file:
            for metric in metrics:
                count += 1
                size += file.write(_line(metric))
        os.replace(unfinished, self._path)
        if not count:
            self._path.unlink()
        self._in_file, self._start, self._end = count, 0, size

    def _lines(self, count: int) -> list[bytes]:
        """The first lines that are not sent; empty ones where the file has been damaged or deleted."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._start)
                return [file.readline() for _ in range(count)]
        except OSError:
            return [b""]

    def _forget_file(self) -> None:
        """Go on without a file that somebody has damaged or deleted."""
        self.lost += self._in_file
        self._in_file = self._start = self._end = 0
        self._usable = not self._path.exists()


class _EventFile:
    """TensorBoard's events of one run; while they cannot be written, the latest wait in memory.

    Not torch's `SummaryWriter`: its thread ends with the first error, and what it held is lost.
    """

    def __init__(self, log_dir: Path, first_step: int, say: Say):
        self._log_dir = log_dir
        self._first_step = first_step
        self._say = say
        self._file: BinaryIO | None = None
        self._has_begun = False
        self._records: deque[bytes] = deque()
        self._dropped = 0
        self._retry = _Retry()
        self._write_records()

    def write(self, summaries: Iterable[tuple[int, Any]]) -> None:
        """Write summaries by step; what was written survives a kill."""
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.extend(
            _record(Event(wall_time=time.time(), step=step, summary=summary)) for step, summary in summaries
        )
        if self._retry.is_due:
            self._write_records()
        size = sum(map(len, self._records))
        while size > MEMORY_EVENT_BYTES:
            size -= len(self._records.popleft())
            self._dropped += 1

    def close(self) -> None:
        self._write_records()
        if self._records:
            lost = len(self._records) + self._dropped
            self._say(f"warning: {lost} events for TensorBoard are lost: {self._log_dir} takes none")
        self._close_file()

    def _write_records(self) -> None:
        try:
            if self._file is None:
                self._file = self._open()
                self._file.write(self._header())
            self._file.write(b"".join(self._records))
            self._file.flush()
        except OSError as error:
            self._close_file()  # its last event may be cut: what follows goes to another file
            self._retry.failed()
            if self._retry.failures == 1:
                self._say(
                    f"warning: {self._log_dir} takes no events for TensorBoard ({error}); "
                    "training goes on, and they wait in memory"
                )
            return
        self._has_begun = True
        self._records.clear()
        if self._retry.failures:
            lost = f", but {self._dropped} for which there was no memory" if self._dropped else ""
            self._say(f"{self._log_dir} takes events for TensorBoard again: those that waited{lost}")
            self._dropped = 0
        self._retry.succeeded()

    def _open(self) -> BinaryIO:
        self._log_dir.mkdir(parents=True, exist_ok=True)
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        # TensorBoard reads files in the order of their names: a quick restart has to come after what it continues.
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}"
        return open(self._log_dir / f"{name}.from-step-{self._first_step}", "xb")

    def _header(self) -> bytes:
        """What TensorBoard expects first; the run's first file also discards later steps of those before it."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        events = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if self._first_step and not self._has_begun:
            start = SessionLog(status=SessionLog.START)
            events.append(Event(wall_time=time.time(), step=self._first_step, session_log=start))
        return b"".join(map(_record, events))

    def _close_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


@contextlib.contextmanager
def short_requests(uri: str, seconds: int) -> Iterator[None]:
    """MLflow with `seconds` for a request and without its own retries, which take minutes; the environment goes before.

    For one thread at a time; another one waits.
    """
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    # Defaults in memory, not `os.environ`: other threads of a training process read the environment in C.
    values = [
        (MLFLOW_HTTP_REQUEST_MAX_RETRIES, "default", 0),
        (MLFLOW_HTTP_REQUEST_TIMEOUT, "default", seconds),
    ]
    if uri.startswith(("sqlite", "postgresql", "mysql", "mssql")):
        from mlflow.store.db import utils

        values.append((utils, "MAX_RETRY_COUNT", 1))
    with _short_requests, contextlib.ExitStack() as restored:
        for owner, name, value in values:
            restored.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def _make_run(
    client: Any, uri: str, experiment: str, run_name: str, params: dict[str, str], tags: dict[str, str]
) -> str:
    """The id of a new run."""
    from mlflow.entities import Param

    found = client.get_experiment_by_name(experiment)
    if found is None:
        location = None
        if uri.startswith("sqlite:///"):  # otherwise artifacts go to the folder the driver happens to be in
            database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
            location = str(database.resolve().parent / "mlruns" / experiment)
        experiment_id = client.create_experiment(experiment, artifact_location=location)
    else:
        experiment_id = found.experiment_id
    run_id = client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id
    client.log_batch(run_id, params=[Param(name, value) for name, value in params.items()])
    return run_id


def _continue_run(client: Any, run_id: str, params: dict[str, str], tags: dict[str, str]) -> bool:
    """Mark a run as running again and note what is new of it; False for one that was deleted."""
    from mlflow import MlflowException
    from mlflow.entities import Param, RunTag

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    if run.info.lifecycle_stage != "active":
        return False
    client.update_run(run_id, status="RUNNING")
    known = run.data.params
    changed = {
        CHANGED_PARAM + name: value
        for name, value in params.items()
        # A value that is as it was at first replaces that of a resume between.
        if known.get(name, value) != value or CHANGED_PARAM + name in run.data.tags
    }
    client.log_batch(
        run_id,
        params=[Param(name, value) for name, value in params.items() if name not in known],
        tags=[RunTag(name, value[:TAG_CHARACTERS]) for name, value in {**tags, **changed}.items()],
    )
    return True


def _git(folder: Path, *arguments: str) -> str | None:
    """What a git command prints; None where it fails, or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _entity(metric: _Metric) -> Any:
    """The metric as MLflow's client takes it."""
    from mlflow.entities import Metric

    return Metric(metric.name, metric.value, metric.time_ms, metric.step)


def _line(metric: _Metric) -> bytes:
    return json.dumps(metric._asdict()).encode() + b"\n"


def _parsed(line: bytes) -> _Metric | None:
    """The metric of a line; None for what is none."""
    try:
        values = json.loads(line)
        return _Metric(
            int(values["step"]), str(values["name"]), float(values["value"]), int(values["time_ms"])
        )
    except (ValueError, TypeError, KeyError):
        return None


def _record(event: Any) -> bytes:
    """An event as it is in a file."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    RecordWriter(content).write(event.SerializeToString())
    return content.getvalue()


def _public(text: str) -> str:
    """Without the names and passwords of URLs."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)


def _reason(error: BaseException) -> str:
    """What an error began with, in a line: MLflow's own wraps it in several."""
    while (
        inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    ) is not None:
        error = inner
    lines = str(error).strip().splitlines()
    return _public(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)
