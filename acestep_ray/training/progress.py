"""How far a run is, and what its workers ask for on the way."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from acestep_ray.training.settings import Say, StepsDone

PROGRESS_SECONDS = 2.0


class Votes:
    """What any worker has asked for: to save, and to stop. Read a step later, so that nobody waits for the GPU."""

    def __init__(self) -> None:
        self.before, self.now = torch.zeros(2), torch.zeros(2)
        self.copied: torch.cuda.Event | None = None

    def put(self, votes: Tensor) -> None:
        """Note the votes of a step, (2,), of all workers."""
        if self.copied is not None:
            self.copied.synchronize()  # of the step before, which is done by now
        self.before = self.now
        if votes.is_cuda:
            self.now = torch.empty(2, pin_memory=True)
            self.now.copy_(votes, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self.now = votes.clone()

    def take(self) -> tuple[bool, bool]:
        """Whether somebody wanted to save, or to stop, in the step before; on a single worker, in this one."""
        save, stop = (self.before if self.copied is not None else self.now).tolist()
        return save > 0, stop > 0


class Progress:
    """Tells how far the run is, now and then."""

    def __init__(self, total: int, say: Say):
        self.total = total
        self.say = say
        self.shown = 0.0

    def show(self, step: int, loss: float, times_real_time: float | None) -> None:
        """Tell, if the last time is some seconds ago or this is the end."""
        now = time.monotonic()
        if step == self.total or now - self.shown >= PROGRESS_SECONDS:
            self.shown = now
            self.say(StepsDone(step, self.total, loss, times_real_time))
