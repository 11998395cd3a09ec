"""A run at MLflow: where it is, how it begins, goes on and ends."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acestep_ray.errors import InputError, without_password
from acestep_ray.paths import expand_home, expand_home_in_uri
from acestep_ray.storage import is_url
from acestep_ray.tracking.local_database import (
    absolute_sqlite_uri,
    artifact_location,
    database_of,
    make_parent_folder,
    ready_database,
    same_run,
    sqlite_uri,
)

OFF = "none"
CHANGED_PARAM = "resumed."
"""Begins the names of tags: MLflow takes no second value of a param, so a continued run has the new one as a tag."""

# Longer values are cut: servers refuse them.
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 5000

REQUEST_SECONDS = 10

_CREDENTIALS_FIX = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, on every node"
)

# `user:password@`, or a parameter of a database's driver.
_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@|[?&][a-z_]*(password|passwd|token|secret)=", re.IGNORECASE)

Say = Callable[[str], None]

# MLflow's settings are those of the process.
_short_requests = threading.Lock()


@dataclass(frozen=True)
class MLflowRun:
    """Where a run's metrics go: the driver makes the run, the first worker writes to it."""

    tracking_uri: str
    run_id: str


def mlflow_uri(tracking_uri: str | None, logger_dir: str | Path) -> str | None:
    """The MLflow address that the settings mean; None when MLflow is off or, by default, not installed.

    Raises InputError when an address is given and MLflow is not installed, for an address with a password in it, and
    for logs in object storage when none is given.
    """
    if tracking_uri == OFF:
        return None
    if tracking_uri is not None and _PASSWORD.search(tracking_uri):
        raise InputError(
            "a password does not belong into an address, which is shown and written down",
            where=f"--tracking_uri {without_password(tracking_uri).partition('?')[0]}",
            fix="give it in the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, "
            "PGPASSWORD for PostgreSQL",
        )
    if importlib.util.find_spec("mlflow") is None:
        if tracking_uri is None:
            return None
        raise InputError(
            "MLflow is not installed",
            where=f"--tracking_uri {tracking_uri}",
            fix="pip install mlflow, or `none`",
        )
    if tracking_uri is None and is_url(logger_dir):
        raise InputError(
            "MLflow's own database is a file, which cannot lie in object storage",
            where=f"--logger_dir {logger_dir}",
            fix="give --tracking_uri with the address of an MLflow server, or `none`",
        )
    if tracking_uri is None:
        return sqlite_uri(Path(expand_home(str(logger_dir))).resolve() / "mlflow.db")
    return absolute_sqlite_uri(expand_home_in_uri(tracking_uri))


def start_mlflow_run(
    uri: str,
    experiment: str,
    run_name: str,
    params: Mapping[str, Any],
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
    values = {name: without_password(str(value))[:PARAM_CHARACTERS] for name, value in params.items()}
    labels = {name: value[:TAG_CHARACTERS] for name, value in (tags or {}).items()}
    try:
        with short_requests(uri, REQUEST_SECONDS), ready_database(uri, run_id):
            client = MlflowClient(uri)
            if run_id is not None:
                if _continue_run(client, run_id, values, labels):
                    return MLflowRun(uri, run_id)
                say(
                    f"warning: MLflow's run {run_id} was deleted at {without_password(uri)}; a new one is made"
                )
                run_id = None
            return MLflowRun(uri, _make_run(client, uri, experiment, run_name, values, labels))
    except Exception as error:  # every kind of store and network has errors of its own
        if run_id is not None:
            say(
                f"warning: MLflow at {without_password(uri)} does not take the run ({reason_of(error)}); "
                "it goes on, and its metrics are sent when it does"
            )
            return MLflowRun(uri, run_id)
        raise InputError(
            f"MLflow does not take the run ({reason_of(error)})",
            where=f"--tracking_uri {without_password(uri)}",
            fix=_CREDENTIALS_FIX if is_refused(error) else "check the address, or `none`",
        ) from None


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


def _make_run(
    client: Any, uri: str, experiment: str, run_name: str, params: dict[str, str], tags: dict[str, str]
) -> str:
    """The id of a new run."""
    from mlflow.entities import Param

    found = client.get_experiment_by_name(experiment)
    if found is None:
        database = database_of(uri)
        # Otherwise artifacts go to the folder the driver happens to be in.
        location = None if database is None else artifact_location(database, experiment)
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


def is_refused(error: BaseException) -> bool:
    """Whether MLflow's server does not take the credentials, or they give no right to what was asked for."""
    status = getattr(error, "get_http_status_code", lambda: None)()
    return status in (401, 403)


def reason_of(error: BaseException) -> str:
    """What an error began with, in a line: MLflow's own wraps it in several."""
    if is_refused(error):
        return f"it refuses the credentials: {_CREDENTIALS_FIX}"
    while (
        inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    ) is not None:
        error = inner
    lines = str(error).strip().splitlines()
    return without_password(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)
