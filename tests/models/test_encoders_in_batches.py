"""Songs of different lengths go through the frozen encoders together and get what they get alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from acestep_ray.models.codec import MusicCodec
from acestep_ray.models.hubert import HubertFeatures, SpectralConvolution
from acestep_ray.models.latent_encoder import encode_mel
from acestep_ray.models.ssl import SSLEncoder

SECOND = 48_000
# 4096 samples at 44.1 kHz are a latent frame: lengths a sample to either side of its border, and far apart.
FRAME = 4096 * 48_000 // 44_100
LENGTHS = [3 * SECOND, 40 * FRAME - 1, 40 * FRAME, 40 * FRAME + 1, 5 * SECOND]


def songs() -> list[torch.Tensor]:
    return [
        0.1 * torch.randn(2, n, generator=torch.Generator().manual_seed(seed))
        for seed, n in enumerate(LENGTHS)
    ]


def padded(waves: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([wave.shape[1] for wave in waves])
    longest = int(lengths.max())
    return torch.stack([nn.functional.pad(wave, (0, longest - wave.shape[1])) for wave in waves]), lengths


def test_latents_are_those_of_the_song_alone_whatever_it_is_padded_with(checkpoint):
    codec = checkpoint.load_codec()
    waves, lengths = padded(songs())
    latents, frames = codec.encode(waves, lengths)
    for row, n in enumerate(lengths.tolist()):
        waves[row, :, n:] = 0.5  # what lies past the end is not heard
    dirty, _ = codec.encode(waves, lengths)
    for wave, together, noisy, n in zip(songs(), latents, dirty, frames.tolist(), strict=True):
        alone, own = codec.encode(wave[None])
        assert own.tolist() == [n]
        torch.testing.assert_close(together[..., :n], alone[0, ..., :n], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(noisy[..., :n], together[..., :n], rtol=1e-4, atol=1e-4)


def test_the_encoder_gives_diffusers_numbers(checkpoint):
    codec = checkpoint.load_codec()
    frames = torch.tensor([400, 320, 48])
    mel = torch.randn(3, 2, 128, 400, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = encode_mel(codec.autoencoder.encoder, mel, frames)
        for song, latents, n in zip(mel, found, frames.tolist(), strict=True):
            expected = codec.autoencoder.encode(song[None, ..., :n]).latent[0]
            torch.testing.assert_close(latents[..., : n // 8], expected, rtol=1e-4, atol=1e-4)
            assert not latents[..., n // 8 :].any()


def test_half_precision_is_close_and_a_song_that_overflows_it_is_encoded_in_float32(checkpoint):
    exact, half = checkpoint.load_codec(), checkpoint.load_codec(precision="16")
    waves, lengths = padded(songs())
    expected, frames = exact.encode(waves, lengths)
    n = int(frames.min())
    found, _ = half.encode(waves, lengths)
    error = (found[..., :n].float() - expected[..., :n]).norm() / expected[..., :n].norm()
    assert 0 < error < 1e-2
    # A bias beyond float16 inside the encoder, which the norm after it takes away again.
    for codec in (exact, half):
        overflow(codec)
    expected, _ = exact.encode(waves, lengths)
    found, _ = half.encode(waves, lengths)
    assert torch.isfinite(found[..., :n]).all()
    torch.testing.assert_close(found[..., :n].float(), expected[..., :n], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def overflow(codec: MusicCodec) -> None:
    for name, parameter in codec.named_parameters():
        if name.endswith("conv1.bias"):
            parameter.copy_(torch.full(parameter.shape, 7e4))  # infinite in float16


def test_features_of_songs_together_are_those_of_each_alone(checkpoint):
    for encoder in checkpoint.load_ssl_encoders().values():
        together = encoder.encode_batch(songs())
        for wave, found in zip(songs(), together, strict=True):
            torch.testing.assert_close(found, encoder.encode(wave), rtol=1e-4, atol=1e-4)


def test_a_pass_that_is_too_large_for_the_memory_is_halved(checkpoint, monkeypatch):
    encoder = checkpoint.load_ssl_encoders()["mert"]
    long = [0.1 * torch.randn(2, 23 * SECOND, generator=torch.Generator().manual_seed(5))]  # five chunks
    expected = encoder.encode_batch(long)
    forward, sizes = HubertFeatures.forward, []

    def limited(self: HubertFeatures, chunks: torch.Tensor) -> torch.Tensor:
        sizes.append(len(chunks))
        if len(chunks) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, chunks)

    monkeypatch.setattr(HubertFeatures, "forward", limited)
    encoder.chunks_per_pass = 5
    torch.testing.assert_close(encoder.encode_batch(long)[0], expected[0], rtol=1e-4, atol=1e-4)
    assert sizes == [5, 2, 2, 1]

    def never(self: HubertFeatures, chunks: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(HubertFeatures, "forward", never)
    with pytest.raises(torch.OutOfMemoryError):
        encoder.encode_batch(long)


def test_half_precision_features_point_where_the_exact_ones_do(checkpoint):
    exact, half = checkpoint.load_ssl_encoders(), checkpoint.load_ssl_encoders(precision="16")
    assert exact.keys() == half.keys()
    for name in exact:
        cosine = nn.functional.cosine_similarity(
            exact[name].encode(songs()[0]), half[name].encode(songs()[0]), dim=-1
        )
        assert isinstance(half[name], SSLEncoder)
        assert 0.99 < cosine.min() < 1


@pytest.mark.parametrize(
    ("frames", "channels", "groups", "width"),
    [(374, 32, 4, 128), (1499, 24, 4, 16), (100, 24, 4, 128), (40, 24, 2, 128), (33, 24, 4, 127)],
)
def test_a_product_of_spectra_is_the_grouped_convolution(frames, channels, groups, width):
    torch.manual_seed(0)
    conv = nn.Conv1d(channels, channels, width, padding=width // 2, groups=groups)
    x = torch.randn(3, frames, channels)
    with torch.no_grad():
        expected = conv(x.transpose(1, 2)).transpose(1, 2)[:, :frames]
        found = SpectralConvolution(conv.weight, groups, frames)(x, conv.bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
