"""What Ray Tune runs for a trial: it asks the trial's loop for one validation after another."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnschedulableError, RayActorError, RayTaskError

from acestep_ray.errors import AceStepError, GpuMemoryError
from acestep_ray.ray_runtime import StopSignal
from acestep_ray.storage import full_disk_of
from acestep_ray.tuning.loop import Measured, SteppedLoop

if TYPE_CHECKING:
    from acestep_ray.tracking import MLflowRun
    from acestep_ray.tuning.host import SharedBaseHost
    from acestep_ray.tuning.space import Params
    from acestep_ray.tuning.train_run import TrainRun
    from acestep_ray.tuning.trial import TrialPlan

NOTHING = {"step": 0, "validation": math.nan}
"""In place of a validation, in a result that says what has happened instead."""
_SEAT_SECONDS = 0.2
_INTERRUPTED_SECONDS = 0.5
# How a call to a host ends whose node is gone.
_LOST = (ActorDiedError, ActorUnschedulableError)


class TrialActor(tune.Trainable):
    """A trial in its own process, on a shared base model, or as a run of several workers.

    Its checkpoints are its run's, in the trial's folder; started again, it goes on from there.
    """

    def setup(  # type: ignore[override]  # Tune's `with_parameters` brings what comes after `config`
        self,
        config: dict[str, Any],
        plan: Sequence[ray.ObjectRef[TrialPlan]],
        stop: StopSignal,
        total_steps: int,
        hosts: Sequence[ActorHandle[SharedBaseHost]],
        workers: int,
    ) -> None:
        """`config` has the trial's `name`, its `params` and its `mlflow_run`; `plan` is where the search's plan lies.

        A trial on a shared base never fetches it, nor loads the libraries that its types need.
        """
        (self.plan,) = plan
        self.total_steps, self.hosts, self.workers = total_steps, hosts, workers
        self.asked_to_stop = stop.asked
        self.loop: SteppedLoop | TrainRun | HostedLoop | None = None

    def step(self) -> dict[str, Any]:
        """Train up to the next validation; what it measured, and whether it was the last.

        An error that the run would meet again is a result too; others are raised, and Tune starts the trial again.
        """
        # Not before: Tune may have two actors set up for a trial, of which one is never asked for a step.
        if self.loop is None:
            self.loop = self.begin()
        try:
            measured = self.loop.next()
        except GpuMemoryError as error:
            self.cleanup()  # started again, it may find more: other trials will have ended
            raise GpuMemoryError(f"{error}, or {self.fewer_at_once}") from error
        except Exception as error:
            is_full = full_disk_of(error) is not None
            if is_full or isinstance(error, AceStepError):
                return {**NOTHING, "error": str(error), "is_disk_full": is_full, "done": True}
            self.cleanup()  # before another actor goes on with the trial
            raise
        if measured is not None:
            is_last = measured["step"] == self.total_steps
            return {**measured, "is_last": is_last, "done": is_last}
        if self.asked_to_stop():
            time.sleep(_INTERRUPTED_SECONDS)
            return {**NOTHING, "interrupted": True}
        from acestep_ray.tuning.trial import last_measured

        outcome = self.loop.outcome
        assert outcome is not None, "a loop that has ended has one"
        return {**last_measured(outcome), "is_last": True, "done": True}

    @property
    def fewer_at_once(self) -> str:
        """How trials that share a GPU need less of its memory."""
        return "fewer trials at a time (a larger --gpus_per_trial)" + (
            "" if self.hosts else ", or --share_base"
        )

    def begin(self) -> SteppedLoop | TrainRun | HostedLoop:
        """Begin or continue the run of the trial."""
        arguments = (self.config["name"], self.config["params"], self.config["mlflow_run"])
        if self.hosts:
            return HostedLoop(self.plan, self.hosts, *arguments)
        plan = ray.get(self.plan)
        if self.workers > 1:
            from acestep_ray.tuning.train_run import TrainRun

            return TrainRun(plan, *arguments)
        import torch

        from acestep_ray.tuning.trial import start_loop

        return start_loop(plan, *arguments, torch.device("cuda" if plan.use_gpu else "cpu"))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another trial in this process, which has loaded its libraries already."""
        self.cleanup()
        self.config = new_config
        return True

    def cleanup(self) -> None:
        """End the run; its last checkpoint is written then."""
        loop, self.loop = self.loop, None
        if loop is not None:
            loop.stop()


class HostedLoop:
    """The loop of a trial on a shared base model, in the actor that holds it."""

    def __init__(
        self,
        plan: ray.ObjectRef[TrialPlan],
        hosts: Sequence[ActorHandle[SharedBaseHost]],
        name: str,
        params: Params,
        mlflow_run: MLflowRun | None,
    ):
        self.name = name
        self.outcome: dict[str, Any] | None = None
        while (host := self._free_host(hosts, plan, params, mlflow_run)) is None:
            time.sleep(_SEAT_SECONDS)  # a trial that was stopped is about to leave its seat
        self.host = host

    def next(self) -> Measured | None:
        """As of a `SteppedLoop`."""
        try:
            measured, self.outcome = ray.get(self.host.next.remote(self.name))
        except RayTaskError as error:
            raise error.cause from error  # without Ray's account of where it was
        return measured

    def stop(self) -> None:
        """As of a `SteppedLoop`."""
        with contextlib.suppress(RayActorError, *_LOST):  # a host that is lost runs nothing any more
            ray.get(self.host.leave.remote(self.name))

    def _free_host(
        self,
        hosts: Sequence[ActorHandle[SharedBaseHost]],
        plan: ray.ObjectRef[TrialPlan],
        params: Params,
        mlflow_run: MLflowRun | None,
    ) -> ActorHandle[SharedBaseHost] | None:
        """A host that has begun the trial, any of those with a free seat. Raises RuntimeError where none is left."""
        lost = 0
        for host in random.sample(hosts, len(hosts)):
            try:
                if ray.get(host.start.remote(plan, self.name, params, mlflow_run)):
                    return host
            except _LOST:
                lost += 1  # with its node: trials go on with the others
        if lost == len(hosts):
            raise RuntimeError("the nodes of all shared base models are lost")
        return None
