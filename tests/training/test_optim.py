"""The learning-rate schedule, clipping, and steps that are left out."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import acestep_ray.training
from acestep_ray.config import TrainConfig
from acestep_ray.errors import InputError
from acestep_ray.training.optim import (
    build_optimizer,
    check_optimizer,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
    step_if,
    stored_parts,
)

EIGHT_BIT = pytest.param("adamw-8bit", marks=pytest.mark.torchao)


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


def adamw(parameter: nn.Parameter, kind: str) -> torch.optim.Optimizer:
    if kind == "fused":
        return torch.optim.AdamW([parameter], lr=0.1, fused=True)
    optimizer = build_optimizer([parameter], 0.01, kind)
    set_learning_rate(optimizer, 0.1)
    return optimizer


@pytest.mark.parametrize("kind", ["adamw", "fused", EIGHT_BIT])
def test_a_step_with_gradients_that_are_not_finite_changes_nothing(kind):
    parameter = nn.Parameter(torch.zeros(64, 64))
    parameter.grad = torch.full_like(parameter, 2.0)
    optimizer = adamw(parameter, kind)
    step_if(optimizer, torch.tensor(True))
    before, moments = parameter.detach().clone(), plain_state(optimizer, parameter)
    assert before.any()
    parameter.grad[0] = float("nan")
    step_if(optimizer, torch.tensor(False))
    assert torch.equal(parameter, before)
    for name, value in plain_state(optimizer, parameter).items():
        assert torch.equal(moments[name], value), name
    parameter.grad = torch.full_like(parameter, 2.0)
    step_if(optimizer, torch.tensor(True))
    assert not torch.equal(parameter, before)


def plain_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone()
        for key, value in optimizer.state[parameter].items()
        for name, tensor in stored_parts(key, value).items()
    }


def train(kind: str, rates: list[float]) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """A matrix pulled towards a noisy one, a step for each learning rate."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, 128, generator=generator)
    parameter = nn.Parameter(torch.zeros_like(target))
    optimizer = build_optimizer([parameter], weight_decay=0.1, name=kind)
    for rate in rates:
        noise = 0.1 * torch.randn(target.shape, generator=generator)
        parameter.grad = parameter.detach() - target + noise
        set_learning_rate(optimizer, rate)
        optimizer.step()
    return parameter.detach(), optimizer


@pytest.mark.torchao
def test_moments_of_eight_bits_train_as_those_of_thirty_two_in_a_quarter_of_the_memory():
    rates = [0.03 - 0.0005 * step for step in range(60)]
    (full, in_32), (eight, in_8) = train("adamw", rates), train("adamw-8bit", rates)
    assert (eight - full).norm() < 0.02 * full.norm()
    assert not torch.equal(eight, full)
    sizes = [
        sum(t.nbytes for name, t in plain_state(o, o.param_groups[0]["params"][0]).items() if name != "step")
        for o in (in_32, in_8)
    ]
    assert sizes[1] < 0.26 * sizes[0]


@pytest.mark.parametrize("kind", ["adamw", EIGHT_BIT])
def test_each_step_has_the_learning_rate_that_was_set_for_it(kind):
    still, _ = train(kind, [0.0, 0.0])
    assert not still.any()
    once, _ = train(kind, [0.0, 0.01])
    assert once.abs().max() == pytest.approx(0.01, rel=0.3)


CONFIG = TrainConfig(dataset_path="cache", checkpoint_dir="checkpoint", lora_config_path="lora.json")


def test_an_optimizer_that_is_not_there_is_told():
    with pytest.raises(InputError, match=r"--optimizer sgd(?s:.*)adamw or adamw-8bit"):
        check_optimizer(replace(CONFIG, optimizer="sgd"))


def test_without_torchao_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.delitem(sys.modules, "acestep_ray.training.adamw8bit", raising=False)
    monkeypatch.delattr(acestep_ray.training, "adamw8bit", raising=False)
    with pytest.raises(InputError, match=r"torchao(?s:.*)acestep-ray\[quantisation\]"):
        check_optimizer(replace(CONFIG, optimizer="adamw-8bit"))
    check_optimizer(CONFIG)


@pytest.mark.torchao
@pytest.mark.parametrize("changes", [{"devices": 2}, {"num_nodes": 2}, {"cpu_offload": True}])
def test_moments_of_eight_bits_are_not_spread(changes):
    changed = replace(CONFIG, optimizer="adamw-8bit", lora_config_path=None, **changes)
    with pytest.raises(InputError, match="--optimizer adamw-8bit"):
        check_optimizer(changed)
    check_optimizer(replace(changed, optimizer="adamw"))
    check_optimizer(replace(CONFIG, optimizer="adamw-8bit", devices=2))
    check_optimizer(replace(CONFIG, optimizer="adamw-8bit", lora_config_path=None))
