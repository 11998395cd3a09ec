"""The training loop of a trial, from one validation to the next: Tune decides after each whether it goes on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypedDict


class Measured(TypedDict):
    """What a validation measured, over fixed noise."""

    step: int
    validation: float
    """Loss of the songs held out."""
    train: float
    """Loss of songs that are trained on."""


class StoppedError(Exception):
    """Ends the loop's thread from within its report."""


class SteppedLoop:
    """A loop in a thread of its own that waits at every report until it is asked for the next one."""

    def __init__(self, work: Callable[[Callable[[Measured], None]], dict[str, Any]]):
        """Begin `work`, which takes the function to report with and returns the run's losses, with its `step`."""
        self._work = work
        # All below belongs to whoever holds it, and both sides are told of changes.
        self._changed = threading.Condition()
        self._measured: Measured | None = None
        self._is_taken = False
        self._is_stopped = False
        self._error: BaseException | None = None
        self._outcome: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._run, name="trial", daemon=True)
        self._thread.start()

    def next(self) -> Measured | None:
        """What the next validation measures; None when the loop has ended. Raises what ended it otherwise."""
        with self._changed:
            if self._is_taken:
                self._measured, self._is_taken = None, False
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._measured is not None or not self._is_running)
            if self._error is not None:
                raise self._error
            self._is_taken = self._measured is not None
            return self._measured

    @property
    def outcome(self) -> dict[str, Any] | None:
        """What the loop returned."""
        return self._outcome

    def stop(self) -> None:
        """End the loop at its report, and wait until what it had to write is written."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def _is_running(self) -> bool:
        return self._outcome is None and self._error is None

    def _run(self) -> None:
        outcome, error = None, None
        try:
            outcome = self._work(self._report)
        except StoppedError:
            outcome = {}
        except BaseException as raised:
            error = raised
        with self._changed:
            self._outcome, self._error = outcome, error
            self._changed.notify_all()

    def _report(self, measured: Measured) -> None:
        with self._changed:
            self._measured = measured
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._measured is None or self._is_stopped)
            if self._is_stopped:
                raise StoppedError


class Turns:
    """Lets one of several loops work at a time; a context manager for each loop's thread."""

    def __init__(self) -> None:
        self._lock = _FairLock()

    def __enter__(self) -> Turns:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def waiting(self) -> int:
        """How many loops wait for their turn."""
        return self._lock.waiting

    @contextlib.contextmanager
    def given_up(self) -> Iterator[None]:
        """Let others work meanwhile."""
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()


class _FairLock:
    """A lock that goes round: threads get it in the order in which they asked, where Python's own prefers its last."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = self._served = 0

    @property
    def waiting(self) -> int:
        with self._changed:
            return max(self._next - self._served - 1, 0)

    def acquire(self) -> None:
        with self._changed:
            ticket = self._next
            self._next += 1
            self._changed.wait_for(lambda: self._served == ticket)

    def release(self) -> None:
        with self._changed:
            self._served += 1
            self._changed.notify_all()
