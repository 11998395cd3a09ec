"""How far a job is, as lines without a terminal."""

from __future__ import annotations

import io

import pytest

from acestep_ray.terminal import Progress
from acestep_ray.terminal.progress import duration


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def told(clock: Clock, steps: list[tuple[float, float]], total: float = 9, **options) -> list[str]:
    """The lines of a job that has done so much, by time."""
    stream = io.StringIO()
    with Progress(
        "encoding", total, options.pop("unit", "songs"), stream=stream, clock=clock, **options
    ) as job:
        for clock.now, done in steps:
            job.update(done, f"{int(done) // 5} rejected")
    return stream.getvalue().splitlines()


def test_a_line_now_and_then_counts_its_rate_from_the_first_song(clock):
    # The first song ends at 1000 s, when the models are loaded.
    assert told(clock, [(1000 + 10 * i, 1 + i) for i in range(9)]) == [
        "encoding: 1/9 songs · 0 rejected",
        "encoding: 4/9 songs · 0 rejected · 10 s/song · 0:50 left",
        "encoding: 7/9 songs · 1 rejected · 10 s/song · 0:20 left",
        "encoding: 9/9 songs · 1 rejected · 10 s/song · took 18:00",
    ]


def test_a_job_that_is_done_at_once_says_nothing(clock):
    assert told(clock, [(0, 0), (10, 5), (29, 9)]) == []


def test_the_end_is_told_once(clock):
    assert len(told(clock, [(0, 0), (40, 5), (50, 9), (51, 9)])) == 2


def test_a_run_that_goes_back_to_its_checkpoint_is_counted_from_there(clock):
    lines = told(clock, [(0, 500), (100, 600), (200, 400), (300, 500)], total=1000, unit="steps")
    assert lines[-1] == "encoding: 500/1,000 steps · 100 rejected · 1 steps/s · 8:20 left"


def test_amounts_may_have_a_text_of_their_own(clock):
    lines = told(clock, [(0, 0), (40, 80e6)], total=100e6, unit="", amount=lambda n: f"{n / 1e6:g} MB")
    assert lines == ["encoding: 80 MB/100 MB · 16000000 rejected · 2 MB/s · 0:10 left"]


def test_among_rays_logs_a_terminal_gets_lines_too(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("ACESTEP_VERBOSE", "1")
    stream = Terminal()
    with Progress("encoding", 9, "songs", stream=stream, clock=clock) as job:
        job.update(1)
        clock.now = 40.0
        job.update(3)
    assert stream.getvalue() == "encoding: 3/9 songs · 20 s/song · 2:00 left\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(7, "0:07"), (750, "12:30"), (11_100, "3:05:00"), (187_200, "2 d 04 h")]
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert duration(seconds) == text
