"""A run at MLflow: where it is, how it begins, goes on and ends."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acestep_ray.errors import InputError, without_password
from acestep_ray.tracking.local_database import (
    artifact_location,
    database_of,
    make_parent_folder,
    ready_database,
    same_run,
    sqlite_uri,
)
from acestep_ray.tracking.mlflow_errors import Cause, NoServerError, explain, reason_of

_DELETED = "deleted"
CHANGED_PARAM = "resumed."
"""Begins the names of tags: MLflow takes no second value of a param, so a continued run has the new one as a tag."""

# Longer values are cut: servers refuse them.
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 5000

REQUEST_SECONDS = 10

Say = Callable[[str], None]

# MLflow's settings are those of the process.
_short_requests = threading.Lock()


@dataclass(frozen=True)
class MLflowRun:
    """Where a run's metrics go: the driver makes the run, the first worker writes to it."""

    tracking_uri: str
    run_id: str


def check_mlflow(uri: str, experiment: str, *, restore: bool = False) -> None:
    """Raise InputError where MLflow will take no new run, before work starts; makes nothing.

    A database that is not there yet is not looked for: it is made with the run.
    """
    from mlflow.tracking import MlflowClient

    _be_quiet()
    database = database_of(uri)
    if database is not None and not database.exists():
        return
    try:
        with short_requests(uri, REQUEST_SECONDS):
            found = MlflowClient(uri).get_experiment_by_name(experiment)
    except Exception as error:  # every kind of store and network has errors of its own
        raise _not_taken(explain(error, uri), uri) from None
    if found is not None and found.lifecycle_stage == _DELETED and not restore:
        raise _experiment_deleted(experiment, uri)


def start_mlflow_run(
    uri: str,
    experiment: str,
    run_name: str,
    params: Mapping[str, Any],
    run_id: str | None,
    *,
    tags: Mapping[str, str] | None = None,
    restore: bool = False,
    say: Say = print,
) -> MLflowRun:
    """Make a run, or continue `run_id`, and log its settings and tags.

    A param whose value differs from the one that the run began with is logged as a tag, `resumed.NAME`. A deleted run
    is reported and replaced by a new one; with `restore` it is restored, and so is a deleted experiment. Raises
    InputError for a deleted experiment without `restore`, for lasting causes such as a database of another MLflow
    version, and when the server takes no new run. A known run then continues with a warning.
    """
    from mlflow.tracking import MlflowClient

    _be_quiet()
    values = {name: without_password(str(value))[:PARAM_CHARACTERS] for name, value in params.items()}
    labels = {name: value[:TAG_CHARACTERS] for name, value in (tags or {}).items()}
    try:
        with short_requests(uri, REQUEST_SECONDS), ready_database(uri, run_id):
            client = MlflowClient(uri)
            experiment_id = _find_experiment(client, experiment, uri, restore)
            if run_id is not None:
                gone = _continue_run(client, run_id, values, labels, restore)
                if gone is None:
                    return MLflowRun(uri, run_id)
                say(f"warning: {gone} at {without_password(uri)}; a new one is made")
                run_id = None
            experiment_id = experiment_id or _make_experiment(client, experiment, uri)
            return MLflowRun(uri, _make_run(client, experiment_id, run_name, values, labels))
    except InputError:
        raise
    except Exception as error:  # every kind of store and network has errors of its own
        cause = explain(error, uri)
        if run_id is not None and not cause.lasts:
            say(
                f"warning: MLflow at {without_password(uri)} does not take the run ({reason_of(error)}); "
                "it goes on, and its metrics are sent when it does"
            )
            return MLflowRun(uri, run_id)
        raise _not_taken(cause, uri) from None


def located_run(run: MLflowRun, uri: str | None, *, beside: Path | None = None) -> MLflowRun | None:
    """A noted run where it is now: at `uri` or in the database `beside`, if its folder was moved or copied.

    None where it was in a database on a disk that is gone.
    """
    noted = database_of(run.tracking_uri)
    if noted is None:
        return run
    for here in (uri, None if beside is None else sqlite_uri(beside)):
        if here is not None and same_run(run.tracking_uri, run.run_id, here) is not None:
            return MLflowRun(here, run.run_id)
    return run if noted.is_file() else None


def end_mlflow_run(run: MLflowRun, status: str, *, say: Say = print) -> None:
    """Mark the run FINISHED, FAILED or KILLED; a server that does not answer is told."""
    from mlflow.tracking import MlflowClient

    try:
        with short_requests(run.tracking_uri, REQUEST_SECONDS):
            MlflowClient(run.tracking_uri).set_terminated(run.run_id, status=status)
    except Exception as error:  # every kind of store and network has errors of its own
        say(
            f"warning: MLflow at {without_password(run.tracking_uri)} does not take it ({reason_of(error)}); "
            f"it goes on showing the run {run.run_id} as it was before it was {status}"
        )


def _be_quiet() -> None:
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it creates


def _not_taken(cause: Cause, uri: str) -> InputError:
    return InputError(
        f"MLflow does not take the run ({cause.what})",
        where=f"--tracking_uri {without_password(uri)}",
        fix=cause.fix,
    )


def _experiment_deleted(experiment: str, uri: str) -> InputError:
    return InputError(
        f"MLflow's experiment {experiment!r} was deleted, and takes no runs",
        where=f"--tracking_uri {without_password(uri)}",
        fix="add --restore_experiment, which brings it back with its runs; or add --tracking_experiment NAME, which "
        "tracks in another one",
    )


def _find_experiment(client: Any, experiment: str, uri: str, restore: bool) -> str | None:
    """The experiment's id, None where there is none yet. Raises InputError for a deleted one that is not to return."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return None
    if found.lifecycle_stage == _DELETED:
        if not restore:
            raise _experiment_deleted(experiment, uri)
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _make_experiment(client: Any, experiment: str, uri: str) -> str:
    database = database_of(uri)
    # Otherwise artifacts go to the folder the driver happens to be in.
    location = None if database is None else artifact_location(database, experiment)
    return str(client.create_experiment(experiment, artifact_location=location))


def _make_run(
    client: Any, experiment_id: str, run_name: str, params: dict[str, str], tags: dict[str, str]
) -> str:
    """The id of a new run."""
    from mlflow.entities import Param

    run_id = client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id
    if not run_id:
        raise NoServerError("the run has no id")
    client.log_batch(run_id, params=[Param(name, value) for name, value in params.items()])
    return run_id


def _continue_run(
    client: Any, run_id: str, params: dict[str, str], tags: dict[str, str], restore: bool
) -> str | None:
    """Mark a run as running again and note what is new of it; why it cannot be, for one that is gone."""
    from mlflow import MlflowException
    from mlflow.entities import Param, RunTag

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return f"MLflow's run {run_id} is not there any more"
        raise
    if run.info.lifecycle_stage == _DELETED:
        if not restore:
            return f"MLflow's run {run_id} was deleted (--restore_experiment would bring it back)"
        client.restore_run(run_id)
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
    return None


@contextlib.contextmanager
def short_requests(uri: str, seconds: int) -> Iterator[None]:
    """MLflow with `seconds` for a request and without its own retries, which take minutes; the environment goes before.

    For one thread at a time; another one waits.
    """
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    # Defaults in memory, not `os.environ`: other threads of a training process read the environment in C.
    values: list[tuple[object, str, object]] = [
        (MLFLOW_HTTP_REQUEST_MAX_RETRIES, "default", 0),
        (MLFLOW_HTTP_REQUEST_TIMEOUT, "default", seconds),
    ]
    if uri.startswith(("sqlite", "postgresql", "mysql", "mssql")):
        from mlflow.store.db import utils

        values.append((utils, "MAX_RETRY_COUNT", 1))
        if "%" in uri and hasattr(utils, "_make_parent_dirs_if_sqlite"):
            values.append((utils, "_make_parent_dirs_if_sqlite", make_parent_folder))
    with _short_requests, contextlib.ExitStack() as restored:
        for owner, name, value in values:
            restored.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield
