"""Which parameters are trained, and in which precision the others lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from acestep_ray.errors import InputError
from acestep_ray.export.transformer import export_transformer
from acestep_ray.models.checkpoint import TRANSFORMER, CheckpointDir
from acestep_ray.models.transformer import ACEStepTransformer, is_unused_parameter
from acestep_ray.training import frozen
from acestep_ray.training.frozen import load_frozen
from acestep_ray.training.lora_config import DEFAULT_LORA
from acestep_ray.training.model import build_transformer, choose_trained
from acestep_ray.training.state import Checkpoints
from acestep_ray.training.validation import FIXED_NOISE
from tests.models.test_padding import CONFIG
from tests.training.conftest import (
    Killed,
    assert_same_weights,
    kill_at,
    latest_weights,
    settings_in,
    short_run,
    train_alone,
)

CPU = torch.device("cpu")


@pytest.fixture
def config(checkpoint, tiny_cache):
    return short_run(
        checkpoint, tiny_cache, learning_rate=3e-4, max_steps=4, batch_size=2, every_n_train_steps=2
    )


def on_meta() -> ACEStepTransformer:
    with torch.device("meta"):
        return ACEStepTransformer(CONFIG)


def test_without_patterns_all_is_trained_but_projectors_that_nothing_trains():
    transformer = on_meta()
    everything = [name for name, _ in transformer.named_parameters()]
    assert choose_trained(transformer, None, with_ssl=True) == everything
    without = choose_trained(transformer, None, with_ssl=False)
    assert set(everything) - set(without) == {n for n in everything if n.startswith("projectors.")}
    assert [n for n, p in transformer.named_parameters() if p.requires_grad] == without


@pytest.mark.parametrize(
    ("patterns", "examples", "others"),
    [
        ("speaker_embedder", {"speaker_embedder.weight", "speaker_embedder.bias"}, {"genre_embedder.weight"}),
        (
            "transformer_blocks.*.attn, *.scale_shift_table",
            {"transformer_blocks.1.attn.to_q.weight", "final_layer.scale_shift_table"},
            {"transformer_blocks.0.cross_attn.to_q.weight"},
        ),
        (
            "transformer_blocks.1",
            {"transformer_blocks.1.ff.depth_conv.conv.bias"},
            {"transformer_blocks.0.scale_shift_table"},
        ),
    ],
)
def test_patterns_name_modules_or_parameters(patterns, examples, others):
    chosen = set(choose_trained(on_meta(), patterns, with_ssl=True))
    assert examples <= chosen
    assert not others & chosen


def test_a_pattern_that_names_nothing_is_told():
    with pytest.raises(InputError, match=r"`speaker_embeder`(?s:.*)speaker_embedder"):
        choose_trained(on_meta(), "lyric_proj,speaker_embeder", with_ssl=True)
    with pytest.raises(InputError, match="`projectors`"):
        choose_trained(on_meta(), "projectors", with_ssl=False)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adamw-8bit", marks=pytest.mark.torchao)])
def test_all_weights_learn_and_a_killed_run_goes_on_as_if_it_had_not_been(config, tmp_path, optimizer):
    config = replace(config, optimizer=optimizer)
    settings = settings_in(tmp_path / "killed", config, lora=None)

    with pytest.raises(Killed):
        train_alone(settings, kill_at(2))
    resumed = train_alone(settings)
    unbroken = settings_in(tmp_path / "unbroken", config, lora=None)
    expected = train_alone(unbroken)
    assert resumed == expected
    assert expected[FIXED_NOISE]["4"] < expected[FIXED_NOISE]["0"]
    assert_same_weights(settings, unbroken)


def test_the_exported_transformer_has_every_name_of_the_released_one_and_loads_like_it(
    config, checkpoint, tmp_path
):
    settings = settings_in(tmp_path, replace(config, train_parameters="speaker_embedder"), lora=None)
    train_alone(settings)
    checkpoints = Checkpoints(settings.checkpoints)
    trained = checkpoints.read_weights(4)
    assert set(trained) == {"speaker_embedder.weight", "speaker_embedder.bias"}
    directory = export_transformer(checkpoint, trained, tmp_path / "fine-tuned")
    export_transformer(checkpoint, trained, directory)  # what is there is replaced

    base = load_file(checkpoint.path / TRANSFORMER / "diffusion_pytorch_model.safetensors")
    found = load_file(directory / "diffusion_pytorch_model.safetensors")
    assert set(found) == set(base)
    assert any(is_unused_parameter(name) for name in base)
    for name, value in base.items():
        assert torch.equal(found[name], trained.get(name, value)), name
    assert not torch.equal(found["speaker_embedder.weight"], base["speaker_embedder.weight"])
    transformer = CheckpointDir.open(checkpoint.path).load_transformer(directory=directory)
    assert torch.equal(transformer.speaker_embedder.weight, trained["speaker_embedder.weight"])


@pytest.mark.parametrize(
    "lora", [None, {"r": 4, "target_modules": ["to_q", "linear_k", "inverted_conv.conv"]}]
)
def test_frozen_weights_in_bfloat16_give_the_same_numbers_in_half_the_memory(config, tmp_path, lora):
    config = replace(config, max_steps=3, train_parameters=None if lora else "transformer_blocks.*.attn")
    found = {}
    for precision in ("bf16-mixed", "bf16-true"):
        settings = settings_in(tmp_path / precision, replace(config, precision=precision), lora=lora)
        found[precision] = (train_alone(settings), latest_weights(settings))
    (mixed, mixed_weights), (true, true_weights) = found.values()
    assert true == mixed
    for name, value in mixed_weights.items():
        assert value.dtype == torch.float32
        assert torch.equal(true_weights[name], value), name
    transformer = build_transformer(replace(config, precision="bf16-true"), lora, torch.device("cpu"))
    untrained = [p for p in transformer.parameters() if not p.requires_grad]
    in_half = sum(p.numel() for p in untrained if p.dtype == torch.bfloat16)
    assert in_half > 0.8 * sum(p.numel() for p in untrained)
    assert all(p.dtype == torch.float32 for p in transformer.parameters() if p.requires_grad)


def test_frozen_weights_are_read_into_the_form_that_they_stay_in(config, monkeypatch):
    config = replace(config, precision="bf16-true")
    expected = {name: (p.dtype, p.clone()) for name, p in load_frozen(config, CPU).named_parameters()}
    monkeypatch.setattr(frozen, "store_frozen", lambda *_: None)
    for name, parameter in load_frozen(config, CPU).named_parameters():
        dtype, values = expected[name]
        assert parameter.dtype == dtype, name
        assert torch.equal(parameter, values), name
    assert {dtype for dtype, _ in expected.values()} == {torch.float32, torch.bfloat16}


def test_doras_magnitudes_are_those_of_the_checkpoints_own_weights(config):
    lora = DEFAULT_LORA | {"r": 4, "use_dora": True}
    in_full, in_half = (
        build_transformer(replace(config, precision=precision), lora, CPU)
        for precision in ("32", "bf16-true")
    )
    found = {name: p for name, p in in_half.named_parameters() if "magnitude" in name}
    assert found
    for name, parameter in in_full.named_parameters():
        if "magnitude" in name:
            assert torch.equal(found[name], parameter), name


def test_half_precision_scales_its_loss_and_resumes_with_the_scale(config, tmp_path):
    config = replace(config, precision="16-mixed")
    settings = settings_in(tmp_path / "killed", config)

    with pytest.raises(Killed):
        train_alone(settings, kill_at(2))
    noted = Checkpoints(settings.checkpoints).read_state(2)["loss_scale"]
    assert noted["scale"] >= 1
    resumed = train_alone(settings)
    unbroken = settings_in(tmp_path / "unbroken", config)
    expected = train_alone(unbroken)
    assert resumed == expected
    full = train_alone(settings_in(tmp_path / "full", replace(config, precision="32")))
    assert expected["last"] == pytest.approx(full["last"], rel=0.02)


def test_a_share_of_the_blocks_is_computed_again_and_gives_the_same_numbers(config, tmp_path):
    plain = train_alone(settings_in(tmp_path / "plain", config))
    for share in (0.5, 1.0):
        changed = replace(config, activation_checkpointing=share)
        assert train_alone(settings_in(tmp_path / str(share), changed)) == plain
    transformer = on_meta()
    transformer.activation_checkpointing = 0.5
    assert [transformer._recomputes(depth) for depth in range(4)] == [False, True, False, True]


def test_a_run_may_start_from_another_runs_checkpoint(config, tmp_path):
    first = settings_in(tmp_path / "first", replace(config, max_steps=2), total_steps=4)
    with pytest.raises(Killed):
        train_alone(first, kill_at(2))
    expected = train_alone(first)
    path = str(first.checkpoints.path / "step=2")
    second = settings_in(tmp_path / "second", replace(config, ckpt_path=path))
    assert train_alone(second) == expected
    assert train_alone(replace(second, total_steps=5))["step"] == 5  # from its own, which has four steps
