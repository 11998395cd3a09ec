"""Ten training steps against the original's, for LoRA and for all weights."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from acestep_ray.diffusion.objective import flow_matching_losses
from acestep_ray.export.lora import ADAPTER_NAME
from acestep_ray.models.transformer import is_unused_parameter
from acestep_ray.training.lora import add_lora
from acestep_ray.training.lora_config import DEFAULT_LORA
from acestep_ray.training.optim import build_optimizer, clip_gradients, learning_rate_at, set_learning_rate
from tests.golden.cases import build_transformer, trajectory_batch
from tests.loras import write_lora

PEAK, WARMUP, STEPS, CLIP = 1e-3, 2, 10, 0.5


def train_ten_steps(golden, model):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(trained, weight_decay=0.01)
    records = []
    for step in range(STEPS):
        rate = learning_rate_at(step, peak=PEAK, warmup_steps=WARMUP, max_steps=STEPS)
        set_learning_rate(optimizer, rate)
        losses = flow_matching_losses(model, trajectory_batch(golden, step))
        loss = losses.total(1.0).mean()
        loss.backward()
        norm = clip_gradients(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        records.append(
            {
                "loss": loss.item(),
                "denoising": losses.denoising.mean().item(),
                **{name: value.mean().item() for name, value in losses.ssl.items()},
                "lr": rate,
                "grad_norm": norm.item(),
            }
        )
    return records


def assert_records_match(records, expected, grad_norm_rtol):
    assert len(records) == len(expected)
    for step, (ours, theirs) in enumerate(zip(records, expected, strict=True)):
        for name, value in theirs.items():
            tolerance = grad_norm_rtol if name == "grad_norm" else 1e-3
            assert ours[name] == pytest.approx(value, rel=tolerance, abs=1e-9), (step, name)


def lora_model(golden):
    model = build_transformer(golden)
    config = {**DEFAULT_LORA, **golden.manifest["cases"]["train/lora"]["lora"]}
    add_lora(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                bare = name.replace(f".{ADAPTER_NAME}", "")
                parameter.copy_(golden.weight(f"{golden.salt}/lora/{bare}", parameter.shape))
    return model


def test_ten_lora_steps_are_the_originals(golden):
    expected = golden.manifest["cases"]["train/lora"]
    model = lora_model(golden)
    assert_records_match(train_ten_steps(golden, model), expected["steps"], grad_norm_rtol=0.05)
    norms = {name: p.norm().item() for name, p in model.named_parameters() if p.requires_grad}
    assert norms == pytest.approx(expected["final_norms"], rel=1e-3)


def test_ten_full_steps_are_the_originals(golden):
    expected = golden.manifest["cases"]["train/full"]
    model = build_transformer(golden)
    assert_records_match(train_ten_steps(golden, model), expected["steps"], grad_norm_rtol=1e-3)
    norms = {name: p.norm().item() for name, p in model.named_parameters()}
    reference = {name: v for name, v in expected["final_norms"].items() if not is_unused_parameter(name)}
    assert norms == pytest.approx(reference, rel=1e-3, abs=1e-3)


def test_exported_lora_has_the_originals_file_name_keys_and_shapes(golden, tmp_path):
    expected = golden.manifest["cases"]["train/lora"]
    path = write_lora(tmp_path, lora_model(golden), ADAPTER_NAME)
    assert path.name == expected["export_file"]
    with safe_open(path, framework="pt") as file:
        shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert shapes == expected["export_keys"]
