from __future__ import annotations

import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from acestep_ray.errors import InputError
from acestep_ray.models.ssl import SETTINGS, SSLEncoder

RATES = {"mert": (24_000, 5), "m-hubert": (16_000, 30)}


@pytest.fixture(scope="module")
def encoders(checkpoint) -> dict[str, SSLEncoder]:
    return checkpoint.load_ssl_encoders()


@pytest.fixture
def mert_folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint.path / "mert", tmp_path / "mert")


def song(seconds: float) -> torch.Tensor:
    return 0.1 * torch.randn(2, int(seconds * 48_000), generator=torch.Generator().manual_seed(0))


def test_sample_rates_and_chunks_are_the_released_models():
    assert SETTINGS == RATES


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("seconds", [3.0, 5.0, 31.001])
def test_a_chunk_gives_its_full_frames_and_the_last_those_within_the_song(encoders, name, seconds):
    rate, chunk = RATES[name]
    samples = math.ceil(seconds * rate)
    full = 0
    while samples > chunk * rate:
        full, samples = full + 1, samples - chunk * rate
    per_chunk = chunk * rate // 320 - 1
    frames = full * per_chunk + min(math.ceil(samples / 320), per_chunk)
    assert encoders[name].encode(song(seconds)).shape == (frames, encoders[name].dim)


def test_chunks_do_not_hear_each_other(encoders):
    stereo = song(10.0)
    # The same samples in another order: mean and variance of the song stay, chunk for chunk.
    swapped = torch.cat([stereo[:, 240_000:], stereo[:, :240_000]], dim=-1)
    first, second = encoders["mert"].encode(stereo).chunk(2)
    # Resampling reaches across the border by a few samples, so the frames at the edges are left out.
    middle = slice(30, -30)
    torch.testing.assert_close(
        encoders["mert"].encode(swapped).chunk(2)[0][middle], second[middle], rtol=1e-2, atol=1e-2
    )
    assert (first[middle] - second[middle]).abs().max() > 0.1


@pytest.mark.parametrize("name", RATES)
def test_features_do_not_depend_on_how_many_chunks_share_a_pass(encoders, name, monkeypatch):
    stereo = song(62.0 if name == "m-hubert" else 12.0)
    together = encoders[name].encode(stereo)
    monkeypatch.setattr(encoders[name], "chunks_per_pass", 1)
    batches = []
    hook = encoders[name].hubert.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    alone = encoders[name].encode(stereo)
    hook.remove()
    assert batches == [1, 1, 1]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RATES)
def test_loudness_and_the_order_of_the_channels_do_not_matter(encoders, name):
    stereo = song(6.0)
    features = encoders[name].encode(stereo)
    torch.testing.assert_close(encoders[name].encode(stereo.flip(0)), features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoders[name].encode(stereo * 0.25), features, rtol=1e-3, atol=1e-3)


def test_silence_gives_finite_features(encoders):
    for encoder in encoders.values():
        assert encoder.encode(torch.zeros(2, 144_000)).isfinite().all()


def test_a_bin_file_with_old_style_weight_norm_and_a_head_loads_alike(encoders, mert_folder):
    weights = {"final_proj.weight": torch.zeros(3)}
    for name, tensor in load_file(mert_folder / "model.safetensors").items():
        old = name.replace("parametrizations.weight.original0", "weight_g")
        weights[old.replace("parametrizations.weight.original1", "weight_v")] = tensor
    assert any(name.endswith("weight_g") for name in weights)
    (mert_folder / "model.safetensors").unlink()
    torch.save(weights, mert_folder / "pytorch_model.bin")
    loaded = SSLEncoder.from_pretrained(mert_folder, "mert")
    assert torch.equal(loaded.encode(song(3.0)), encoders["mert"].encode(song(3.0)))


def test_a_bin_file_that_brings_code_is_refused_and_not_run(mert_folder):
    trap = mert_folder / "trapped"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    (mert_folder / "model.safetensors").unlink()
    torch.save({"weight": Trap()}, mert_folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        SSLEncoder.from_pretrained(mert_folder, "mert")
    assert not trap.exists()


@pytest.mark.parametrize("option", ["feature_extractor_cqt", "deepnorm"])
def test_a_mert_that_is_no_hubert_is_refused(mert_folder, option):
    config = json.loads((mert_folder / "config.json").read_text())
    (mert_folder / "config.json").write_text(json.dumps({**config, option: True}))
    with pytest.raises(InputError, match=option):
        SSLEncoder.from_pretrained(mert_folder, "mert")


def test_loading_runs_no_code_of_the_folder(mert_folder):
    config = json.loads((mert_folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_MERT.MERTConfig",
        "AutoModel": "modeling_MERT.MERTModel",
    }
    (mert_folder / "config.json").write_text(json.dumps(config))
    for module in ("configuration_MERT.py", "modeling_MERT.py"):
        (mert_folder / module).write_text("raise RuntimeError('this must not run')")
    SSLEncoder.from_pretrained(mert_folder, "mert")


@pytest.mark.parametrize("change", [{"hidden_act": "nope"}, {"conv_dim": [1, 2]}, {"num_attention_heads": 7}])
def test_an_impossible_configuration_is_the_users_to_mend(mert_folder, change):
    config = json.loads((mert_folder / "config.json").read_text())
    (mert_folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=r"config\.json"):
        SSLEncoder.from_pretrained(mert_folder, "mert")
