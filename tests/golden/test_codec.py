"""The codec and the vocoder against the original's values."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderDC

from acestep_ray.models.codec import MusicCodec
from acestep_ray.models.vocoder import Vocoder, VocoderConfig

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def codec(golden) -> MusicCodec:
    autoencoder = AutoencoderDC(**golden.manifest["dcae_config"])
    golden.fill(autoencoder, "/dcae")
    vocoder = Vocoder(VocoderConfig.from_dict(golden.manifest["vocoder_config"]))
    golden.fill(vocoder, "/vocoder")
    return MusicCodec(autoencoder, vocoder).eval()


def test_vocoder_parameters_have_the_checkpoints_names_and_shapes(golden, codec):
    parameters = {name: list(parameter.shape) for name, parameter in codec.vocoder.named_parameters()}
    assert parameters == golden.manifest["vocoder_keys"]


def test_mel_matches_the_original(golden, codec):
    mel = codec.log_mel(golden.tensors["codec/in/wav48k"])
    torch.testing.assert_close(mel[None], golden.tensors["codec/out/mel"], **TOLERANCE)


def test_encode_matches_the_original(golden, codec):
    wave = golden.tensors["codec/in/wav48k"]
    latents, lengths = codec.encode(wave[None], torch.tensor([wave.shape[-1]]))
    torch.testing.assert_close(latents, golden.tensors["codec/out/latents"], **TOLERANCE)
    assert torch.equal(lengths, golden.tensors["codec/out/latent_lengths"])


def test_decode_matches_the_original(golden, codec):
    wave = codec.decode(golden.tensors["codec/out/latents"], golden.tensors["codec/in/wav48k"].shape[-1])
    torch.testing.assert_close(wave[0], golden.tensors["codec/out/decoded48k"], **TOLERANCE)


@pytest.mark.parametrize("folded", [False, True])
def test_vocoder_matches_the_original(golden, codec, folded):
    vocoder = codec.vocoder
    if folded:
        vocoder = Vocoder(vocoder.config)
        vocoder.load_state_dict(codec.vocoder.state_dict())
        vocoder.fold_weight_norm()
    with torch.no_grad():
        wave = vocoder(golden.tensors["codec/in/vocoder_mel"])
    torch.testing.assert_close(wave, golden.tensors["codec/out/vocoder_wav"], **TOLERANCE)


def test_overlapped_decoding_matches_the_original(golden, codec):
    case = golden.manifest["cases"]["codec/overlap"]
    wave = codec.decode_overlapped(golden.tensors["codec/in/long_latents"])[0]
    assert list(wave.shape) == case["shape"]
    torch.testing.assert_close(
        wave[:, :: case["every"]], golden.tensors["codec/out/overlap_every_97th"], **TOLERANCE
    )
