"""The transformer's forward pass, losses and gradients against the original's."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from acestep_ray.diffusion.objective import flow_matching_losses
from acestep_ray.models.transformer import ACEStepTransformer, is_unused_parameter
from acestep_ray.models.transformer_config import TransformerConfig
from tests.golden.cases import build_transformer, stored_batch

CASES = ["full", "single"]


def total_and_parts(losses, ssl_names):
    parts = [losses.denoising.mean(), *(losses.ssl[name].mean() for name in ssl_names)]
    return torch.stack([losses.total(1.0).mean(), *parts])


@pytest.mark.parametrize("case", CASES)
def test_forward_pass_is_the_originals(golden, case):
    model = build_transformer(golden)
    batch = stored_batch(golden, case)
    out = {
        k.removeprefix(f"forward/{case}/out/"): v for k, v in golden.tensors.items() if f"{case}/out/" in k
    }
    torch.testing.assert_close(batch.sigmas, out["sigma"], rtol=1e-6, atol=0)
    torch.testing.assert_close(batch.sigmas * 1000, out["timestep"], rtol=1e-6, atol=0)
    lyric = model.encode_lyrics(batch.lyric_ids, batch.lyric_mask)
    torch.testing.assert_close(lyric, out["lyric"], rtol=1e-4, atol=1e-5)
    sigma = batch.sigmas.view(-1, 1, 1, 1)
    noisy = sigma * batch.noise + (1 - sigma) * batch.latents
    velocity = model(
        noisy,
        batch.sigmas * 1000,
        text=batch.text,
        text_mask=batch.text_mask,
        speaker=batch.speaker,
        lyric_ids=batch.lyric_ids,
        lyric_mask=batch.lyric_mask,
    ).velocity
    torch.testing.assert_close(velocity, out["sample"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_every_gradient_norm_are_the_originals(golden, case):
    model = build_transformer(golden)
    losses = flow_matching_losses(model, stored_batch(golden, case))
    parts = total_and_parts(losses, model.config.ssl_names)
    expected = golden.manifest["cases"][f"forward/{case}"]
    torch.testing.assert_close(parts, torch.tensor(expected["loss"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts, golden.tensors[f"forward/{case}/out/loss"], rtol=1e-4, atol=1e-5)
    losses.total(1.0).mean().backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    reference = {
        n: v for n, v in expected["grad_norms"].items() if v is not None and not is_unused_parameter(n)
    }
    assert set(reference) <= set(norms)
    assert all(norms[name] == 0 for name in set(norms) - set(reference))
    wrong = {
        name: (norms[name], value)
        for name, value in reference.items()
        if abs(norms[name] - value) > 1e-3 * abs(value) + 1e-5
    }
    assert not wrong


def test_parameters_are_exactly_those_of_the_released_model(golden):
    released = golden.json("transformer_3_5b_keys.json")
    expected = {}
    for pattern, shape in released.items():
        ranges = [range(int(a), int(b) + 1) for a, b in re.findall(r"\{(\d+)\.\.(\d+)\}", pattern)]
        template = re.sub(r"\{\d+\.\.\d+\}", "{}", pattern)
        for numbers in itertools.product(*ranges):
            expected[template.format(*numbers)] = tuple(shape)
    unused = {name for name in expected if is_unused_parameter(name)}
    assert unused, "the released checkpoint has parameters that its forward pass never uses"
    with torch.device("meta"):
        model = ACEStepTransformer(TransformerConfig())
    ours = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert ours == {name: shape for name, shape in expected.items() if name not in unused}
