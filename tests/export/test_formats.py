"""Each format, played by the rule of each program that reads it, gives what the training model gives."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers.loaders import PeftAdapterMixin
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from acestep_ray.config import ExportConfig
from acestep_ray.errors import InputError
from acestep_ray.export.formats import FORMATS
from acestep_ray.export.job import export
from acestep_ray.export.lora import ADAPTER_NAME
from acestep_ray.export.reading import LORA_FILE, METADATA_KEY, open_lora
from acestep_ray.models.transformer import ACEStepTransformer, PointwiseConv
from acestep_ray.training.lora_config import DEFAULT_LORA
from tests.export import players
from tests.export.conftest import CONVOLUTIONS, DORA, PATTERNS, RSLORA, largest_difference, velocity
from tests.loras import write_lora

PLAYERS = {
    "universal": [
        players.original_v1,
        players.original_v1_without_metadata,
        players.simple_tuner,
        players.comfyui_v1,
        players.comfyui_15,
    ],
    "peft": [players.peft_directory],
    "comfyui": [players.comfyui_v1, players.comfyui_15],
    "kohya": [players.kohya, players.comfyui_v1],
}
CONFIGS = {
    "alpha is not the rank": DEFAULT_LORA,
    "rsLoRA": RSLORA,
    "patterns and convolutions": PATTERNS,
    "all layers": {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
}


def exported(source, directory, format_name="universal", **settings):
    config = ExportConfig(str(source), str(directory), format=format_name, **settings)
    return export(config).directory


def play(player, directory, checkpoint):
    """The velocity of the base with what a player makes of an export."""
    model = checkpoint.load_transformer()
    reads_files = player in (players.comfyui_v1, players.comfyui_15, players.kohya)
    (place,) = directory.glob("*.safetensors") if reads_files else (directory,)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    model.load_state_dict(player(place, weights))
    return velocity(model)


@pytest.mark.parametrize("lora", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_every_program_plays_the_training_models_output(tmp_path, checkpoint, trained, lora, format_name):
    model = trained(lora)
    expected = velocity(model)
    base = velocity(checkpoint.load_transformer())
    assert largest_difference(base, expected) > 0.01  # there is something to play
    directory = exported(write_lora(tmp_path, model, ADAPTER_NAME), tmp_path / "out", format_name)
    for player in PLAYERS[format_name]:
        assert largest_difference(play(player, directory, checkpoint), expected) < 1e-5, player.__name__


@pytest.mark.parametrize("format_name", ["universal", "peft"])
def test_a_dora_plays_in_the_formats_that_hold_it(tmp_path, checkpoint, trained, format_name):
    model = trained(DORA)
    directory = exported(write_lora(tmp_path, model, ADAPTER_NAME), tmp_path / "out", format_name)
    player = players.original_v1 if format_name == "universal" else players.peft_directory
    assert largest_difference(play(player, directory, checkpoint), velocity(model)) < 1e-5


@pytest.mark.parametrize("format_name", ["comfyui", "kohya"])
def test_a_dora_is_refused_where_the_format_cannot_hold_it(tmp_path, trained, format_name):
    path = write_lora(tmp_path, trained(DORA), ADAPTER_NAME)
    with pytest.raises(InputError, match=rf"`{format_name}` cannot hold a DoRA(?s:.*)export merge"):
        exported(path, tmp_path / "out", format_name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_any_format_becomes_any_other(tmp_path, checkpoint, trained, first, second):
    model = trained(PATTERNS)
    once = exported(write_lora(tmp_path, model, ADAPTER_NAME), tmp_path / "once", first)
    twice = exported(once, tmp_path / "twice", second)
    assert largest_difference(play(PLAYERS[second][0], twice, checkpoint), velocity(model)) < 1e-5
    back = exported(twice, tmp_path / "back")
    (found, noted), (tensors, metadata) = (players.load(folder / LORA_FILE) for folder in (back, tmp_path))
    assert noted == metadata
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)  # nothing was lost


def test_diffusers_itself_plays_the_universal_file(tmp_path, checkpoint, trained):
    class Original(ACEStepTransformer, PeftAdapterMixin):
        """The transformer with diffusers' loader, as in the original program."""

        _hf_hook = None
        device = torch.device("cpu")
        _tp_plan = None

    model = trained(PATTERNS)
    directory = exported(write_lora(tmp_path, model, ADAPTER_NAME), tmp_path / "out")
    original = Original(checkpoint.transformer_config)
    original.load_state_dict(checkpoint.load_transformer().state_dict())
    with_convolutions(original)
    original.load_lora_adapter(str(directory / LORA_FILE), adapter_name="style", with_alpha=True, prefix=None)
    assert largest_difference(velocity(original), velocity(model)) < 1e-5


def with_convolutions(model):
    """The 1 × 1 convolutions as the original has them, for which PEFT has layers of another kind."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PointwiseConv):
                convolution = ChannelsLast(
                    child.in_features, child.out_features, 1, bias=child.bias is not None
                )
                convolution.load_state_dict(child.state_dict())
                setattr(module, name, convolution)


class ChannelsLast(nn.Conv1d):
    """The original's convolution on a stream (B, W, C)."""

    def forward(self, x):
        if x.shape[-1] == self.in_channels and x.shape[1] != self.in_channels:
            return super().forward(x.mT).mT
        return super().forward(x)


@pytest.mark.parametrize(
    ("key_a", "key_b", "alpha", "scale"),
    [
        ("{m}.lora_A.weight", "{m}.lora_B.weight", None, 1.0),
        ("diffusion_model.{m}.lora_down.weight", "diffusion_model.{m}.lora_up.weight", 12.0, 3.0),
        ("transformer.{m}.lora_A.weight", "transformer.{m}.lora_B.weight", None, 1.0),
        ("base_model.model.{m}.lora_A.weight", "base_model.model.{m}.lora_B.weight", None, 1.0),
        ("lora_unet_{f}.lora_down.weight", "lora_unet_{f}.lora_up.weight", 2.0, 0.5),
        ("lycoris_{f}.lora_down.weight", "lycoris_{f}.lora_up.weight", 4.0, 1.0),
    ],
)
@pytest.mark.parametrize(
    "module",
    [
        "speaker_embedder",
        "transformer_blocks.1.cross_attn.to_out.0",
        "timestep_embedder.linear_1",
        "lyric_encoder.encoders.0.self_attn.linear_q",
        "lyric_encoder.encoders.1.feed_forward.w_2",
    ],
)
def test_the_keys_of_every_program_are_understood(tmp_path, module, key_a, key_b, alpha, scale):
    torch.manual_seed(1)
    weight, a, b = torch.randn(48, 32), torch.randn(4, 32), torch.randn(48, 4)
    names = {"m": module, "f": module.replace(".", "_")}
    tensors = {key_a.format(**names): a, key_b.format(**names): b}
    if alpha is not None:
        tensors[key_a.format(**names).split(".lora_")[0] + ".alpha"] = torch.tensor(alpha)
    path = tmp_path / "somebody.safetensors"
    save_file(tensors, path)
    lora = open_lora(path)
    assert list(lora.updates) == [module]
    assert lora.scale_source == (None if alpha is None else "alpha")
    torch.testing.assert_close(lora.updates[module].apply(weight), weight + scale * b @ a)


def test_a_convolutions_matrices_get_their_third_dimension_whoever_wrote_them(tmp_path):
    module = f"transformer_blocks.0.ff.{CONVOLUTIONS[0]}"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 64), f"{module}.lora_B.weight": torch.ones(320, 2)}
    save_file(tensors, tmp_path / "flat.safetensors")
    directory = exported(tmp_path / "flat.safetensors", tmp_path / "out")
    with safe_open(directory / LORA_FILE, framework="pt") as file:
        assert file.get_slice(f"{module}.lora_A.weight").get_shape() == [2, 64, 1]
        assert file.get_slice(f"{module}.lora_B.weight").get_shape() == [320, 2, 1]


def test_alpha_is_the_rank_in_the_metadata_of_the_universal_file(tmp_path, trained):
    path = write_lora(tmp_path, trained(PATTERNS), ADAPTER_NAME)
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()[METADATA_KEY])
        assert not any(key.endswith(".alpha") for key in file.keys())  # noqa: SIM118
    assert metadata["r"] == metadata["lora_alpha"] == 4
    assert metadata["use_rslora"] is False
    assert metadata["rank_pattern"] == metadata["alpha_pattern"]
    assert set(metadata["rank_pattern"].values()) == {2, 3}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_halves_the_file_and_rounds_it(tmp_path, checkpoint, trained, dtype):
    model = trained(DEFAULT_LORA)
    whole = write_lora(tmp_path, model, ADAPTER_NAME)
    directory = exported(whole, tmp_path / "out", dtype=dtype)
    assert open_lora(directory / LORA_FILE).dtypes == (dtype,)
    assert (directory / LORA_FILE).stat().st_size < 0.6 * whole.stat().st_size
    difference = largest_difference(play(players.original_v1, directory, checkpoint), velocity(model))
    assert 0 < difference < 0.02
