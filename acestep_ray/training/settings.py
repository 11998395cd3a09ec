"""What a worker of a run is told: what to do, and which of the workers it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from acestep_ray.config import TrainConfig
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.storage import Store
from acestep_ray.terminal.numbers import number_text
from acestep_ray.tracking import MLflowRun
from acestep_ray.training.model import build_transformer
from acestep_ray.training.streaming import Stream


@dataclass
class WorkerSettings:
    """What the driver hands to every worker."""

    config: TrainConfig
    lora: dict[str, Any] | None
    """Fields of PEFT's `LoraConfig`; None trains the model's own weights."""
    checkpoints: Store
    samples: Store | None
    """None generates none."""
    log_dir: Store
    mlflow_run: MLflowRun | None
    total_steps: int
    stream: Stream | None = None
    """The songs, where the run has no feature cache."""
    held_out: tuple[int, ...] = ()
    """Songs that are not trained on."""


def never() -> bool:
    """Nobody asks."""
    return False


def nobody() -> None:
    """Nobody waits."""


Build = Callable[[TrainConfig, "dict[str, Any] | None", torch.device], ACEStepTransformer]
"""Makes the model from the settings of a run, its LoRA configuration, if any, and the device to lie on."""


@dataclass(frozen=True)
class WorkerPlace:
    """Which of the run's workers this is, and how it learns of what goes on around it."""

    rank: int
    workers: int
    device: torch.device
    asked_to_stop: Callable[[], bool] = never
    """Whether the user wants the run to end; looked at in every step."""
    asked_to_save: Callable[[], bool] = never
    """Whether this worker's process is about to end; looked at in every step."""
    saved: Callable[[], None] = nobody
    """Called when what was asked for is saved."""
    preempted: Callable[[], bool] = never
    """Whether a machine of the run is about to go; all workers ask together, now and then."""
    build: Build = build_transformer
    """Makes the model; runs of one process may share the base model's weights."""
    turn: contextlib.AbstractContextManager[Any] = field(default_factory=contextlib.nullcontext)
    """Held while the model is at work: runs of one process share torch's random numbers."""
    waiting: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """Gives the turn to others meanwhile."""


Report = Callable[[dict[str, float], "Store | None"], None]
"""Takes the metrics of a checkpoint, and on the first worker its place; every worker calls it as often."""


@dataclass(frozen=True)
class StepsDone:
    """How far a run is."""

    step: int
    total: int
    loss: float
    times_real_time: float | None
    """Seconds of audio a second, of all workers, since the last time; None where there was no step."""

    def __str__(self) -> str:
        return " · ".join([f"step {self.step:,}/{self.total:,}", *self.facts])

    @property
    def facts(self) -> list[str]:
        """What there is to say beside the step."""
        speed = [] if self.times_real_time is None else [f"{number_text(self.times_real_time)} × real time"]
        return [f"loss {self.loss:.4f}", *speed]


Say = Callable[["str | StepsDone"], None]
"""Takes a line for the user, or how far the run is."""
