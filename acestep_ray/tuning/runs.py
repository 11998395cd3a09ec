"""A search in MLflow: one parent run, and below it a run for each trial."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acestep_ray.errors import InputError, without_password
from acestep_ray.storage import Store, fetched
from acestep_ray.terminal import show_line
from acestep_ray.tracking import MLflowRun, end_mlflow_run, environment_tags, start_mlflow_run
from acestep_ray.tracking.mlflow_errors import reason_of
from acestep_ray.tracking.mlflow_run import short_requests
from acestep_ray.tuning.records import DONE, STOPPED, Records, TrialRecord

_UPLOAD_REQUEST_SECONDS = 60
_STATUS = {DONE: "FINISHED", STOPPED: "FINISHED"}


class SearchRuns:
    """The runs of a search; none without an address. A server that does not answer is told and stops nothing."""

    def __init__(
        self,
        uri: str | None,
        records: Records,
        search: str,
        *,
        experiment: str = "acestep-ray",
        restore: bool = False,
    ):
        """`experiment` is MLflow's; `restore` brings it back where it was deleted."""
        self.uri, self.records, self.search = uri, records, search
        self.experiment, self.restore = experiment, restore
        self.parent: MLflowRun | None = None

    def begin(self, params: Mapping[str, Any], known: str | None) -> str | None:
        """Make the parent run, or go on with the `known` one; returns its id. Raises InputError where none is taken."""
        if self.uri is None:
            return None
        tags = environment_tags()
        self.parent = start_mlflow_run(
            self.uri, self.experiment, self.search, dict(params), known, tags=tags, restore=self.restore
        )
        return self.parent.run_id

    def start_trial(self, record: TrialRecord) -> MLflowRun | None:
        """Make a trial's run, or go on with it; noted in its record."""
        if self.parent is None:
            return None
        tags = {"mlflow.parentRunId": self.parent.run_id}
        name = f"{self.search}/{record.name}"
        try:
            run = start_mlflow_run(
                self.parent.tracking_uri,
                self.experiment,
                name,
                record.params,
                record.mlflow_run,
                tags=tags,
                restore=self.restore,
            )
        except InputError as error:
            show_line(f"warning: {record.name} is not in MLflow: {error.what}")
            return None
        record.mlflow_run = run.run_id
        self.records.write(record)
        return run

    def end_trial(self, record: TrialRecord) -> None:
        """Note how a trial came out."""
        if self.parent is None or record.mlflow_run is None:
            return
        run = MLflowRun(self.parent.tracking_uri, record.mlflow_run)
        gap = self.records.gap(record)
        metrics = {} if record.best is None else {"best/validation": record.lowest}
        self._log(
            run, metrics if gap is None else {**metrics, "best/gap": gap}, {"trial.state": record.state}
        )
        end_mlflow_run(run, _STATUS.get(record.state, "FAILED"))

    def interrupt_trial(self, record: TrialRecord) -> None:
        """Note that a trial is not at work any more, and not over."""
        if self.parent is not None and record.mlflow_run is not None:
            end_mlflow_run(MLflowRun(self.parent.tracking_uri, record.mlflow_run), "KILLED")

    def add_checkpoint(self, record: TrialRecord, checkpoint: Store) -> None:
        """Upload the files of one of the best checkpoints."""
        if self.parent is not None and record.mlflow_run is not None:
            run = MLflowRun(self.parent.tracking_uri, record.mlflow_run)
            with fetched(checkpoint) as folder:
                self._upload(run, folder, f"checkpoints/{checkpoint.name}")

    def finish(self, status: str, best: TrialRecord | None, report: Path) -> None:
        """Give the parent the report's files and the winner's loss, and end it."""
        if self.parent is None:
            return
        if best is not None:
            self._log(self.parent, {"best/validation": best.lowest}, {"best.trial": best.name})
            self._upload(self.parent, report, "report")
        end_mlflow_run(self.parent, status)

    def _log(self, run: MLflowRun, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        from mlflow.tracking import MlflowClient

        try:
            with short_requests(run.tracking_uri, _UPLOAD_REQUEST_SECONDS):
                client = MlflowClient(run.tracking_uri)
                for name, value in metrics.items():
                    client.log_metric(run.run_id, name, value)
                for name, tag in tags.items():
                    client.set_tag(run.run_id, name, tag)
        except Exception as error:  # every kind of store and network has errors of its own
            _warn(run, error)

    def _upload(self, run: MLflowRun, directory: Path, name: str) -> None:
        from mlflow.tracking import MlflowClient

        try:
            with short_requests(run.tracking_uri, _UPLOAD_REQUEST_SECONDS):
                MlflowClient(run.tracking_uri).log_artifacts(run.run_id, str(directory), name)
        except Exception as error:  # every kind of store and network has errors of its own
            _warn(run, error)


def _warn(run: MLflowRun, error: Exception) -> None:
    where = without_password(run.tracking_uri)
    show_line(f"warning: MLflow at {where} does not take the search's results ({reason_of(error)})")
