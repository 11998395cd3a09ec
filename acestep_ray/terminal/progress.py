"""How far a long job is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO, TypeVar

from acestep_ray.terminal.console import is_terminal, is_verbose, rich_console
from acestep_ray.terminal.escapes import visible_line, visible_message
from acestep_ray.terminal.numbers import number_text
from acestep_ray.terminal.streams import escape_redirected

if TYPE_CHECKING:
    import rich.progress

Item = TypeVar("Item")

_SECONDS_BETWEEN_REDRAWS = 0.2
_SHORT_SECONDS = 1.0
_BAR_WIDTH = 24


def whole(number: float) -> str:
    """A count as text."""
    return f"{number:,.0f}"


class Progress:
    """How far a job is, on standard error, with its rate and the time that is left; any thread may tell.

    On a terminal it is a bar below whatever is printed meanwhile. Elsewhere, and among Ray's logs (`-v`), it is a plain
    line every half minute and one at the end, and nothing where a job is done sooner.
    """

    def __init__(
        self,
        title: str,
        total: float,
        unit: str,
        *,
        amount: Callable[[float], str] = whole,
        stream: TextIO | None = None,
        seconds_between_lines: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`total` of `unit`, such as "songs"; `amount` writes a number of them."""
        self._title, self._total, self._unit, self._amount = visible_line(title), total, unit, amount
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._draws = is_terminal(self._stream) and not is_verbose()
        self._interval = _SECONDS_BETWEEN_REDRAWS if self._draws else seconds_between_lines
        self._lock = threading.RLock()
        self._bar: rich.progress.Progress | None = None
        self._began = self._shown = clock()
        # Amount and time from which the rate is counted: before them models are loaded.
        self._first: tuple[float, float] | None = None
        self._has_ended = False

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Show that the job begins."""
        self._began = self._shown = self._clock()
        if not self._draws:
            return
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(_BAR_WIDTH, complete_style="cyan", finished_style="green"),
            TextColumn("{task.fields[told]}", markup=False),
            console=rich_console(self._stream),
            refresh_per_second=1 / _SECONDS_BETWEEN_REDRAWS,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._shown -= self._interval  # the first state is drawn at once
        self._bar.start()
        escape_redirected()
        self._bar.add_task(self._title, total=self._total, told="")

    def stop(self) -> None:
        """Leave the last state on the screen, unless it was over in a moment, and the cursor below it."""
        if self._bar is not None:
            self._bar.live.transient = self._clock() - self._began < _SHORT_SECONDS
            self._bar.stop()
            self._bar = None

    def over(self, items: Sequence[Item]) -> Iterator[Item]:
        """The items one after another, each of which is done when the next is asked for."""
        with self:
            self.update(0)
            for done, item in enumerate(items, 1):
                yield item
                self.update(done)

    def update(self, done: float, *facts: str) -> None:
        """Tell that so much is done, with other facts of the moment, if the last time is long enough ago."""
        with self._lock:
            now = self._clock()
            if self._first is None or done < self._first[0]:  # a run that goes back to its checkpoint
                self._first = done, now
            is_end = done >= self._total
            # The last line belongs to others before it.
            is_wanted = self._bar is not None or (self._shown > self._began and not self._has_ended)
            if now - self._shown < self._interval and not (is_end and is_wanted):
                return
            self._shown, self._has_ended = now, is_end
            told = self._told(done, now, facts)
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=done, told=told)
            else:
                self._print(f"{self._title}: {told}")

    def say(self, line: str) -> None:
        """Print a line that stays."""
        line = visible_message(line)
        with self._lock:
            if self._bar is not None:
                self._bar.console.print(line)
            else:
                self._print(line)

    def _told(self, done: float, now: float, facts: tuple[str, ...]) -> str:
        assert self._first is not None, "`update` has set it"
        told = [f"{self._amount(done)}/{self._amount(self._total)} {self._unit}".rstrip()]
        told += map(visible_line, facts)
        first, since = self._first
        if done > first and now > since:
            rate = (done - first) / (now - since)
            told.append(self._rate(rate))
            if done < self._total:
                told.append(f"{duration((self._total - done) / rate)} left")
        if done >= self._total:
            told.append(f"took {duration(now - self._began)}")
        return " · ".join(told)

    def _rate(self, rate: float) -> str:
        if self._amount is not whole:
            return f"{self._amount(rate)}/s"
        if rate < 1:
            return f"{number_text(1 / rate)} s/{self._unit.removesuffix('s')}"
        return f"{number_text(rate)} {self._unit}/s"

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """0:07, 12:30, 3:05:00 or 2 d 04 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02d} h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
