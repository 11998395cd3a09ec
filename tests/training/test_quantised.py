"""A LoRA on a quantised base: close to one on the base as it is, in less memory, and the same file."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load
from torch import nn

from acestep_ray.config import TrainConfig
from acestep_ray.diffusion.objective import flow_matching_losses
from acestep_ray.errors import InputError
from acestep_ray.export.lora import ADAPTER_NAME, lora_bytes
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.models.transformer_config import TransformerConfig
from acestep_ray.training.frozen import check_quantisation, store_frozen
from acestep_ray.training.lora import add_lora
from acestep_ray.training.lora_config import DEFAULT_LORA
from acestep_ray.training.model import build_transformer
from tests.models.test_padding import CONFIG, pad, random_song
from tests.training.conftest import Killed, latest_weights, settings_in, train_alone

SETTINGS = TrainConfig(dataset_path="cache", checkpoint_dir="checkpoint", lora_config_path="lora.json")


def small_model(lora: dict) -> ACEStepTransformer:
    """A model with a LoRA that already changes something, so that both of its matrices have gradients."""
    torch.manual_seed(0)
    model = ACEStepTransformer(CONFIG)
    add_lora(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def loss_and_gradients(model: nn.Module, precision: str) -> tuple[float, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32"):
        losses = flow_matching_losses(model, pad([random_song(0), random_song(3)], 0.0, dropout=False))
    loss = losses.total(1.0).mean()
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    return loss.item(), torch.cat(gradients)


def frozen_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if not p.requires_grad)


# Measured with several seeds and songs: int8 1e-4 and 0.9997, nf4 1e-3 and 0.996; bfloat16 alone 1e-4 and 0.9997.
@pytest.mark.parametrize(("form", "loss_error", "cosine"), [("int8", 5e-4, 0.999), ("nf4", 5e-3, 0.99)])
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_loss_and_gradients_are_close_to_those_on_the_base_as_it_is(
    form, loss_error, cosine, precision, use_dora
):
    base = small_model({"r": 4, "target_modules": "all-linear", "use_dora": use_dora})
    quantised = copy.deepcopy(base)
    store_frozen(quantised, replace(SETTINGS, precision=precision, quantize_base=form), "cpu")
    expected_loss, expected = loss_and_gradients(base, "32")
    loss, gradients = loss_and_gradients(quantised, precision)
    assert loss == pytest.approx(expected_loss, rel=loss_error)
    assert torch.cosine_similarity(gradients, expected, dim=0) > cosine
    assert not torch.equal(gradients, expected)


@pytest.mark.parametrize(
    ("precision", "form", "gigabytes"),
    [
        ("bf16-mixed", "none", 10.71),
        ("bf16-true", "none", 5.37),
        ("bf16-mixed", "int8", 2.85),
        ("bf16-mixed", "nf4", 1.67),
    ],
)
def test_the_released_models_frozen_weights_take_that_much_memory(precision, form, gigabytes):
    with torch.device("meta"):
        model = ACEStepTransformer(TransformerConfig())
        add_lora(model, DEFAULT_LORA)
    store_frozen(model, replace(SETTINGS, precision=precision, quantize_base=form), "meta")
    assert frozen_bytes(model) / 1e9 == pytest.approx(gigabytes, abs=0.01)
    large = [name for name, p in model.named_parameters() if not p.requires_grad and p.nbytes > 1 << 25]
    in_blocks = [name for name in large if name.startswith(("transformer_blocks", "lyric_encoder"))]
    assert bool(in_blocks) == (form == "none")


def test_the_exported_lora_has_the_same_names_and_shapes(checkpoint):
    lora = {"r": 4, "target_modules": ["to_q", "linear_k", "inverted_conv.conv", "speaker_embedder"]}
    config = replace(SETTINGS, checkpoint_dir=str(checkpoint.path))
    models = (
        build_transformer(replace(config, quantize_base=form), lora, torch.device("cpu"))
        for form in ("none", "int8")
    )
    plain, quantised = (load(lora_bytes(model, ADAPTER_NAME)) for model in models)
    assert plain.keys() == quantised.keys()
    assert any(value.ndim == 3 for value in plain.values())
    for name, value in plain.items():
        assert torch.equal(quantised[name], value), name  # the random matrices do not depend on it either


def test_no_layer_reaches_the_device_before_it_is_quantised(checkpoint, monkeypatch):
    """Everything but the codes is moved at the end, after what is left is in bfloat16."""
    moved = []
    to = ACEStepTransformer.to

    def watched(module, device):
        moved.append(frozen_bytes(module))
        return to(module, device)

    config = replace(SETTINGS, checkpoint_dir=str(checkpoint.path), quantize_base="int8")
    whole = frozen_bytes(
        build_transformer(replace(config, quantize_base="none"), DEFAULT_LORA | {"r": 4}, torch.device("cpu"))
    )
    monkeypatch.setattr(ACEStepTransformer, "to", watched)
    build_transformer(config, DEFAULT_LORA | {"r": 4}, torch.device("cpu"))
    assert len(moved) == 1
    assert moved[0] < 0.6 * whole


@pytest.mark.parametrize(
    ("form", "optimizer"),
    [("int8", "adamw"), ("nf4", "adamw"), pytest.param("nf4", "adamw-8bit", marks=pytest.mark.torchao)],
)
def test_a_killed_run_on_a_quantised_base_goes_on_as_if_it_had_not_been(
    checkpoint, tiny_cache, tmp_path, form, optimizer
):
    config = TrainConfig(
        dataset_path=str(tiny_cache),
        checkpoint_dir=str(checkpoint.path),
        learning_rate=3e-3,
        max_steps=4,
        batch_size=2,
        num_workers=1,
        every_n_train_steps=2,
        every_plot_step=1000,
        plot_seconds=2.0,
        activation_checkpointing=1.0,
        quantize_base=form,
        optimizer=optimizer,
    )
    settings = settings_in(tmp_path / "killed", config)

    def kill(metrics, place):
        if metrics["step"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train_alone(settings, kill)
    resumed = train_alone(settings)
    unbroken = settings_in(tmp_path / "unbroken", config)
    expected = train_alone(unbroken)
    assert resumed == expected
    found = latest_weights(settings)
    for name, value in latest_weights(unbroken).items():
        assert torch.equal(found[name], value), name
    assert expected["fixed_noise"]["4"] < expected["fixed_noise"]["0"]


def test_what_cannot_be_quantised_is_told():
    with pytest.raises(InputError, match=r"--quantize_base int4(?s:.*)none, int8, nf4"):
        check_quantisation(replace(SETTINGS, quantize_base="int4"))
    with pytest.raises(InputError, match="cannot be trained"):
        check_quantisation(replace(SETTINGS, quantize_base="int8", lora_config_path=None))
    check_quantisation(replace(SETTINGS, quantize_base="int8"))
