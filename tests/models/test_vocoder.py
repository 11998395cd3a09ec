from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from acestep_ray.errors import InputError
from acestep_ray.models.vocoder import Vocoder, VocoderConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint.path / "music_vocoder", tmp_path / "music_vocoder")


def test_the_defaults_are_the_released_model():
    config = VocoderConfig()
    with torch.device("meta"):
        vocoder = Vocoder(config)
    assert config.hop_length == 512
    # 2 ** 7 halvings of 1,024 channels, four residual blocks after each.
    assert vocoder.head.conv_post.weight_v.shape == (1, 8, 13)
    assert len(vocoder.head.resblocks) == 28
    assert vocoder.backbone.stages[2][8].pwconv1.weight.shape == (4 * 384, 384)


def test_a_mel_frame_becomes_512_samples_within_one(folder):
    vocoder = Vocoder.from_pretrained(folder)
    mel = torch.randn(3, 128, 7)
    wave = vocoder(mel)
    assert wave.shape == (3, 1, 7 * 512)
    assert wave.std() > 0.01
    vocoder.head.conv_post.weight.mul_(100)
    assert 0.5 < vocoder(mel).abs().max() <= 1


def test_loading_folds_the_weight_norm_without_changing_the_result(folder):
    loaded = Vocoder.from_pretrained(folder)
    plain = Vocoder(VocoderConfig.from_dict(json.loads((folder / "config.json").read_text())))
    plain.load_state_dict(load_file(folder / WEIGHTS))
    mel = torch.randn(1, 128, 5)
    with torch.no_grad():
        torch.testing.assert_close(loaded(mel), plain(mel), rtol=1e-5, atol=1e-6)
    assert not any(name.endswith(("weight_g", "weight_v")) for name, _ in loaded.named_parameters())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_mel_tables_that_a_checkpoint_may_carry_are_passed_over(folder):
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, "mel_transform.fb": torch.zeros(3)}, folder / WEIGHTS)
    Vocoder.from_pretrained(folder)


def test_an_unknown_weight_is_refused_by_name(folder):
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, "head.conv_extra.weight": torch.zeros(3)}, folder / WEIGHTS)
    with pytest.raises(InputError, match=r"head\.conv_extra\.weight"):
        Vocoder.from_pretrained(folder)


@pytest.mark.parametrize("variant", [{"use_template": True}, {"kernel_sizes": [3, 7]}])
def test_a_variant_that_the_release_does_not_have_is_refused(variant):
    with pytest.raises(ValueError, match="use_template"):
        VocoderConfig.from_dict(variant)


def test_settings_of_the_mel_are_passed_over():
    assert VocoderConfig.from_dict({"sampling_rate": 44_100, "num_mels": 7}) == VocoderConfig(num_mels=7)


@pytest.mark.parametrize("change", [{"depths": [1]}, {"kernel_sizes": 7}, {"use_template": True}])
def test_an_impossible_configuration_is_the_users_to_mend(folder, change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=r"config\.json"):
        Vocoder.from_pretrained(folder)
