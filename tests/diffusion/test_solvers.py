from __future__ import annotations

import math

import pytest
import torch

from acestep_ray.diffusion.schedule import sampling_sigmas
from acestep_ray.diffusion.solvers import SCHEDULERS, fresh_noise, rescaled, solve, step_scale

SHAPE = (2, 3, 4, 5)


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def even_levels(steps: int) -> torch.Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def oscillating(x, sigma):
    """dx/dσ = x cos 3σ, so that x(0) = x(1) exp(−sin(3) / 3)."""
    return x * torch.cos(3 * sigma)


@pytest.mark.parametrize(("scheduler", "order"), [("euler", 1), ("heun", 2)])
def test_halving_the_steps_divides_the_error_by_two_to_the_order(scheduler, order):
    start = noise()
    exact = start * math.exp(-math.sin(3) / 3)
    errors = []
    for steps in (64, 128, 256):
        found = solve(oscillating, start, even_levels(steps), scheduler=scheduler, omega=0.0)
        errors.append((found - exact).norm().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.05)


@pytest.mark.parametrize("scheduler", ["euler", "heun"])
def test_omega_scales_what_deviates_from_each_songs_mean(scheduler):
    start, velocity = noise(), noise(1) + torch.tensor([3.0, -5.0])[:, None, None, None]
    found = solve(lambda x, sigma: velocity, start, even_levels(7), scheduler=scheduler, omega=10.0)
    mean = velocity.mean(dim=(1, 2, 3), keepdim=True)
    factor = 0.9 + 0.2 / (1 + math.exp(-1.0))
    torch.testing.assert_close(found, start - mean - factor * (velocity - mean))


def test_heun_looks_where_each_step_begins_and_ends_but_at_the_end_only_once():
    levels = []

    def velocity(x, sigma):
        levels.append(sigma.item())
        return x

    sigmas = sampling_sigmas(4)
    solve(velocity, noise(), sigmas, scheduler="heun", omega=10.0)
    first, second, third, fourth, end = sigmas.tolist()
    assert levels == [first, second, second, third, third, fourth, fourth]
    assert end == 0


def test_heuns_second_look_is_at_the_rescaled_trial():
    sigmas = torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64)
    start = noise()
    seen = []

    def velocity(x, sigma):
        seen.append(x)
        return x**2 + sigma

    solve(velocity, start, sigmas, scheduler="heun", omega=-30.0)
    torch.testing.assert_close(seen[1], start + rescaled(-0.75 * (start**2 + 1), -30.0))
    second = seen[1] ** 2 + 0.25
    torch.testing.assert_close(seen[2], start + rescaled(-0.75 * (start**2 + 1 + second) / 2, -30.0))


def test_ping_pong_on_a_linear_model_is_its_closed_form():
    """With v = a x a step is x' = (1 − σ')(1 − σ a) x + σ' n: the product of all such factors, and theirs for noise."""
    a, seeds = 0.7, [5, 6]
    sigmas = sampling_sigmas(6).double()
    levels = sigmas.tolist()
    start = noise()
    found = solve(lambda x, sigma: a * x, start, sigmas, scheduler="pingpong", omega=10.0, seeds=seeds)

    def factor(step: int) -> float:
        return (1 - levels[step + 1]) * (1 - a * levels[step])

    expected = start * math.prod(factor(step) for step in range(6))
    for drawn in range(5):
        after = math.prod(factor(step) for step in range(drawn + 1, 6))
        expected = expected + levels[drawn + 1] * fresh_noise(seeds, drawn, start) * after
    torch.testing.assert_close(found, expected)


def test_fresh_noise_is_a_songs_own_and_new_in_every_step():
    like = torch.zeros(2, 8, 16, 50)
    together = fresh_noise([3, 4], 0, like)
    assert torch.equal(together[1], fresh_noise([4], 0, like[:1])[0])
    assert abs(together.mean()) < 0.05
    assert abs(together.std() - 1) < 0.05
    for other in (fresh_noise([3, 4], 1, like), fresh_noise([4, 5], 0, like), fresh_noise([2, 3], 1, like)):
        assert abs((together * other).mean()) < 0.05
    start = torch.randn(8, 16, 50, generator=torch.Generator().manual_seed(3))
    assert abs((together[0] * start).mean()) < 0.05


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_step_is_told_once(scheduler):
    told = []
    solve(
        oscillating,
        noise(),
        even_levels(3),
        scheduler=scheduler,
        omega=0.0,
        seeds=[1, 2],
        on_step=told.append,
    )
    assert told == [1, 2, 3]


def test_no_omega_is_too_large():
    assert [step_scale(omega) for omega in (-1e9, 0.0, 1e9)] == pytest.approx([0.9, 1.0, 1.1])


def test_what_cannot_be_solved_is_refused():
    with pytest.raises(ValueError, match="'rk4'"):
        solve(oscillating, noise(), even_levels(2), scheduler="rk4", omega=0.0)
    with pytest.raises(ValueError, match="1 seeds for 2 songs"):
        solve(oscillating, noise(), even_levels(2), scheduler="pingpong", omega=0.0, seeds=[1])
