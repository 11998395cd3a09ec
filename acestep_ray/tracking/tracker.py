"""What the training loop gives its metrics, sounds and files to."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from acestep_ray.storage import Store
from acestep_ray.tracking.event_file import EventFile
from acestep_ray.tracking.metric_queue import Metric
from acestep_ray.tracking.mirror import Mirror
from acestep_ray.tracking.mlflow_run import MLflowRun
from acestep_ray.tracking.sender import Sender

BUFFER_FILE = "mlflow-buffer.jsonl"
LARGEST_MIRRORED_BYTES = 16 * 2**20
"""Events go on in another file then: one that has grown is copied whole."""

Say = Callable[[str], None]


class Tracker:
    """Writes metrics by step to TensorBoard, where it is installed, and to MLflow, where there is a run.

    Nothing here raises for a server or a disk that fails, or waits for one but `close`: it is told, tried again, and
    told when it works.
    """

    def __init__(
        self, log_dir: Path | Store, run: MLflowRun | None, first_step: int = 0, *, say: Say = print
    ):
        """`first_step` discards what an interrupted run wrote, or left unsent, beyond its last checkpoint.

        What belongs to a `log_dir` in object storage is written on this machine, and copied there now and then.
        """
        store = Store.at(log_dir)
        self._mirror = None
        largest_file = None
        if not store.is_local:
            self._mirror = Mirror(store, brought=[] if run is None else [BUFFER_FILE], say=say)
            largest_file = LARGEST_MIRRORED_BYTES
        folder = store.path if self._mirror is None else self._mirror.folder
        self._events = None
        if importlib.util.find_spec("tensorboard") is not None:
            self._events = EventFile(folder, first_step, say, largest_file=largest_file)
        self._sender = None
        if run is not None:
            kept_in = store.url_of(BUFFER_FILE)
            self._sender = Sender(run, folder / BUFFER_FILE, first_step, say, kept_in=kept_in)

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
                    Metric(step, name, float(value), now)
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
        if self._mirror is not None:
            self._mirror.close()
