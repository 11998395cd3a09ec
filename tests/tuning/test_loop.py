"""The loop of a trial stands still between validations, and several loops take turns."""

from __future__ import annotations

import threading

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


def test_loops_take_turns_one_after_another():
    turns, order, ready = Turns(), [], threading.Barrier(3)

    def work(name):
        ready.wait()
        for _ in range(50):
            with turns:
                order.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    with turns:
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    # Whoever was first, nobody gets a second turn before the others had theirs, but at the beginning and the end.
    middle = order[30:-30]
    assert all(len(set(middle[i : i + 3])) == 3 for i in range(len(middle) - 2))


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
