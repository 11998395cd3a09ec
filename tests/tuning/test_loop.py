"""The loop of a trial stands still between validations, and several loops take turns."""

from __future__ import annotations

import threading
import time

import pytest

from acestep_ray.tuning.loop import SteppedLoop, Turns


def test_it_goes_on_only_when_it_is_asked():
    reached = []

    def work(report):
        for step in (1, 2, 3):
            reached.append(step)
            report({"step": step})
        return {"step": 3}

    loop = SteppedLoop(work)
    assert loop.next() == {"step": 1}
    assert reached == [1]
    assert loop.next() == {"step": 2}
    assert reached == [1, 2]
    assert loop.next() == {"step": 3}
    assert loop.next() is None
    assert loop.next() is None
    assert loop.outcome == {"step": 3}


def test_a_stop_ends_it_at_its_report_and_waits_for_what_it_still_writes():
    written = []

    def work(report):
        try:
            report({"step": 1})
            written.append("more")
        finally:
            written.append("the checkpoint")

    loop = SteppedLoop(work)
    loop.next()
    loop.stop()
    assert written == ["the checkpoint"]
    assert loop.next() is None


def test_what_ends_it_is_raised():
    def work(report):
        report({"step": 1})
        raise ZeroDivisionError("division by zero")

    loop = SteppedLoop(work)
    loop.next()
    with pytest.raises(ZeroDivisionError):
        loop.next()
    loop.stop()


def test_loops_get_their_turns_in_the_order_in_which_they_asked():
    turns, order = Turns(), []

    def work(name):
        with turns:
            order.append(name)

    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in "abc"]
    with turns:
        for waiting, thread in enumerate(threads, start=1):
            thread.start()
            _wait_for(lambda waiting=waiting: turns.waiting == waiting)
    # Whoever just had its turn asks again, and comes after all that waited.
    with turns:
        order.append("again")
    for thread in threads:
        thread.join()
    assert order == ["a", "b", "c", "again"]
    assert turns.waiting == 0


def test_a_turn_that_is_given_up_lets_others_work():
    turns, other_worked = Turns(), threading.Event()

    def other():
        with turns:
            other_worked.set()

    with turns:
        thread = threading.Thread(target=other)
        thread.start()
        assert not other_worked.wait(0.05)
        with turns.given_up():
            assert other_worked.wait(30)
    thread.join()


def _wait_for(happened, seconds=30):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)
