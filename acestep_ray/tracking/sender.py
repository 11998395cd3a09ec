"""Sending a run's metrics and files to MLflow, while training goes on."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from acestep_ray.errors import without_password
from acestep_ray.tracking.metric_queue import Metric, MetricQueue
from acestep_ray.tracking.mlflow_errors import reason_of
from acestep_ray.tracking.mlflow_run import REQUEST_SECONDS, MLflowRun, short_requests
from acestep_ray.tracking.retry import Retry

UPLOAD_REQUEST_SECONDS = 60
UPLOAD_ATTEMPTS = 4
CLOSE_SECONDS = 60.0
CLOSE_IDLE_SECONDS = 10.0
"""`close` waits no more when nothing was sent for so long."""

Say = Callable[[str], None]


@dataclass
class _Upload:
    directory: Path
    name: str
    retry: Retry = field(default_factory=Retry)


class Sender:
    """Sends a run's metrics and artifacts to MLflow, in order, on a thread of its own."""

    def __init__(
        self, run: MLflowRun, buffer_file: Path, first_step: int, say: Say, *, kept_in: str | None = None
    ):
        """`kept_in` is what the buffer file is called to the user, where a copy of it is what stays."""
        import mlflow.tracking  # noqa: F401, not in the thread, beside the imports of others

        self._run = run
        self._where = f"MLflow at {without_password(run.tracking_uri)}"
        self._buffer_file = kept_in or buffer_file
        self._say = say
        self._client: Any = None
        # Held for all below, and told of what is new and of what is done.
        self._changed = threading.Condition()
        self._metrics = MetricQueue(buffer_file, first_step, say)
        self._uploads: deque[_Upload] = deque()
        self._retry = Retry()
        self._closing = self._ended = False
        self._is_last_try = False
        self._sent_at = 0.0
        threading.Thread(target=self._work, name="mlflow", daemon=True).start()

    def send(self, metrics: Iterable[Metric]) -> None:
        """Send metrics, soon."""
        with self._changed:
            self._metrics.add(metrics)
            self._changed.notify_all()

    def upload(self, directory: Path, name: str) -> None:
        """Send a folder's files as the artifacts `name/…`, when the metrics before are sent."""
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
            seconds = UPLOAD_REQUEST_SECONDS if isinstance(work, _Upload) else REQUEST_SECONDS
            try:
                with short_requests(uri, seconds):
                    if self._client is None:
                        from mlflow.tracking import MlflowClient

                        self._client = MlflowClient(uri)
                    if isinstance(work, _Upload):
                        self._client.log_artifacts(run_id, str(work.directory), work.name)
                    else:
                        self._client.log_batch(run_id, metrics=[_entity(metric) for metric in work])
            except Exception as error:  # every kind of store and network has errors of its own
                self._failed(work, error)
            else:
                self._succeeded(work)

    def _next(self) -> list[Metric] | _Upload | None:
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

    def _succeeded(self, work: list[Metric] | _Upload) -> None:
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

    def _failed(self, work: list[Metric] | _Upload, error: Exception) -> None:
        told = None
        with self._changed:
            if self._ended:
                return
            retry = work.retry if isinstance(work, _Upload) else self._retry
            retry.failed()
            if isinstance(work, _Upload):
                if self._is_last_try or retry.failures == UPLOAD_ATTEMPTS:
                    self._uploads.popleft()
                    told = self._not_uploaded(work, reason_of(error))
            elif retry.failures == 1:
                told = (
                    f"warning: {self._where} takes no metrics ({reason_of(error)}); "
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


def _entity(metric: Metric) -> Any:
    """The metric as MLflow's client takes it."""
    from mlflow import entities

    return entities.Metric(metric.name, metric.value, metric.time_ms, metric.step)
