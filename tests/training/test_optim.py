"""The learning-rate schedule."""

from __future__ import annotations

import pytest

from acestep_ray.training.optim import learning_rate_at


def test_it_rises_from_zero_to_the_peak_and_falls_linearly_to_zero():
    rates = [learning_rate_at(step, peak=2.0, warmup_steps=4, max_steps=12) for step in range(13)]
    assert rates[:5] == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0])
    assert rates[4:] == pytest.approx([2.0 - 0.25 * i for i in range(9)])


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 10), (10, 10), (20, 10)])
def test_it_is_never_negative_nor_above_the_peak(warmup, steps):
    rates = [
        learning_rate_at(step, peak=1.0, warmup_steps=warmup, max_steps=steps) for step in range(steps + 2)
    ]
    assert all(0.0 <= rate <= 1.0 for rate in rates)
