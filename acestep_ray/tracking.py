"""MLflow and TensorBoard behind one small class."""

from __future__ import annotations

import importlib.util
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from acestep_ray.errors import InputError

OFF = "none"


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


def start_mlflow_run(uri: str, experiment: str, run_name: str, params: dict, run_id: str | None) -> MLflowRun:
    """Make a run, or go on with `run_id`, and note its settings. Raises InputError when the server does not answer."""
    import mlflow
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it creates
    try:
        client = MlflowClient(uri)
        if run_id is None:
            found = client.get_experiment_by_name(experiment)
            experiment_id = found.experiment_id if found else client.create_experiment(experiment)
            run_id = client.create_run(experiment_id, run_name=run_name).info.run_id
            values = [mlflow.entities.Param(key, str(value)[:6000]) for key, value in params.items()]
            client.log_batch(run_id, params=values)
        else:
            client.update_run(run_id, status="RUNNING")
    except (mlflow.MlflowException, OSError) as error:
        raise InputError(
            f"MLflow does not take the run ({error})",
            where=f"--tracking_uri {uri}",
            fix="check the address, or `none`",
        ) from None
    return MLflowRun(uri, run_id)


def end_mlflow_run(run: MLflowRun, status: str) -> None:
    """Mark the run FINISHED, FAILED or KILLED."""
    from mlflow.tracking import MlflowClient

    MlflowClient(run.tracking_uri).set_terminated(run.run_id, status=status)


class Tracker:
    """Writes metrics by step to TensorBoard, where it is installed, and to MLflow, where there is a run."""

    def __init__(self, log_dir: Path, run: MLflowRun | None, first_step: int = 0):
        """`first_step` discards what an interrupted run wrote to TensorBoard beyond its last checkpoint."""
        self._writer = None
        if importlib.util.find_spec("tensorboard") is not None:
            # Not tensorboardX, which Ray brings: its `flush` leaves events in a queue, and a kill loses them.
            from torch.utils.tensorboard import SummaryWriter

            # A file's name has its second in it: without the step, a quick restart would write into the same file.
            suffix = f".from-step-{first_step}"
            self._writer = SummaryWriter(str(log_dir), purge_step=first_step or None, filename_suffix=suffix)
        self._run = run
        if run is not None:
            from mlflow.tracking import MlflowClient

            self._client = MlflowClient(run.tracking_uri)

    def log(self, metrics: dict[int, dict[str, float]]) -> None:
        """Write metrics by name, by step; what was written survives a kill."""
        if self._writer is not None:
            for step, values in metrics.items():
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()
        if self._run is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [
            Metric(name, value, now, step)
            for step, values in metrics.items()
            for name, value in values.items()
        ]
        for start in range(0, len(entries), 1000):  # the most that one call takes
            self._client.log_batch(self._run.run_id, metrics=entries[start : start + 1000])

    def log_audio(self, name: str, waveform: np.ndarray, sample_rate: int, step: int) -> None:
        """Give TensorBoard a sound to play; `waveform` (channels, n) in [−1, 1], mixed to mono."""
        if self._writer is not None:
            self._writer.add_audio(name, waveform.mean(axis=0), step, sample_rate=sample_rate)
            self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
