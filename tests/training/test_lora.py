"""The LoRA configuration file, injection, and the file that comes out."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from acestep_ray.errors import InputError
from acestep_ray.export.lora import METADATA_KEY, merge_lora, write_lora
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.training.lora import ADAPTER_NAME, DEFAULT_LORA, add_lora, read_lora_config
from tests.models.test_padding import CONFIG, pad, random_song


def write_config(tmp_path, content):
    path = tmp_path / "lora_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def new_model():
    torch.manual_seed(0)
    return ACEStepTransformer(CONFIG)


def velocity(model):
    batch = pad([random_song(1)], 0.0, dropout=False)
    inputs = {
        name: getattr(batch, name)
        for name in ("text", "text_mask", "speaker", "lyric_ids", "lyric_mask", "lyric_start")
    }
    with torch.no_grad():
        return model(batch.latents, batch.sigmas * 1000, **inputs).velocity


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[1]", "not a JSON object"),
        ({"r": 0}, "rank"),
        ({"r": "8"}, "rank"),
        ({"lora_alpa": 8}, "did you mean `lora_alpha`"),
    ],
)
def test_a_bad_configuration_is_one_clear_error(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_lora_config(write_config(tmp_path, content))


def test_a_missing_configuration_is_one_clear_error(tmp_path):
    with pytest.raises(InputError, match="no such LoRA configuration"):
        read_lora_config(tmp_path / "nowhere.json")


def test_an_unknown_target_is_named_with_what_was_meant():
    config = {"r": 4, "target_modules": ["to_q", "to_qq"]}
    with pytest.raises(InputError, match=r"(?s)`to_qq`.*did you mean to_q"):
        add_lora(new_model(), config)


def test_only_the_adapter_is_trained_and_it_starts_as_nothing():
    model = new_model()
    before = velocity(model)
    trained = add_lora(model, DEFAULT_LORA)
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    torch.testing.assert_close(velocity(model), before)


@pytest.mark.parametrize(
    "config",
    [
        DEFAULT_LORA,
        {**DEFAULT_LORA, "r": 8, "lora_alpha": 4, "use_rslora": True},
        {**DEFAULT_LORA, "r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 1}},
        {"r": 4, "lora_alpha": 16, "target_modules": ["inverted_conv.conv", "point_conv.conv"]},
    ],
)
def test_the_file_gives_the_trained_models_output(tmp_path, config):
    trained = new_model()
    add_lora(trained, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    path = write_lora(tmp_path, trained, ADAPTER_NAME)
    loaded = new_model()
    base = velocity(loaded)
    merge_lora(loaded, path)
    assert (velocity(trained) - base).abs().max() > 0.01
    torch.testing.assert_close(velocity(loaded), velocity(trained), rtol=1e-4, atol=1e-4)


def test_its_scale_is_folded_so_that_readers_of_no_alpha_play_it_right(tmp_path):
    model = new_model()
    add_lora(model, {**DEFAULT_LORA, "r": 4, "lora_alpha": 8})
    layer = model.transformer_blocks[0].attn.to_q
    torch.nn.init.ones_(layer.lora_B[ADAPTER_NAME].weight)
    with safe_open(write_lora(tmp_path, model, ADAPTER_NAME), framework="pt") as file:
        metadata = json.loads(file.metadata()[METADATA_KEY])
        b = file.get_tensor("transformer_blocks.0.attn.to_q.lora_B.weight")
    assert metadata["lora_alpha"] == metadata["r"] == 4
    assert metadata["use_rslora"] is False
    torch.testing.assert_close(b, torch.full_like(b, 2.0))


def test_a_lora_of_another_model_is_refused(tmp_path):
    model = new_model()
    add_lora(model, {"r": 4, "target_modules": ["to_q"]})
    path = write_lora(tmp_path, model, ADAPTER_NAME)
    torch.manual_seed(0)
    other = ACEStepTransformer(type(CONFIG)(**{**vars(CONFIG), "inner_dim": 64, "num_attention_heads": 4}))
    with pytest.raises(InputError, match="use the checkpoint that the LoRA was trained on"):
        merge_lora(other, path)
