"""A trial of several workers: a Ray Train run inside the trial."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.api.result import Result

from acestep_ray.errors import AceStepError
from acestep_ray.ray_runtime import StopSignal, beside_driver, share_of
from acestep_ray.tracking import MLflowRun
from acestep_ray.training.launch import rays_book, run_worker
from acestep_ray.training.leaving import SavingTorchConfig
from acestep_ray.tuning.loop import Measured, SteppedLoop
from acestep_ray.tuning.space import Params
from acestep_ray.tuning.trial import TrialPlan, read_measured, say_warnings, trial_settings

_MAIL_SECONDS = 0.2


class TrainRun:
    """The loop of a trial on Ray Train's workers, as a `SteppedLoop`; workers may be a validation ahead of Tune."""

    def __init__(self, plan: TrialPlan, name: str, params: Params, mlflow_run: MLflowRun | None):
        self._settings = trial_settings(plan, name, params, mlflow_run)
        self._mail = beside_driver(_Mail).remote()
        self._stack = contextlib.ExitStack()
        storage_path, book = self._stack.enter_context(rays_book(self._settings.checkpoints))
        self._stop = StopSignal()
        # Ray's type has it return nothing.
        work: Callable[[], Any] = partial(
            run_worker,
            self._settings,
            partial(say_warnings, plan.say, name),
            _AnyOf((plan.stop.asked, self._stop.asked)),
        )
        self._trainer = TorchTrainer(
            work,
            torch_config=SavingTorchConfig(),
            scaling_config=ScalingConfig(
                num_workers=self._settings.config.devices,
                use_gpu=plan.use_gpu,
                resources_per_worker={
                    "GPU" if plan.use_gpu else "CPU": plan.worker_cpus,
                    **share_of(plan.config.worker_resource),
                },
            ),
            run_config=RunConfig(
                storage_path=storage_path,
                name=book,
                failure_config=FailureConfig(max_failures=self._settings.config.max_failures),
                callbacks=[_Forward(self._mail)],  # type: ignore[list-item]  # mypy takes `RunConfig` for the older one
            ),
        )
        self._loop = SteppedLoop(self._work)

    @property
    def outcome(self) -> dict[str, Any] | None:
        """What the first worker returned."""
        return self._loop.outcome

    def next(self) -> Measured | None:
        """What the next validation measures; None when the run has ended. Raises what ended it otherwise."""
        return self._loop.next()

    def stop(self) -> None:
        """Let the workers come to their end, which gives back what they had reserved."""
        self._stop.request()
        self._loop.stop()

    def _work(self, report: Callable[[Measured], None]) -> dict[str, Any]:
        with self._stack, ThreadPoolExecutor(1) as executor:
            running = executor.submit(self._trainer.fit)
            is_done = False
            while not is_done:
                # Looked at before the mail is taken: what was reported before the end is passed on.
                is_done = bool(wait([running], timeout=_MAIL_SECONDS).done)
                for metrics in ray.get(self._mail.take.remote()):
                    measured = read_measured(metrics, self._settings)
                    if measured is not None:
                        report(measured)
        try:
            outcome = cast(Result, running.result()).return_value
        except TrainingFailedError as error:
            ours = [e for e in getattr(error, "worker_failures", {}).values() if isinstance(e, AceStepError)]
            raise ours[0] if ours else error from error
        if isinstance(outcome, AceStepError):
            raise outcome
        assert outcome is not None, "the loop of a worker returns one"
        return outcome


class _Mail:
    """An actor that holds what the workers' run reports until the trial takes it."""

    def __init__(self) -> None:
        self.reports: list[dict[str, float]] = []

    def put(self, metrics: dict[str, float]) -> None:
        self.reports.append(metrics)

    def take(self) -> list[dict[str, float]]:
        reports, self.reports = self.reports, []
        return reports


class _Forward(UserCallback):
    """Sends the first worker's reports on."""

    def __init__(self, mail: ActorHandle[_Mail]):
        self.mail = mail

    def after_report(self, run_context: Any, metrics: list[dict[str, float]], checkpoint: Any) -> None:
        """Ray Train's controller calls this when all workers have reported."""
        ray.get(self.mail.put.remote(metrics[0]))


class _AnyOf:
    """Asks whether anybody asks."""

    def __init__(self, asks: Sequence[Callable[[], bool]]):
        self.asks = asks

    def __call__(self) -> bool:
        return any(ask() for ask in self.asks)
