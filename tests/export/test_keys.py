"""A LoRA of ACE-Step v1 is read under every prefix and suffix that programs write."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

from acestep_ray.export.keys import module_name, parse_key
from acestep_ray.export.names import flattened
from acestep_ray.export.reading import METADATA_KEY, open_lora
from acestep_ray.export.source import check_is_ace_step

MODULES = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.11.cross_attn.to_out.0",
    "transformer_blocks.3.ff.inverted_conv.conv",
    "lyric_encoder.encoders.5.self_attn.linear_k",
    "speaker_embedder",
    "lyric_proj",
)
DOTTED = (
    "",
    "transformer.",
    "base_model.model.",
    "transformer.base_model.model.",
    "diffusion_model.",
    "model.diffusion_model.",
    "module.",
    "module.base_model.model.",
    "transformer.module.",
    "_orig_mod.",
    "base_model.model._orig_mod.",
    "module._orig_mod.",
    "model.",
    "lora_unet_",
)
FLAT = (
    "",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "lora_unet_transformer_",
    "lycoris_diffusion_model_",
)
PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A", ".lora_B"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_down", ".lora_up"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_known_under_every_prefix_and_suffix(module):
    names = [prefix + module for prefix in DOTTED] + [prefix + flattened(module) for prefix in FLAT]
    for name, (a, b) in itertools.product(names, PAIRS):
        assert parse_key(name + a) == (module, "lora_A"), name + a
        assert parse_key(name + b) == (module, "lora_B"), name + b
    for name in names:
        assert parse_key(f"{name}.alpha") == (module, "alpha")
        assert parse_key(f"{name}.lora_magnitude_vector") == (module, "lora_magnitude_vector")
        assert parse_key(f"{name}.lora_magnitude_vector.default.weight") == (module, "lora_magnitude_vector")


def test_wrappers_inside_the_model_and_attention_processors_are_read():
    assert module_name("transformer_blocks.0._orig_mod.attn.to_q") == MODULES[0]
    assert module_name("transformer_blocks.0._fsdp_wrapped_module.attn.to_q") == MODULES[0]
    assert parse_key("transformer_blocks.0.attn.processor.to_q_lora.down.weight") == (MODULES[0], "lora_A")
    assert parse_key("transformer_blocks.11.cross_attn.processor.to_out_lora.up.weight") == (
        MODULES[1],
        "lora_B",
    )


@pytest.mark.parametrize(
    "key",
    [
        "transformer_blocks.0.attn.to_q.weight",
        "transformer_blocks.0.attn.to_q.lokr_w1",
        "transformer_blocks.0.attn.to_q.lora_A.voice.weight",
        "transformer_blocks.0.attn.to_q.lora_C.weight",
        "lora_A.weight",
    ],
)
def test_what_no_lora_has_is_no_key(key):
    assert parse_key(key) is None


def test_a_module_of_another_model_keeps_its_name_without_the_prefix():
    assert module_name("transformer.layers.0.attn.to_q") == "layers.0.attn.to_q"
    assert module_name("lora_unet_double_blocks_0_img_attn_proj") == "double_blocks_0_img_attn_proj"
    assert module_name("lora_te_text_model_encoder") == "lora_te_text_model_encoder"


def pair(a, b):
    generator = torch.Generator().manual_seed(0)
    return {a: torch.randn(4, 64, generator=generator), b: torch.randn(64, 4, generator=generator)}


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("transformer.base_model.model.transformer_blocks.0.attn.to_q", PAIRS[0]),
        ("lora_transformer_transformer_blocks_0_attn_to_q", PAIRS[3]),
        ("transformer.transformer_blocks.0.attn.to_q", PAIRS[5]),
        ("module.base_model.model.transformer_blocks.0.attn.to_q", PAIRS[2]),
    ],
)
@pytest.mark.parametrize("scale", ["alpha", "metadata", "none"])
def test_the_strength_is_the_same_whatever_the_keys_are_called(tmp_path, name, ends, scale):
    tensors = pair(name + ends[0], name + ends[1])
    product = tensors[name + ends[1]] @ tensors[name + ends[0]]
    metadata = None
    if scale == "alpha":
        tensors[f"{name}.alpha"] = torch.tensor(8.0)
    elif scale == "metadata":
        config = {"r": 4, "lora_alpha": 1, "alpha_pattern": {name: 8}}
        metadata = {METADATA_KEY: json.dumps(config)}
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, metadata)
    lora = open_lora(path)
    check_is_ace_step(lora)
    (update,) = lora.updates.values()
    assert list(lora.updates) == [MODULES[0]]
    torch.testing.assert_close(update.b @ update.a, product * (1.0 if scale == "none" else 2.0))


def test_a_dora_in_kohyas_form_is_the_same_as_pefts(tmp_path):
    flat = "lora_unet_transformer_blocks_0_attn_to_q"
    magnitude = torch.rand(64) + 0.5
    tensors = pair(f"{flat}.lora_down.weight", f"{flat}.lora_up.weight")
    save_file({**tensors, f"{flat}.dora_scale": magnitude[:, None]}, tmp_path / "kohya.safetensors")
    a, b = tensors.values()
    name = f"base_model.model.{MODULES[0]}"
    peft = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    save_file({**peft, f"{name}.lora_magnitude_vector": magnitude}, tmp_path / "peft.safetensors")
    weight = torch.randn(64, 64)
    changed = [
        open_lora(tmp_path / f"{form}.safetensors").updates[MODULES[0]].apply(weight)
        for form in ("kohya", "peft")
    ]
    torch.testing.assert_close(changed[0], changed[1])
    torch.testing.assert_close(changed[0].norm(dim=1), magnitude)
