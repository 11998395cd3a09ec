"""Running the loop on Ray Train's workers, and bringing it to an end when the user asks."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from acestep_ray.autoscaling import bring_nodes
from acestep_ray.config import TrainConfig
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.ray_runtime import Console, StopSignal, cluster_cpus, nodes_with, share_of
from acestep_ray.storage import Store, scratch_folder
from acestep_ray.terminal import Progress, show_line
from acestep_ray.tracking import end_mlflow_run
from acestep_ray.training.leaving import SavingTorchConfig, leaving
from acestep_ray.training.settings import Say, StepsDone, WorkerPlace, WorkerSettings
from acestep_ray.training.worker import TrainingDivergedError, train_worker

_SIGNAL_SECONDS = 0.2
# How long Ray Train waits for the machines of its workers, until it looks again at which there are.
_START_TIMEOUT_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_ELASTIC_START_SECONDS = 5


def resolve_training_device(config: TrainConfig) -> bool:
    """Whether the workers take a GPU each; nodes that are missing are asked of the autoscaler.

    Raises InputError when there are too few all the same.
    """

    def available(resource: str) -> int:
        nodes = nodes_with(config.worker_resource, "--worker_resource")
        return sum(int(node["Resources"].get(resource, 0)) for node in nodes)

    use_gpu = config.device == "cuda" or (config.device == "auto" and available("GPU") > 0)
    resource = "GPU" if use_gpu else "CPU"
    workers = config.devices * config.num_nodes
    needed = config.min_devices or workers
    # Workers are placed all or none, and Ray Train would wait for them in silence.
    if available(resource) < needed and not bring_nodes(
        [{resource: 1, **share_of(config.worker_resource)}] * needed, lambda: available(resource) >= needed
    ):
        raise InputError(
            f"{workers} workers need a {resource} each, and there are {available(resource)}",
            where=f"--devices {config.devices}"
            + (f" --num_nodes {config.num_nodes}" * (config.num_nodes > 1))
            + (f" --worker_resource {config.worker_resource}" * (config.worker_resource is not None)),
            fix="use fewer devices, or a larger cluster",
        )
    return use_gpu


def run_workers(settings: WorkerSettings, use_gpu: bool) -> dict[str, Any]:
    """Run the loop on Ray Train's workers; returns the first worker's losses.

    Raises KeyboardInterrupt where the user ended the run.
    """
    config = settings.config
    progress = Progress("training", settings.total_steps, "steps")
    console, stop = Console(partial(show, progress)), StopSignal()
    workers = config.devices * config.num_nodes
    range_of_workers = (config.min_devices, workers) if is_elastic(config) else workers
    stack = contextlib.ExitStack()
    storage_path, name = stack.enter_context(rays_book(settings.checkpoints))
    # Not as `train_loop_config`, which Ray Train's controller would unpickle too, seconds of imports for nothing. Ray's
    # type has it return nothing.
    work: Callable[[], Any] = partial(run_worker, settings, console.say, stop.asked)
    trainer = TorchTrainer(
        work,
        # NCCL moves what is on GPUs; what `cpu_offload` keeps in the host's memory takes gloo.
        torch_config=SavingTorchConfig(
            backend="cpu:gloo,cuda:nccl" if use_gpu and config.cpu_offload else None
        ),
        scaling_config=ScalingConfig(
            num_workers=range_of_workers,  # type: ignore[arg-type]  # mypy takes `ScalingConfig` for the older one
            use_gpu=use_gpu,
            resources_per_worker=reserved_by_worker(settings, use_gpu),
        ),
        run_config=RunConfig(
            storage_path=storage_path,
            name=name,
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    status = "FAILED"
    try:
        with stack, progress, console, short_wait_for_lost_nodes(config):
            result, interrupted = fit_interruptibly(trainer.fit, stop.request)
        outcome = result.return_value
        if isinstance(outcome, AceStepError):
            raise outcome
        if interrupted and outcome["step"] < settings.total_steps:
            print(
                f"stopped at step {outcome['step']}, which is saved: the same command goes on from there",
                flush=True,
            )
            raise KeyboardInterrupt
        status = "FINISHED"
        return outcome
    except TrainingFailedError as error:
        ours = [e for e in getattr(error, "worker_failures", {}).values() if isinstance(e, AceStepError)]
        raise ours[0] if ours else AceStepError(f"training failed\n{error}") from error
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if settings.mlflow_run is not None:
            end_mlflow_run(settings.mlflow_run, status)


def show(progress: Progress, told: str | StepsDone) -> None:
    """Show what a worker tells: how far the run is, or a line."""
    if isinstance(told, StepsDone):
        progress.update(told.step, *told.facts)
    else:
        show_line(told)


def is_elastic(config: TrainConfig) -> bool:
    """Whether the run also goes on with fewer workers."""
    return config.min_devices not in (None, config.devices * config.num_nodes)


@contextlib.contextmanager
def short_wait_for_lost_nodes(config: TrainConfig) -> Iterator[None]:
    """Let a run that can do with fewer workers wait for a lost node for seconds and not Ray Train's minute.

    A value that the environment has already goes before.
    """
    if not is_elastic(config) or _START_TIMEOUT_VARIABLE in os.environ:
        yield
        return
    os.environ[_START_TIMEOUT_VARIABLE] = str(
        _ELASTIC_START_SECONDS
    )  # Ray takes it along when the run starts
    try:
        yield
    finally:
        del os.environ[_START_TIMEOUT_VARIABLE]


def fit_interruptibly(fit: Callable[[], Any], stop: Callable[[], None]) -> tuple[Any, bool]:
    """Call `fit`; returns its result, and whether it was asked to come to an end.

    SIGINT (Ctrl-C) and SIGTERM ask for that through `stop`, so that the last step is saved; a second one raises
    KeyboardInterrupt at once. Away from the main thread, signals are somebody else's.
    """
    if threading.current_thread() is not threading.main_thread():
        return fit(), False
    signals: list[int] = []

    def note(number: int, _frame: object) -> None:
        signals.append(number)
        if len(signals) > 1:
            raise KeyboardInterrupt
        print("stopping after this step, with a checkpoint; once more ends it at once", flush=True)
        stop()

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    # In a thread of its own Ray Train does not take the signals over.
    outcome: Future[Any] = Future()
    thread = threading.Thread(target=_fulfil, args=(outcome, fit), daemon=True)
    try:
        thread.start()
        while not outcome.done():
            thread.join(timeout=_SIGNAL_SECONDS)
        return outcome.result(), bool(signals)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _fulfil(outcome: Future[Any], work: Callable[[], Any]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as error:
        outcome.set_exception(error)


def reserved_by_worker(settings: WorkerSettings, use_gpu: bool) -> dict[str, float] | None:
    """What each worker reserves, None for Ray's default: where songs are streamed, half of the CPUs decode."""
    place = share_of(settings.config.worker_resource)
    if settings.stream is None or use_gpu:
        return {"GPU" if use_gpu else "CPU": 1, **place} if place else None
    workers = settings.config.devices * settings.config.num_nodes
    share = cluster_cpus() / 2 / workers
    return {"CPU": min(1.0, math.floor(share * 1000) / 1000), **place}


def run_worker(
    settings: WorkerSettings, say: Say, asked_to_stop: Callable[[], bool]
) -> dict[str, Any] | AceStepError:
    """What Ray Train runs in each worker.

    Our own errors come back as a value, for starting again would not mend them; but not one that the other workers may
    not have met: they would wait for this one without end.
    """
    context = ray.train.get_context()
    place = WorkerPlace(
        rank=context.get_world_rank(),
        workers=context.get_world_size(),
        device=ray.train.torch.get_device(),
        asked_to_stop=asked_to_stop,
        asked_to_save=leaving.asked,
        saved=leaving.saved.set,
        preempted=lambda: ray.train.get_preemption_info() is not None,
    )
    try:
        with leaving:
            return train_worker(settings, place, report_to_ray, say)
    except AceStepError as error:
        if place.workers > 1 and not isinstance(error, TrainingDivergedError):
            raise
        return error


@contextlib.contextmanager
def rays_book(checkpoints: Store) -> Iterator[tuple[str, str]]:
    """The folder and the name under which Ray Train keeps its own book: where we write checkpoints.

    Of those in object storage Ray knows nothing, and its book is a folder of the driver's machine for as long as it is
    needed.
    """
    if checkpoints.is_local:
        yield str(checkpoints.parent.path), checkpoints.name
        return
    with scratch_folder() as folder:
        yield str(folder), checkpoints.name


def report_to_ray(metrics: dict[str, float], checkpoint: Store | None) -> None:
    """Tell Ray Train of a checkpoint; all workers meet here.

    Of one in object storage Ray need not know: workers that start again look for it themselves.
    """
    in_book = None
    if checkpoint is not None and checkpoint.is_local:
        in_book = ray.train.Checkpoint(str(checkpoint.path))
    ray.train.report(
        metrics,
        checkpoint=in_book,
        # It is written where it belongs already.
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
    )
