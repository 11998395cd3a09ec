"""A trial as a training run: its settings, its folder, and its loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from acestep_ray.config import TrainConfig
from acestep_ray.ray_runtime import StopSignal
from acestep_ray.storage import Store
from acestep_ray.tracking import MLflowRun
from acestep_ray.training.experiment import CHECKPOINTS
from acestep_ray.training.model import build_transformer
from acestep_ray.training.settings import Build, StepsDone, WorkerPlace, WorkerSettings
from acestep_ray.training.streaming import Stream
from acestep_ray.training.validation import FIXED_NOISE, VALIDATION
from acestep_ray.training.worker import train_worker
from acestep_ray.tuning.loop import Measured, SteppedLoop, Turns
from acestep_ray.tuning.space import Params, apply_params

TRIALS = "trials"


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a search have in common."""

    config: TrainConfig
    """Settings of every trial, but what is searched."""
    lora: dict[str, Any]
    """Fields of PEFT's `LoraConfig`, likewise."""
    folder: Store
    """Of the search."""
    log_dir: Store
    total_steps: int
    stream: Stream | None
    held_out: tuple[int, ...]
    use_gpu: bool
    say: Callable[[str], None]
    stop: StopSignal
    worker_cpus: float = 1.0
    """What each worker reserves, of a trial of several without GPUs."""


def trial_folder(search: Store, name: str) -> Store:
    """Where a trial's checkpoints and record lie."""
    return search.child(TRIALS).child(name)


def trial_settings(
    plan: TrialPlan, name: str, params: Params, mlflow_run: MLflowRun | None
) -> WorkerSettings:
    """The settings of a trial's run, which goes on from the checkpoints in the trial's folder."""
    config, lora = apply_params(params, plan.config, plan.lora)
    return WorkerSettings(
        config=config,
        lora=lora,
        checkpoints=trial_folder(plan.folder, name).child(CHECKPOINTS),
        samples=None,
        log_dir=plan.log_dir.child(name),
        mlflow_run=mlflow_run,
        total_steps=plan.total_steps,
        stream=plan.stream,
        held_out=plan.held_out,
    )


def start_loop(
    plan: TrialPlan,
    name: str,
    params: Params,
    mlflow_run: MLflowRun | None,
    device: torch.device,
    *,
    build: Build = build_transformer,
    turns: Turns | None = None,
) -> SteppedLoop:
    """Begin or continue a trial as the only worker of its run, in a thread of this process."""
    settings = trial_settings(plan, name, params, mlflow_run)
    waiting = contextlib.nullcontext if turns is None else turns.given_up
    place = WorkerPlace(
        rank=0,
        workers=1,
        device=device,
        asked_to_stop=plan.stop.asked,
        build=build,
        turn=turns or contextlib.nullcontext(),
        waiting=waiting,
    )

    def work(report: Callable[[Measured], None]) -> dict[str, Any]:
        def report_validation(metrics: dict[str, float], _checkpoint: Store | None) -> None:
            measured = read_measured(metrics, settings)
            if measured is not None:
                with waiting():
                    report(measured)

        return train_worker(settings, place, report_validation, partial(say_warnings, plan.say, name))

    return SteppedLoop(work)


def read_measured(metrics: dict[str, float], settings: WorkerSettings) -> Measured | None:
    """What was measured at a checkpoint; None for one between two validations, of a run that was asked to stop."""
    step, pace = int(metrics["step"]), settings.config.val_check_interval
    assert pace is not None, "a search gives its trials one"
    if step % pace and step != settings.total_steps:
        return None
    return {"step": step, "validation": metrics[VALIDATION], "train": metrics[FIXED_NOISE]}


def last_measured(outcome: dict[str, Any]) -> Measured:
    """The last validation of a run that has ended, from what it returned."""
    step, validation = list(outcome[VALIDATION].items())[-1]
    return {"step": int(step), "validation": validation, "train": outcome[FIXED_NOISE][step]}


def say_warnings(say: Callable[[str], None], name: str, line: str | StepsDone) -> None:
    """Pass a trial's warnings on; how far each of many trials is would fill the terminal."""
    if isinstance(line, str) and line.startswith("warning"):
        say(f"{name}: {line}")
