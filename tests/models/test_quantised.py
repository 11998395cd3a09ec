"""Linear layers with codes in place of weights: what they compute, with which gradients, in how much memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from acestep_ray.models.quantised import (
    FORMS,
    NF4_VALUES,
    QuantisedLinear,
    quantise_linear_layers,
)
from acestep_ray.models.transformer import PointwiseConv

# Of normally distributed weights: the relative error, and bits a weight with its scales in a layer of 256 inputs.
FIGURES = {"int8": (0.01, 8.2), "nf4": (0.11, 4.6)}


@pytest.fixture(params=FORMS)
def form(request):
    torch.manual_seed(0)
    return request.param


def test_a_weight_comes_back_as_well_as_its_bits_allow(form):
    layer = nn.Linear(256, 512)
    nn.init.normal_(layer.weight)
    quantised = QuantisedLinear(layer, form)
    error, bits = FIGURES[form]
    found = quantised.weight
    assert found.shape == layer.weight.shape
    assert (found - layer.weight).norm() < error * layer.weight.norm()
    assert sum(tensor.nbytes for tensor in quantised.stored) * 8 < bits * layer.weight.numel()
    assert {name.split(".")[0] for name, _ in quantised.named_parameters()} == {"stored", "bias"}


def test_what_the_codes_can_say_comes_back_exactly():
    rows = torch.tensor([[-127.0, 0, 3, 127], [0, 0, 0, 0], [1, 2, -3, 4]])
    scales = torch.tensor([[0.5], [1.0], [2.0]])
    layer = nn.Linear(4, 3)
    layer.weight.data = rows * scales
    expected = layer.weight[:2].clone()
    assert torch.equal(QuantisedLinear(layer, "int8").weight[:2], expected)

    # Three rows of 40 are two blocks of 64, the second one not full.
    values = torch.tensor(NF4_VALUES).repeat(8)[:120].view(3, 40)
    layer = nn.Linear(40, 3)
    layer.weight.data = values * 0.25
    assert torch.equal(QuantisedLinear(layer, "nf4").weight, layer.weight)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_layer_of_the_weight_that_its_codes_stand_for(form, dtype, bias):
    quantised = QuantisedLinear(nn.Linear(48, 96, bias=bias), form)
    plain = nn.Linear(48, 96, bias=bias)
    plain.weight = nn.Parameter(quantised.weight, requires_grad=False)
    plain.bias = quantised.bias
    inputs = torch.randn(2, 5, 48)
    found = []
    for layer in (quantised, plain):
        x = inputs.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            y = layer(x)
        y.float().square().sum().backward()
        found.append((y, x.grad))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype else {"rtol": 1e-5, "atol": 1e-5}
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, **tolerance)


def test_under_autocast_the_weight_is_written_out_in_its_precision(form, monkeypatch):
    encode, decode = FORMS[form]
    written = []

    def watched(*stored, size, dtype):
        written.append(dtype)
        return decode(*stored, size=size, dtype=dtype)

    monkeypatch.setitem(FORMS, form, (encode, watched))
    with torch.autocast("cpu", torch.bfloat16):
        y = QuantisedLinear(nn.Linear(16, 8), form)(torch.randn(2, 16, requires_grad=True))
    y.sum().backward()
    assert written == [torch.bfloat16, torch.bfloat16]


def test_only_codes_are_kept_for_the_backward_pass(form):
    layer = QuantisedLinear(nn.Linear(64, 96), form)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 64, requires_grad=True))
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in layer.stored}


def test_it_compiles_without_a_break(form):
    layer = QuantisedLinear(nn.Linear(64, 96), form)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 64, requires_grad=True)
    for call in (layer, compiled):
        call(x).square().sum().backward()
    twice, x.grad = x.grad, None
    layer(x).square().sum().backward()
    torch.testing.assert_close(twice, 2 * x.grad)


def test_frozen_linear_layers_are_quantised_and_nothing_else(form):
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList(
                [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), PointwiseConv(8, 8, False)]
            ),
            "head": nn.Linear(8, 8),
        }
    ).requires_grad_(False)
    model["blocks"].append(nn.Linear(8, 8))  # trained
    quantise_linear_layers(model, ["blocks"], form)
    kinds = {name: type(module) for name, module in model.named_modules() if hasattr(module, "in_features")}
    assert kinds == {
        "blocks.0.0": QuantisedLinear,
        "blocks.1": QuantisedLinear,
        "blocks.2": nn.Linear,
        "head": nn.Linear,
    }
    assert model["blocks"][1].weight.shape == (8, 8, 1)
