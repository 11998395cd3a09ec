"""The actor that runs trials on a shared base model.

Whoever holds an actor's handle has loaded its class: trials' own processes stay without torch only as this module is.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from acestep_ray.tuning.loop import Measured, SteppedLoop, Turns

if TYPE_CHECKING:
    from acestep_ray.tracking import MLflowRun
    from acestep_ray.tuning.shared_base import SharedBase
    from acestep_ray.tuning.space import Params
    from acestep_ray.tuning.trial import TrialPlan


class SharedBaseHost:
    """An actor that holds the base model and runs trials on it, in turns of a step each; trials call it from theirs.

    A trial whose own actor is lost and started again takes its place over.
    """

    def __init__(self, seats: int):
        """`seats` trials run at a time."""
        # What `start` needs is loaded while the trials' own actors start.
        from acestep_ray.tuning import shared_base, trial  # noqa: F401

        self.seats = seats
        self.base: SharedBase | None = None
        self.turns = Turns()
        self.loops: dict[str, SteppedLoop] = {}
        # Held by whoever changes the above.
        self.lock = threading.Lock()

    def start(self, plan: TrialPlan, name: str, params: Params, mlflow_run: MLflowRun | None) -> bool:
        """Begin or take over a trial; False where no seat is free. The first one loads the base model."""
        import torch

        from acestep_ray.tuning.shared_base import SharedBase
        from acestep_ray.tuning.trial import start_loop

        self.leave(name)
        with self.lock:
            if len(self.loops) >= self.seats:
                return False
            device = torch.device("cuda" if plan.use_gpu else "cpu")
            if self.base is None:
                self.base = SharedBase(plan.config, device)
            self.loops[name] = start_loop(
                plan, name, params, mlflow_run, device, build=self.base.build, turns=self.turns
            )
            return True

    def next(self, name: str) -> tuple[Measured | None, dict[str, Any] | None]:
        """What the trial's next validation measures, or None and what the run returned."""
        loop = self.loops[name]
        return loop.next(), loop.outcome

    def leave(self, name: str) -> None:
        """End a trial and free its seat."""
        with self.lock:
            loop = self.loops.pop(name, None)
        if loop is not None:
            loop.stop()
