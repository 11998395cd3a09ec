"""The LoRA configuration file, injection, the file that comes out, and starting from one."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from acestep_ray.errors import InputError
from acestep_ray.export.lora import ADAPTER_NAME, lora_files, lora_layers, merge_loras
from acestep_ray.export.reading import LORA_FILE, METADATA_KEY, find_lora_file
from acestep_ray.models.transformer import ACEStepTransformer, PointwiseConv
from acestep_ray.training.initial_lora import load_lora
from acestep_ray.training.lora import add_lora
from acestep_ray.training.lora_config import DEFAULT_LORA, adapter_configs, read_lora_config
from tests.loras import write_lora
from tests.models.test_padding import CONFIG, pad, random_song

CONVOLUTIONS = ["inverted_conv.conv", "point_conv.conv"]
DORA = {**DEFAULT_LORA, "r": 4, "lora_alpha": 8, "use_dora": True}
STYLE_AND_VOICE = {
    "adapters": {
        "style": {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_v"]},
        "voice": {"r": 2, "lora_alpha": 1, "target_modules": ["speaker_embedder", "to_q"]},
    }
}


def write_config(tmp_path, content):
    path = tmp_path / "lora_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def new_model():
    torch.manual_seed(0)
    return ACEStepTransformer(CONFIG)


def trained_model(config, seed=1):
    """A model whose adapters have learned something, without PEFT's dropout."""
    model = new_model()
    trained = add_lora(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                noise = torch.randn_like(parameter)
                parameter.copy_(parameter * (1 + 0.3 * noise) if "magnitude" in name else 0.2 * noise)
    return model.eval()


def merged_model(*paths, weight=1.0):
    model = new_model()
    for path in paths:
        merge_loras(model, [(path, weight)])
    return model


def loaded_model(config, path):
    model = new_model()
    add_lora(model, config)
    load_lora(model, path)
    return model.eval()


def assert_same_music(model, expected):
    assert (velocity(expected) - velocity(new_model())).abs().max() > 0.01  # there is something to compare
    torch.testing.assert_close(velocity(model), velocity(expected), rtol=1e-4, atol=1e-4)


def forward(model):
    batch = pad([random_song(1)], 0.0, dropout=False)
    inputs = {
        name: getattr(batch, name)
        for name in ("text", "text_mask", "speaker", "lyric_ids", "lyric_mask", "lyric_start")
    }
    return model(batch.latents, batch.sigmas * 1000, **inputs).velocity


def velocity(model):
    with torch.no_grad():
        return forward(model)


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
        {"r": 4, "lora_alpha": 16, "target_modules": CONVOLUTIONS},
        {"r": 4, "target_modules": "all-linear", "init_lora_weights": "gaussian"},
        {"r": 4, "target_modules": "lyric_encoder.*linear_.", "init_lora_weights": "orthogonal"},
        {**DEFAULT_LORA, "r": 4, "init_lora_weights": False, "exclude_modules": ["cross_attn.to_q"]},
        {**DEFAULT_LORA, "r": 4, "lora_dropout": 0.5},
        DORA,
        {**DORA, "use_rslora": True, "lora_dropout": 0.5, "rank_pattern": {"to_q": 2}},
        {**DORA, "target_modules": CONVOLUTIONS},
        {**DORA, "target_modules": "all-linear"},
    ],
)
def test_the_file_gives_the_trained_models_output(tmp_path, config):
    trained = trained_model(config)
    assert_same_music(merged_model(write_lora(tmp_path, trained, ADAPTER_NAME)), trained)


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
        merge_loras(other, [(path, 1.0)])


def released_form(model):
    """The model with the 1 × 1 convolutions of the original, which PEFT takes for what they are."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PointwiseConv):
                convolution = nn.Conv1d(child.in_features, child.out_features, 1, bias=child.bias is not None)
                convolution.load_state_dict(child.state_dict())
                setattr(module, name, convolution)
    return model


@pytest.mark.parametrize(
    "config",
    [
        {**DEFAULT_LORA, "r": 4, "rank_pattern": {"cross_attn.to_q": 2}},
        {**DEFAULT_LORA, "r": 4, "target_modules": [*DEFAULT_LORA["target_modules"], *CONVOLUTIONS]},
        {**DORA, "target_modules": [*DEFAULT_LORA["target_modules"], *CONVOLUTIONS]},
    ],
)
def test_peft_plays_the_file_on_the_original_model_as_merging_does(tmp_path, config):
    path = write_lora(tmp_path, trained_model(config), ADAPTER_NAME)
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()[METADATA_KEY])
    original = released_form(new_model())
    peft.inject_adapter_in_model(peft.LoraConfig(**metadata), original, adapter_name="default")
    result = peft.set_peft_model_state_dict(original, load_file(path), adapter_name="default")
    assert not result.unexpected_keys
    merged = dict(merged_model(path).named_parameters())
    for name, layer in lora_layers(original).items():
        layer.merge()
        torch.testing.assert_close(
            layer.get_base_layer().weight, merged[f"{name}.weight"], rtol=1e-4, atol=1e-5
        )


def test_a_dora_at_half_strength_goes_half_of_the_way(tmp_path):
    path = write_lora(tmp_path, trained_model(DORA), ADAPTER_NAME)
    name = "transformer_blocks.0.attn.to_q.weight"
    none, half, whole = (
        dict(model.named_parameters())[name]
        for model in (new_model(), merged_model(path, weight=0.5), merged_model(path))
    )
    assert (whole - none).abs().max() > 0.1
    torch.testing.assert_close(half, (none + whole) / 2)


def test_a_dora_trains_its_magnitudes_and_starts_as_nothing():
    model = new_model()
    before = velocity(model)
    trained = add_lora(model, {**DORA, "target_modules": ["to_q", *CONVOLUTIONS]})
    torch.testing.assert_close(velocity(model), before, rtol=1e-4, atol=1e-4)
    forward(model).square().mean().backward()
    parameters = dict(model.named_parameters())
    magnitudes = [name for name in trained if "lora_magnitude_vector" in name]
    assert len(magnitudes) == len(lora_layers(model))
    assert all(parameters[name].grad.abs().max() > 0 for name in magnitudes)


def test_the_configuration_of_the_guide_trains_what_lyric2vocal_needs():
    root = Path(__file__).parents[2]
    config = read_lora_config(root / "lora_config.json")
    assert config == DEFAULT_LORA
    model = new_model()
    add_lora(model, config)
    attention = {
        f"{kind}.{part}" for kind in ("attn", "cross_attn") for part in ("to_q", "to_k", "to_v", "to_out.0")
    }
    blocks = {f"transformer_blocks.{n}.{name}" for n in range(CONFIG.num_layers) for name in attention}
    lyrics = {f"lyric_encoder.encoders.{n}.self_attn.linear_{part}" for n in range(2) for part in "qkv"}
    assert set(lora_layers(model)) == {"speaker_embedder"} | blocks | lyrics


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"layers_to_transform": 1},
            {"transformer_blocks.1.attn.to_q", "lyric_encoder.encoders.1.self_attn.linear_q"},
        ),
        (
            {"layers_to_transform": [0, 2], "layers_pattern": "transformer_blocks"},
            {"transformer_blocks.0.attn.to_q", "transformer_blocks.2.attn.to_q"},
        ),
        (
            {"exclude_modules": r"transformer_blocks\.[01]\..*"},
            {
                "speaker_embedder",
                "transformer_blocks.2.attn.to_q",
                "lyric_encoder.encoders.0.self_attn.linear_q",
                "lyric_encoder.encoders.1.self_attn.linear_q",
            },
        ),
    ],
)
def test_layers_and_exclusions_choose_among_the_targets(fields, expected):
    model = new_model()
    add_lora(model, {"r": 2, "target_modules": ["attn.to_q", "linear_q", "speaker_embedder"], **fields})
    assert set(lora_layers(model)) == expected


def test_all_linear_is_what_the_music_depends_on():
    model = new_model()
    add_lora(model, {"r": 2, "target_modules": "all-linear"})
    with_lora = set(lora_layers(model))
    assert {"final_layer.linear", "t_block.1", "transformer_blocks.0.ff.inverted_conv.conv"} <= with_lora
    assert not any(name.startswith("projectors") for name in with_lora)


def test_ranks_and_alphas_by_pattern_are_those_of_the_layers():
    model = new_model()
    config = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["to_q", "to_k"],
        "rank_pattern": {r"transformer_blocks\.0\..*to_q": 2},
        "alpha_pattern": {"cross_attn.to_k": 1},
    }
    add_lora(model, config)
    layers = lora_layers(model)
    assert layers["transformer_blocks.0.attn.to_q"].r[ADAPTER_NAME] == 2
    assert layers["transformer_blocks.1.attn.to_q"].r[ADAPTER_NAME] == 4
    assert layers["transformer_blocks.1.cross_attn.to_k"].scaling[ADAPTER_NAME] == 1 / 4
    assert layers["transformer_blocks.1.attn.to_k"].scaling[ADAPTER_NAME] == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 17}, r"rank 17 .*`speaker_embedder`, which is 16 → 32(?s:.*)at most 16"),
        ({"rank_pattern": {"linear_k": 33}}, "rank 33 .*linear_k`, which is 32 → 32"),
        ({"rank_pattern": {"to_qq": 2}}, "`to_qq` of `rank_pattern` matches no"),
        ({"alpha_pattern": {"to_qq": 2}}, "`to_qq` of `alpha_pattern` matches no"),
        (
            {"target_modules": ["depth_conv.conv"]},
            r"`transformer_blocks\.0\.ff\.depth_conv\.conv` .* depthwise",
        ),
        ({"target_modules": ["conv"]}, "depth_conv.conv` cannot"),
        ({"target_modules": ["lyric_embs"]}, "`lyric_embs` .* embedding"),
        ({"target_modules": "proj_in.*[02]"}, r"`proj_in\.early_conv_layers\.0` .* nothing would be learned"),
        ({"target_modules": ["projectors.0.2"]}, "music would not change"),
        ({"target_modules": ["to_out"]}, r"it holds to_out\.0"),
        ({"target_modules": ["after_norm"]}, "no linear layer but LayerNorm"),
        ({"target_modules": ".*to_qq"}, "matches no module"),
        ({"exclude_modules": ["to_kk"]}, "`to_kk`(?s:.*)did you mean to_k"),
        ({"exclude_modules": DEFAULT_LORA["target_modules"]}, "leaves no module"),
        ({"layers_to_transform": [0, 7]}, "layer 7"),
        ({"r": 3, "init_lora_weights": "orthogonal"}, "even"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_error_that_needs_no_weights(fields, message):
    config = {**DEFAULT_LORA, **fields}
    with torch.device("meta"), pytest.raises(InputError, match=message):
        add_lora(ACEStepTransformer(CONFIG), config)


def test_a_rank_as_large_as_the_layer_is_taken():
    with torch.device("meta"):
        assert add_lora(ACEStepTransformer(CONFIG), {**DEFAULT_LORA, "r": 16})


@pytest.mark.parametrize("initial", [True, False, "gaussian", "orthogonal"])
@pytest.mark.parametrize("dora", [True, False])
def test_every_beginning_can_be_checked_without_weights(initial, dora):
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": initial, "use_dora": dora}
    with torch.device("meta"):
        model = ACEStepTransformer(CONFIG)
        assert len(add_lora(model, config)) == (3 if dora else 2) * len(lora_layers(model))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"bias": "all"}, "`bias` cannot be used: .*no place for biases"),
        ({"modules_to_save": ["final_layer"]}, "`modules_to_save` cannot be used"),
        ({"init_lora_weights": "pissa"}, "'pissa'.* change the released weights"),
        ({"init_lora_weights": "eva", "eva_config": {}}, "`init_lora_weights`"),
        ({"corda_config": {}}, "`corda_config` cannot be used"),
        ({"megatron_config": {"a": 1}}, "`megatron_config` cannot be used"),
        ({"trainable_token_indices": [1]}, "`trainable_token_indices` cannot be used"),
        ({"fan_in_fan_out": True}, "`fan_in_fan_out` cannot be used"),
        ({"lora_alpha": 0}, "`lora_alpha` is 0"),
        ({"lora_dropout": 1.0}, "`lora_dropout` is 1.0; it must be a probability"),
        ({"use_dora": "yes"}, "`use_dora` is 'yes'; it must be true or false"),
        ({"target_modules": "to_(q"}, "a regular expression"),
        ({"target_modules": []}, "`target_modules` is"),
        ({"rank_pattern": {"to_q": 0}}, "`rank_pattern`"),
        ({"layers_to_transform": [0], "target_modules": ".*to_q"}, "PEFT refuses"),
        ({"peft_type": "LOHA"}, "'LOHA'; it must be \"LORA\""),
        ({"adapters": {}}, "adapters by name"),
        ({"adapters": {"style": {}}, "r": 4}, "`r` beside `adapters`"),
        ({"adapters": {"style": 3}}, "`style` is not a JSON object"),
        ({"adapters": {"a.b": {}}}, "`a.b` cannot be the name"),
        ({"adapters": {"keys": {}}}, "`keys` cannot be the name of an adapter, it is taken"),
        ({"adapters": {"style": {}, "Style": {}}}, "`Style` cannot be the name of an adapter, it is taken"),
        ({"adapters": {ADAPTER_NAME: {}}}, "it is taken"),
        ({"adapters": {"style": {"r": 0}}}, "rank.*adapter `style`"),
    ],
)
def test_a_configuration_that_cannot_be_exported_is_refused_by_name(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_lora_config(write_config(tmp_path, content))


def test_the_configuration_that_peft_saves_with_an_adapter_can_be_trained_with(tmp_path):
    peft.LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"], inference_mode=True).save_pretrained(tmp_path)
    config = read_lora_config(tmp_path / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 2, ["to_q"])
    assert "inference_mode" not in config  # it decides nothing, and is no part of what identifies a run
    assert add_lora(new_model(), config)


def test_named_adapters_are_trained_together_and_their_files_add_up(tmp_path):
    config = read_lora_config(write_config(tmp_path, STYLE_AND_VOICE))
    assert adapter_configs(config) == STYLE_AND_VOICE["adapters"]
    trained = trained_model(config)
    names = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in names} == {"style", "voice"}
    files = lora_files(trained)
    assert set(files) == {f"style/{LORA_FILE}", f"voice/{LORA_FILE}"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    assert_same_music(merged_model(tmp_path / "style", tmp_path / "voice"), trained)
    with pytest.raises(InputError, match=r"(?s)holds several.*/style, .*/voice"):
        find_lora_file(tmp_path)


def test_one_adapter_without_a_name_has_its_file_in_the_checkpoint_itself():
    model = new_model()
    add_lora(model, {"r": 2, "target_modules": ["to_q"]})
    assert set(lora_files(model)) == {LORA_FILE}
    assert adapter_configs(DEFAULT_LORA) == {ADAPTER_NAME: DEFAULT_LORA}


def test_a_dora_shares_no_layer_with_another_adapter():
    adapters = {
        "style": {**DORA, "target_modules": ["to_q"]},
        "voice": {"r": 2, "target_modules": ["to_q", "to_k"]},
    }
    with pytest.raises(InputError, match=r"to_q` has a DoRA and another adapter \(style, voice\)"):
        add_lora(new_model(), {"adapters": adapters})
    adapters["voice"]["target_modules"] = ["to_k"]
    assert add_lora(new_model(), {"adapters": adapters})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 1, "use_rslora": True}),
        ({"r": 4, "rank_pattern": {"to_q": 2}}, {"r": 4, "lora_alpha": 32, "rank_pattern": {"to_q": 2}}),
        ({"r": 4, "use_dora": True}, {"r": 4, "use_dora": True, "lora_alpha": 3}),
        ({"r": 4}, {"r": 4, "use_dora": True}),
    ],
)
def test_training_starts_from_our_own_file_at_its_full_strength(tmp_path, before, after):
    targets = ["speaker_embedder", "to_q", "linear_v", *CONVOLUTIONS]
    trained = trained_model({**before, "target_modules": targets})
    path = write_lora(tmp_path, trained, ADAPTER_NAME)
    assert_same_music(loaded_model({**after, "target_modules": targets}, path), trained)


@pytest.mark.parametrize("dora", [False, True])
def test_training_starts_from_a_peft_adapter(tmp_path, dora):
    config = {
        "r": 4,
        "lora_alpha": 2,
        "use_rslora": True,
        "target_modules": ["to_q", "to_v"],
        "use_dora": dora,
    }
    saved = peft.get_peft_model(new_model(), peft.LoraConfig(**config, alpha_pattern={"cross_attn.to_q": 16}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
            elif "magnitude" in name:
                parameter.mul_(1.3)
    saved.save_pretrained(tmp_path)
    assert_same_music(loaded_model({**config, "lora_alpha": 8}, tmp_path), saved.base_model.model.eval())
    assert_same_music(merged_model(tmp_path), saved.base_model.model)


@pytest.mark.parametrize(
    ("metadata", "alphas", "scale"),
    [
        (None, None, 1.0),  # as the original trainer wrote with the diffusers of its time
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {}}, None, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, None, 4.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn.to_q": 2}}, None, 0.5),
        (None, 12.0, 3.0),  # ComfyUI's
    ],
)
@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_the_strength_of_other_programs_files_is_theirs(tmp_path, metadata, alphas, scale, prefix):
    torch.manual_seed(1)
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    name = "transformer_blocks.0.attn.to_q"
    down, up = ("lora_A", "lora_B") if alphas is None else ("lora_down", "lora_up")
    tensors = {f"{prefix}{name}.{down}.weight": a, f"{prefix}{name}.{up}.weight": b}
    if alphas is not None:
        tensors[f"{prefix}{name}.alpha"] = torch.tensor(alphas)
    path = tmp_path / LORA_FILE
    save_file(tensors, path, {METADATA_KEY: json.dumps(metadata)} if metadata else None)
    expected = new_model().get_submodule(name).weight + scale * b @ a
    torch.testing.assert_close(merged_model(path).get_submodule(name).weight, expected)
    config = {"r": 4, "lora_alpha": 6, "target_modules": [name]}
    assert_same_music(loaded_model(config, path), merged_model(path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 2}, r"rank 4 at `transformer_blocks\.0\.attn\.to_q`, the configuration 2(?s:.*)\"r\": 4"),
        ({"rank_pattern": {"to_v": 2}}, r"rank 4 at .*to_v`, the configuration 2"),
        ({"target_modules": ["to_q"]}, r"it has .*to_v`(?s:.*)\"target_modules\": \[\"to_q\", \"to_v\"\]"),
        ({"target_modules": ["to_q", "to_v", "to_k"]}, r"the configuration has .*to_k`"),
        ({"use_dora": False}, r"is a DoRA(?s:.*)\"use_dora\": true"),
    ],
)
def test_a_lora_that_does_not_fit_the_configuration_is_told_with_what_to_set(tmp_path, fields, message):
    config = {**DORA, "target_modules": ["to_q", "to_v"]}
    path = write_lora(tmp_path, trained_model(config), ADAPTER_NAME)
    with torch.device("meta"):
        model = ACEStepTransformer(CONFIG)
        add_lora(model, {**config, **fields})
    with pytest.raises(InputError, match=message):
        load_lora(model, path)


def test_a_start_is_checked_without_weights(tmp_path):
    path = write_lora(tmp_path, trained_model(DORA), ADAPTER_NAME)
    with torch.device("meta"):
        model = ACEStepTransformer(CONFIG)
        add_lora(model, DORA)
        load_lora(model, path)
        with pytest.raises(InputError, match="no adapter `style`"):
            load_lora(model, path, "style")


def test_targets_that_no_last_names_describe_are_told_in_full(tmp_path):
    config = {"r": 4, "target_modules": ["cross_attn.to_q"]}
    path = write_lora(tmp_path, trained_model(config), ADAPTER_NAME)
    model = new_model()
    add_lora(model, {**config, "target_modules": ["to_q"]})
    with pytest.raises(InputError) as told:
        load_lora(model, path)
    suggested = json.loads(told.value.fix.split('"target_modules": ')[1])
    assert_same_music(loaded_model({"r": 4, "target_modules": suggested}, path), trained_model(config))


@pytest.mark.parametrize(
    ("key", "shape", "metadata", "message"),
    [
        ("lora_C.weight", (4, 32), {}, "not a LoRA file"),
        ("alpha", (), {}, "has only alpha"),
        ("lora_magnitude_vector", (32,), {"use_dora": True}, "has only lora_magnitude_vector"),
        ("lora_A.weight", (4, 32), {"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ("lora_A.weight", (4, 32), [], "not a JSON object"),
    ],
)
def test_a_file_that_is_no_lora_for_the_released_model_is_refused(tmp_path, key, shape, metadata, message):
    path = tmp_path / LORA_FILE
    save_file({f"speaker_embedder.{key}": torch.zeros(shape)}, path, {METADATA_KEY: json.dumps(metadata)})
    with pytest.raises(InputError, match=message):
        merge_loras(new_model(), [(path, 1.0)])


def test_a_peft_adapter_without_its_configuration_is_refused(tmp_path):
    save_file(
        {"base_model.model.speaker_embedder.lora_A.weight": torch.zeros(4, 16)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        merge_loras(new_model(), [(tmp_path, 1.0)])
