"""An evaluation in MLflow: one parent run with the report, and below it a run for each model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from acestep_ray.errors import AceStepError, without_password
from acestep_ray.evaluation.notes import Notes
from acestep_ray.evaluation.scores import ModelScore
from acestep_ray.tracking import MLflowRun, end_mlflow_run, environment_tags, start_mlflow_run
from acestep_ray.tracking.mlflow_errors import reason_of
from acestep_ray.tracking.mlflow_run import short_requests

_UPLOAD_REQUEST_SECONDS = 60


@contextlib.contextmanager
def evaluation_run(
    uri: str | None, experiment: str, name: str, params: Mapping[str, Any], *, restore: bool = False
) -> Iterator[MLflowRun | None]:
    """The parent run in MLflow's experiment, FINISHED when the block has ended well; None without an address.

    Raises InputError where the server does not take it.
    """
    if uri is None:
        yield None
        return
    run = start_mlflow_run(
        uri, experiment, name, dict(params), None, tags=environment_tags(), restore=restore
    )
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        end_mlflow_run(run, status)


def log_models(
    run: MLflowRun, experiment: str, name: str, scores: Sequence[ModelScore], notes: Notes
) -> None:
    """Write each model's figures; a server that does not answer is told and stops nothing."""
    for score in scores:
        params = {"model": score.label, "kind": score.kind, "path": score.path, "strength": score.strength}
        tags = {"mlflow.parentRunId": run.run_id}
        try:
            child = start_mlflow_run(
                run.tracking_uri, experiment, f"{name}/{score.label}", params, None, tags=tags
            )
        except AceStepError as error:
            notes.warn(f"{score.label} is not in MLflow: {error}")
            continue
        with _telling(run, notes) as client:
            for metric, value in score.metrics().items():
                client.log_metric(child.run_id, metric, value)
        end_mlflow_run(child, "FINISHED")


def log_report(run: MLflowRun, files: Sequence[Path], notes: Notes) -> None:
    """Upload the report's files to the parent run."""
    with _telling(run, notes) as client:
        for file in files:
            client.log_artifact(run.run_id, str(file))


@contextlib.contextmanager
def _telling(run: MLflowRun, notes: Notes) -> Iterator[Any]:
    """MLflow's client; what goes wrong with it is told."""
    from mlflow.tracking import MlflowClient

    try:
        with short_requests(run.tracking_uri, _UPLOAD_REQUEST_SECONDS):
            yield MlflowClient(run.tracking_uri)
    except Exception as error:  # every kind of store and network has errors of its own
        where = without_password(run.tracking_uri)
        notes.warn(f"MLflow at {where} does not take the evaluation's results ({reason_of(error)})")
