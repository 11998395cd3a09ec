"""What a run measured, step by step, as TensorBoard or MLflow has it."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import queue
import stat
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

from acestep_ray.errors import InputError, without_password
from acestep_ray.plain_files import JSON, read_limited
from acestep_ray.plain_json import load_json
from acestep_ray.storage import Store, is_url, scratch_folder
from acestep_ray.storage.folders import download_files
from acestep_ray.tracking.local_database import SQLITE, database_of
from acestep_ray.tracking.mlflow_errors import reason_of
from acestep_ray.tracking.mlflow_run import MLflowRun, located_run, short_requests
from acestep_ray.training.experiment import MLFLOW_FILE
from acestep_ray.units import size_text

Curve = Mapping[int, float]
"""Values by step, ascending."""

_Answer = TypeVar("_Answer")

EVENTS = "events.out.tfevents."
"""How the names of TensorBoard's files begin."""

_REQUEST_SECONDS = 10
_ANSWER_SECONDS = 60.0
MAX_EVENT_BYTES = 64 * 2**20
"""Of a run's events: 200,000 steps. TensorBoard takes 40 s and 1 GB of memory for them."""
_MOST_CURVES = 1000
_YEAR_9999 = 253_370_764_800
_PASSWORD_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD")


@dataclass(frozen=True)
class Log:
    """The curves of a run."""

    curves: dict[str, Curve] = field(default_factory=dict)
    """By the name that training gives them, such as `loss/denoising`."""
    source: str | None = None
    """Where they were read; None where there are none."""
    began: float | None = None
    ended: float | None = None
    """When the first and the last value were written, in seconds since 1970; None where that is not known."""

    def __getitem__(self, name: str) -> Curve:
        """A curve; an empty one where it was not measured."""
        return self.curves.get(name, {})


@dataclass(frozen=True)
class TrackedRun:
    """What MLflow says of a run, besides its curves."""

    tracking_uri: str
    run_id: str
    status: str
    """RUNNING, FINISHED, FAILED or KILLED."""
    tags: dict[str, str]


def find_logs(experiment: Path, logger_dir: str | None, trial: str = "") -> Path | None:
    """The folder with TensorBoard's events of an experiment, or of a search's trial; None without one.

    `logger_dir` is what the settings name.
    """
    # The settings' path may be relative to where training was started.
    for logs in (Path(logger_dir or ""), experiment.parent / "logs"):
        folder = logs / experiment.name / trial
        if logger_dir and any(folder.glob(f"{EVENTS}*")):
            return folder
    return None


def read_log(experiment: Path, logger_dir: str | None, trial: str = "") -> Log:
    """TensorBoard's curves of an experiment, or of a search's trial; none where there are no events.

    Of logs in object storage a copy is read. Raises InputError and StorageError where that cannot be reached.
    """
    folder = find_logs(experiment, logger_dir, trial)
    if folder is not None:
        return read_events(folder)
    if logger_dir is None or not is_url(logger_dir):
        return Log()
    logs = Store.at(logger_dir).child(experiment.name)
    names = [name for name in logs.names(trial) if PurePosixPath(name).name.startswith(EVENTS)]
    if not trial:  # a search's own folder holds those of its trials
        names = [name for name in names if "/" not in name]
    if not names:
        return Log()
    with scratch_folder() as copy:
        download_files(logs, names, copy)
        return read_events(copy / trial)


def read_events(folder: Path) -> Log:
    """The curves in TensorBoard's events; none where TensorBoard is not installed.

    Raises InputError for events that do not read, or are more than a page's curves need.
    """
    if importlib.util.find_spec("tensorboard") is None:
        return Log()
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    _check_events(folder)
    try:
        events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
        scalars = {name: events.Scalars(name) for name in events.Tags()[SCALARS][:_MOST_CURVES]}
    except Exception as error:  # of the records' sums, of protobuf, of the values' types
        raise InputError(
            f"TensorBoard's events cannot be read ({type(error).__name__}: {' '.join(str(error).split())})",
            where=str(folder),
        ) from None
    times = [time for values in scalars.values() for event in values if _is_time(time := event.wall_time)]
    return Log(
        # A step that was done again after a resume is there twice; the later one counts.
        curves={
            name: {event.step: event.value for event in sorted(values, key=lambda event: event.step)}
            for name, values in scalars.items()
        },
        source=str(folder) if scalars else None,
        began=min(times, default=None),
        ended=max(times, default=None),
    )


def _check_events(folder: Path) -> None:
    """Raise InputError for events that would take minutes and gigabytes, and for what is no file."""
    size = 0
    for path in folder.glob("*tfevents*"):  # as TensorBoard looks for them
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError("this is not a regular file, and TensorBoard would wait for it", where=str(path))
        size += status.st_size
    if size > MAX_EVENT_BYTES:
        raise InputError(
            f"TensorBoard's events have {size_text(size)}; a page reads {size_text(MAX_EVENT_BYTES)}",
            where=str(folder),
            fix="look at them with tensorboard --logdir",
        )


def _is_time(seconds: float) -> bool:
    """Whether a moment is one that a calendar has."""
    return math.isfinite(seconds) and 0 <= seconds < _YEAR_9999


def read_mlflow(experiment: Path) -> TrackedRun | None:
    """What MLflow says of an experiment's run; None where it was not tracked.

    Raises InputError where MLflow does not answer, or does not know the run.
    """
    run = _noted_run(experiment)
    if run is None:
        return None
    found = _ask(run, lambda client: client.get_run(run.run_id))
    return TrackedRun(
        without_password(run.tracking_uri), run.run_id, found.info.status, dict(found.data.tags)
    )


def read_mlflow_curves(experiment: Path) -> Log:
    """The curves that MLflow has of an experiment's run. Raises what `read_mlflow` raises."""
    run = _noted_run(experiment)
    if run is None:
        return Log()

    def read(client: Any) -> dict[str, list[Any]]:
        names = sorted(client.get_run(run.run_id).data.metrics)[:_MOST_CURVES]
        return {name: client.get_metric_history(run.run_id, name) for name in names}

    histories = _ask(run, read)
    moments = [metric.timestamp / 1000 for history in histories.values() for metric in history]
    times = list(filter(_is_time, moments))
    return Log(
        curves={
            name: {
                metric.step: metric.value for metric in sorted(history, key=lambda m: (m.step, m.timestamp))
            }
            for name, history in histories.items()
        },
        source=f"MLflow at {without_password(run.tracking_uri)}" if histories else None,
        began=min(times, default=None),
        ended=max(times, default=None),
    )


def _noted_run(experiment: Path) -> MLflowRun | None:
    noted = experiment / MLFLOW_FILE
    try:
        run = MLflowRun(**load_json(read_limited(noted, JSON)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"what is noted of MLflow's run cannot be read ({error})", where=str(noted)
        ) from None
    database = database_of(run.tracking_uri)
    if database is None:
        return run
    return located_run(run, None, beside=experiment.absolute().parent / "logs" / database.name) or run


def _would_get_a_password(uri: str) -> bool:
    """Whether the client would prove who the user is to a server that the user has not named."""
    own = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    return (
        not uri.startswith(SQLITE)
        and uri.rstrip("/") != own
        and any(os.environ.get(name) for name in _PASSWORD_VARIABLES)
    )


def _ask(run: MLflowRun, question: Callable[[Any], _Answer]) -> _Answer:
    """MLflow's answer. Raises InputError where there is none."""
    if importlib.util.find_spec("mlflow") is None:
        raise InputError("MLflow, which has more of this run, is not installed", fix="pip install mlflow")
    database = database_of(run.tracking_uri)
    if database is not None and not database.is_file():  # MLflow would make a new one
        raise InputError("MLflow's database is not there", where=str(database))
    if _would_get_a_password(run.tracking_uri):
        raise InputError(
            "MLflow, which only the run's folder names, is not sent this environment's password",
            where=without_password(run.tracking_uri),
            fix="set MLFLOW_TRACKING_URI to this address, if it is yours",
        )
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    try:
        with short_requests(run.tracking_uri, _REQUEST_SECONDS):
            return _within(_ANSWER_SECONDS, lambda: question(MlflowClient(run.tracking_uri)))
    except Exception as error:  # every kind of store and network has errors of its own
        raise InputError(
            f"MLflow does not tell of this run ({reason_of(error)})", where=without_password(run.tracking_uri)
        ) from None


def _within(seconds: float, ask: Callable[[], _Answer]) -> _Answer:
    """What `ask` returns or raises. Raises TimeoutError where it takes longer; its thread does not keep the process.

    A server may send one page of metrics after another, and a database may compute without end.
    """
    done: queue.SimpleQueue[tuple[_Answer | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((ask(), None))
        except Exception as error:  # raised where the answer is waited for
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        answer, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no whole answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return cast("_Answer", answer)
