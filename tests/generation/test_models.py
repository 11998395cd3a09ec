from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from acestep_ray.config import MergeConfig
from acestep_ray.diffusion.solvers import SCHEDULERS
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.export.formats import universal_bytes
from acestep_ray.export.merge import merge
from acestep_ray.export.reading import LoraUpdate
from acestep_ray.generation import models as models_module
from acestep_ray.generation.models import MusicModels, choose_models, joined
from acestep_ray.generation.records import Recipe
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.storage import Store
from tests.generation.conftest import song


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_song_is_the_same_alone_and_among_others(models, scheduler):
    songs = [
        song(seed=3, scheduler=scheduler, lyrics="[chorus]\nla la la\nand a longer line of it"),
        song(seed=4, scheduler=scheduler, prompt="rock, loud drums and a guitar", speaker=[0.5] * 512),
        song(seed=5, scheduler=scheduler, lyrics="一二三", prompt=""),
    ]
    together = models.make(songs)
    assert np.abs(together[0].waveform - together[1].waveform).max() > 1e-2
    for one, among_others in zip(songs, together, strict=True):
        (alone,) = models.make([one])
        assert among_others.waveform.shape == (2, alone.waveform.shape[1])
        np.testing.assert_allclose(among_others.waveform, alone.waveform, rtol=0, atol=1e-5)


@pytest.mark.parametrize("setting", ["prompt", "lyrics", "language", "speaker", "seed", "scheduler", "omega"])
def test_every_setting_is_heard(models, setting):
    one = song(lyrics="un deux trois", language="en")
    others = {
        "prompt": "metal",
        "lyrics": "quatre",
        "language": "fr",
        "speaker": [1.0] * 512,
        "seed": 1,
        "scheduler": "heun",
        "omega": -10.0,
    }
    (wave,), (other,) = (models.make([each]) for each in (one, replace(one, **{setting: others[setting]})))
    assert np.abs(wave.waveform - other.waveform).max() > 1e-4


def test_several_loras_with_weights_are_what_merge_makes_of_them(config, checkpoint, loras, tmp_path):
    named = {"lora_path": f"{loras[0]}, {loras[1].parent}/second.safetensors", "lora_weight": "1,-0.5"}
    loaded = MusicModels.load(choose_models(replace(config, **named), checkpoint)).transformer.state_dict()
    merge(MergeConfig(checkpoint_dir=config.checkpoint_dir, output_dir=str(tmp_path / "merged"), **named))
    merged = CheckpointDir.open(tmp_path / "merged").load_transformer().state_dict()
    assert loaded.keys() == merged.keys()
    for name in merged:
        torch.testing.assert_close(loaded[name], merged[name])
    changed = "transformer_blocks.0.attn.to_q.weight"
    assert not torch.equal(merged[changed], checkpoint.load_transformer().state_dict()[changed])


def test_a_lora_in_object_storage_is_the_lora_of_this_machine(config, checkpoint, loras, s3):
    store = Store.at(s3.url("loras"))
    store.write_bytes("one.safetensors", loras[0].read_bytes())
    here = choose_models(replace(config, lora_path=str(loras[0])), checkpoint)
    there = choose_models(replace(config, lora_path=f"{store.url}/one.safetensors"), checkpoint)
    assert Recipe.of(there, checkpoint, "wav") == Recipe.of(here, checkpoint, "wav")
    loaded, expected = (MusicModels.load(choice).transformer.state_dict() for choice in (there, here))
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_lora_of_another_model_is_refused_with_both_sizes(config, checkpoint, tmp_path):
    update = LoraUpdate(torch.randn(2, 96), torch.randn(64, 2), None)
    path = tmp_path / "other.safetensors"
    path.write_bytes(universal_bytes({"transformer_blocks.0.attn.to_q": update}))
    with pytest.raises(
        InputError, match=r"another model(?s:.*)other\.safetensors(?s:.*)\(64, 64\)(?s:.*)\(64, 96\)"
    ):
        choose_models(replace(config, lora_path=str(path)), checkpoint)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("lora.bin", b"\x80\x04K\x01.", "a pickle is not opened"),
        ("lora.safetensors", b"PK\x03\x04 torch's archive by another name", "a pickle is not opened"),
        ("lora.safetensors", b"something else entirely", "not a safetensors file"),
        ("lora.safetensors", b"", "empty"),
    ],
)
def test_a_file_that_is_no_lora_is_refused(config, checkpoint, tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=told):
        choose_models(replace(config, lora_path=str(tmp_path / name)), checkpoint)


def test_flags_that_name_no_models_are_refused(config, checkpoint, loras):
    with pytest.raises(InputError, match=r"no LoRA: --lora_weight 0\.5"):
        choose_models(replace(config, lora_weight=0.5), checkpoint)
    with pytest.raises(InputError, match="2 weights for 1 LoRAs"):
        choose_models(replace(config, lora_path=str(loras[0]), lora_weight="1,2"), checkpoint)
    with pytest.raises(InputError, match="--precision 8"):
        choose_models(replace(config, precision="8"), checkpoint)
    with pytest.raises(InputError, match=r"no weights .*loras"):
        choose_models(replace(config, transformer_path=str(loras[0].parent)), checkpoint)


@pytest.mark.parametrize(
    ("flag", "free", "overlapped"),
    [(None, 10**15, False), (None, 10**6, True), (False, 10**6, False), (True, 10**15, True)],
)
def test_windows_are_decoded_where_memory_would_not_do_or_the_flag_says_so(
    models, monkeypatch, flag, free, overlapped
):
    monkeypatch.setattr(models_module, "free_bytes", lambda device: free)
    monkeypatch.setattr(models, "overlapped", flag)
    (sound,) = models.make([song(infer_steps=1)])
    assert sound.overlapped == overlapped


def test_sound_that_is_not_finite_is_an_error(models):
    with pytest.raises(AceStepError, match="not finite"):
        models.make([song(guidance_scale=1e38)])


def test_conditions_of_one_song_joined_are_what_the_transformer_makes_of_them_alone(models):
    condition = models.encode_condition(song(lyrics="hello there"))
    with torch.no_grad():
        alone = models.transformer.encode_condition(**condition)
        batch = models.transformer.encode_condition(**joined([condition]))
    torch.testing.assert_close(batch.tokens, alone.tokens)
    torch.testing.assert_close(batch.angles, alone.angles)
    assert torch.equal(batch.mask, alone.mask)
