"""The learning-rate schedule, clipping, and steps that are left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from acestep_ray.training.optim import clip_gradients, learning_rate_at, step_if


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


def gradients(*values: float) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(len(values) // 2)]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.tensor(values[2 * number : 2 * number + 2])
    return parameters


@pytest.mark.parametrize(
    ("algorithm", "clipped"), [("norm", [0.3, 0.0, -0.4, 0.0]), ("value", [0.5, 0.0, -0.5, 0.0])]
)
def test_gradients_are_clipped_by_their_norm_or_element_by_element(algorithm, clipped):
    parameters = gradients(3.0, 0.0, -4.0, 0.0)
    assert clip_gradients(parameters, 0.5, algorithm) == 5.0
    torch.testing.assert_close(torch.cat([p.grad for p in parameters]), torch.tensor(clipped))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_with_gradients_that_are_not_finite_changes_nothing(fused):
    (parameter,) = gradients(1.0, 2.0)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    step_if(optimizer, torch.tensor(True))
    before, moments = (
        parameter.detach().clone(),
        {k: v.clone() for k, v in optimizer.state[parameter].items()},
    )
    assert before.any()
    parameter.grad = torch.tensor([float("nan"), 1.0])
    step_if(optimizer, torch.tensor(False))
    assert torch.equal(parameter, before)
    for name, value in moments.items():
        assert torch.equal(optimizer.state[parameter][name], value), name
    parameter.grad = torch.tensor([1.0, 2.0])
    step_if(optimizer, torch.tensor(True))
    assert not torch.equal(parameter, before)
