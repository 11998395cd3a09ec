from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from acestep_ray import tiny_checkpoint
from acestep_ray.data.lyrics.tokenizer import LyricTokenizer
from acestep_ray.errors import InputError
from acestep_ray.models.transformer import ACEStepTransformer, is_unused_parameter
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


def files(directory) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*.*")}


def songs(seed: int, seconds: float = 3.0) -> torch.Tensor:
    return tiny_checkpoint._synthetic_songs(seed, count=3, seconds=seconds)


def test_the_same_seed_gives_the_same_files_and_another_other_weights(checkpoint, tmp_path):
    again = write_tiny_checkpoint(tmp_path / "again", seed=0)
    assert files(again.path) == files(checkpoint.path)
    other = write_tiny_checkpoint(tmp_path / "other", seed=1)
    for part in ("transformer", "codec", "vocoder", "text_encoder", "mert", "m-hubert"):
        assert other.fingerprint(part) != checkpoint.fingerprint(part)


def test_it_is_complete_and_small(checkpoint):
    assert checkpoint.ssl_names == ("mert", "m-hubert")
    assert sum(len(content) for content in files(checkpoint.path).values()) < 30e6
    vocabulary = LyricTokenizer.from_file(checkpoint.lyric_vocab_path())
    ids = vocabulary.encode("[verse]\nHello there\nбелый снег").ids
    assert max(ids) < checkpoint.transformer_config.lyric_encoder_vocab_size


def test_latents_have_the_released_shape_and_about_unit_variance(checkpoint):
    latents, lengths = checkpoint.load_codec().encode(songs(seed=5, seconds=6.0))
    assert latents.shape == (3, 8, 16, 65)
    assert lengths.tolist() == [64] * 3
    assert latents.mean().abs() < 0.2
    assert 0.8 < latents.std() < 1.3
    assert (latents[0] - latents[1]).std() > 0.5


def test_waves_are_audible_and_do_not_clip(checkpoint):
    codec = checkpoint.load_codec()
    for latents in (codec.encode(songs(seed=6))[0], torch.randn(1, 8, 16, 40)):
        wave = codec.decode(latents)
        assert 0.05 < wave.std() < 0.5
        assert wave.abs().max() < 1.05


def test_features_and_prompts_tell_inputs_apart(checkpoint):
    for encoder in checkpoint.load_ssl_encoders().values():
        first, second, _ = (encoder.encode(song) for song in songs(seed=7))
        assert torch.nn.functional.cosine_similarity(first, second, dim=-1).mean() < 0.99
    embeddings, _ = checkpoint.load_text_encoder().encode(["jazz", "rock"])
    assert not torch.allclose(embeddings[0], embeddings[1])


def test_the_velocity_is_about_as_wide_as_the_latents_and_conditions_move_it(checkpoint):
    transformer = checkpoint.load_transformer().eval()
    torch.manual_seed(0)
    inputs = {
        "text": torch.randn(1, 4, 32),
        "text_mask": torch.ones(1, 4),
        "speaker": torch.randn(1, 512),
        "lyric_ids": torch.randint(1, 500, (1, 12)),
        "lyric_mask": torch.ones(1, 12),
    }
    noise, timesteps = torch.randn(1, 8, 16, 40), torch.tensor([600.0])
    with torch.no_grad():
        velocity = transformer(noise, timesteps, **inputs).velocity
        assert 0.3 < velocity.std() < 3
        for name in ("text", "speaker", "lyric_ids"):
            other = transformer(noise, timesteps, **{**inputs, name: torch.zeros_like(inputs[name])}).velocity
            assert (velocity - other).std() > 1e-3


def test_the_transformer_file_holds_the_unused_projections_like_the_released_one(checkpoint):
    path = checkpoint.path / "ace_step_transformer/diffusion_pytorch_model.safetensors"
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    used = set(ACEStepTransformer(checkpoint.transformer_config).state_dict())
    assert used < names
    assert all(is_unused_parameter(name) for name in names - used)
    assert len(names - used) == 8 * checkpoint.transformer_config.num_layers


def test_weights_are_as_readable_as_their_configuration(checkpoint):
    modes = {path.stat().st_mode for path in checkpoint.path.rglob("*.*")}
    assert len(modes) == 1


def test_a_directory_with_files_is_left_alone(tmp_path):
    (tmp_path / "song.mp3").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write_tiny_checkpoint(tmp_path)
    assert files(tmp_path) == {"song.mp3": b"mine"}


def test_an_empty_directory_is_filled(tmp_path):
    assert write_tiny_checkpoint(tmp_path).path == tmp_path


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(tiny_checkpoint, "build_tiny_vocabulary", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tiny_checkpoint(tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []
