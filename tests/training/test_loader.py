"""Reading ahead keeps the order, looks ahead no further than it should, and passes errors on."""

from __future__ import annotations

import threading
import time

import pytest

from acestep_ray.training.loader import read_ahead


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_results_come_in_the_order_of_the_items(threads):
    def slow_for_even(item):
        time.sleep(0.005 * (item % 2 == 0))
        return item * item

    assert list(read_ahead(range(40), slow_for_even, threads)) == [i * i for i in range(40)]


def test_it_reads_ahead_but_not_without_end():
    started = []
    lock = threading.Lock()

    def note(item):
        with lock:
            started.append(item)
        return item

    results = read_ahead(range(1000), note, threads=2)
    assert next(results) == 0
    time.sleep(0.1)
    results.close()
    assert 2 <= len(started) <= 5


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_is_raised_at_its_items_turn(threads):
    def fail_on_three(item):
        if item == 3:
            raise ValueError("three")
        return item

    results = read_ahead(range(10), fail_on_three, threads)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
