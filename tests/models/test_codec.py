from __future__ import annotations

import json
import shutil

import pytest
import torch

from acestep_ray.errors import InputError
from acestep_ray.models.codec import MusicCodec, latent_frames

SECOND = 48_000


@pytest.fixture(scope="module")
def codec(checkpoint) -> MusicCodec:
    return checkpoint.load_codec()


def wave(seconds: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(2, int(seconds * SECOND), generator=generator)


def pad(waves: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([w.shape[-1] for w in waves])
    longest = int(lengths.max())
    return torch.stack([torch.nn.functional.pad(w, (0, longest - w.shape[-1])) for w in waves]), lengths


@pytest.mark.parametrize(("seconds", "frames"), [(3, 32), (30, 322), (240, 2583)])
def test_latent_frames_are_10_77_a_second_rounded_down(seconds, frames):
    assert latent_frames(seconds * SECOND) == frames


def test_a_song_in_a_batch_of_other_lengths_has_the_latents_it_has_alone(codec):
    songs = [wave(5.0, 1), wave(3.0, 2), wave(4.1, 3), wave(3.0, 4)]
    latents, lengths = codec.encode(*pad(songs))
    for song, in_batch, length in zip(songs, latents, lengths.tolist(), strict=True):
        alone, alone_length = codec.encode(song[None])
        assert length == alone_length.item() == latent_frames(song.shape[-1])
        torch.testing.assert_close(in_batch[..., : alone.shape[-1]], alone[0], rtol=1e-5, atol=1e-5)
        assert not in_batch[..., alone.shape[-1] :].any()


def test_samples_past_a_songs_length_are_not_heard(codec):
    song = wave(4.0)
    noisy_tail = torch.cat([song, wave(1.0, seed=9)], dim=-1)
    cut, _ = codec.encode(noisy_tail[None], torch.tensor([song.shape[-1]]))
    torch.testing.assert_close(cut, codec.encode(song[None])[0])


def test_latents_of_different_songs_differ(codec):
    latents, _ = codec.encode(torch.stack([wave(3.0), 0.1 * wave(3.0, seed=1).cumsum(-1).tanh()]))
    assert (latents[0] - latents[1]).std() > 0.2


def test_decoding_gives_an_audible_wave_cut_to_the_songs_length(codec):
    song = wave(3.3)
    latents, _ = codec.encode(song[None])
    decoded = codec.decode(latents, song.shape[-1])
    assert decoded.shape == (1, 2, song.shape[-1])
    assert decoded.isfinite().all()
    assert 0.02 < decoded.std() < 0.6
    assert codec.decode(latents).shape[-1] >= song.shape[-1]


def test_a_song_decodes_alike_alone_and_in_a_batch(codec):
    latents = torch.randn(2, 8, 16, 20)
    torch.testing.assert_close(codec.decode(latents)[1:], codec.decode(latents[1:]))


@pytest.mark.parametrize("frames", [10, 64, 130, 520, 800])
def test_overlapped_decoding_gives_the_exact_length(codec, frames):
    decoded = codec.decode_overlapped(torch.randn(1, 8, 16, frames))
    assert decoded.shape == (1, 2, int(frames * 8 * 512 * 48_000 / 44_100))
    assert decoded.isfinite().all()


def test_overlapped_decoding_keeps_its_windows_small(codec):
    widths = {"autoencoder": [], "vocoder": []}
    hooks = [
        codec.autoencoder.decoder.register_forward_pre_hook(
            lambda _, inputs: widths["autoencoder"].append(tuple(inputs[0].shape))
        ),
        codec.vocoder.register_forward_pre_hook(
            lambda _, inputs: widths["vocoder"].append(tuple(inputs[0].shape))
        ),
    ]
    codec.decode_overlapped(torch.randn(1, 8, 16, 900))
    for hook in hooks:
        hook.remove()
    assert widths["autoencoder"] == [(1, 8, 16, 512), (1, 8, 16, 512), (1, 8, 16, 900 - 512)]
    assert set(widths["vocoder"]) == {(1, 128, 512)}
    # Two channels; windows every 508 frames until one reaches frame 7,200.
    assert len(widths["vocoder"]) == 2 * 15


def test_away_from_the_joins_windowed_vocoding_is_plain_vocoding(codec):
    mel = 2 * torch.randn(2, 128, 1300) - 4
    with torch.no_grad():
        plain = torch.cat([codec.vocoder(channel[None])[0] for channel in mel])
        windowed = codec._vocode_overlapped(mel)
    assert windowed.shape == plain.shape
    reach = 24  # frames that the small backbone sees on each side, with room
    for start, end in [(0, 508 - reach), (512 + reach, 1016 - reach), (1020 + reach, 1300 - reach)]:
        inside = slice(start * 512, end * 512)
        torch.testing.assert_close(windowed[:, inside], plain[:, inside], rtol=1e-4, atol=1e-5)


def test_a_window_fades_in_over_the_128_samples_before_sample_1024(codec, monkeypatch):
    level = iter([0.25, 0.25, 1.0, 1.0])  # two channels of the first window, then of the second
    monkeypatch.setattr(
        codec.vocoder, "forward", lambda mel: torch.full((1, 1, mel.shape[-1] * 512), next(level))
    )
    joined = codec._vocode_overlapped(torch.zeros(2, 128, 600))[0]
    fade = 508 * 512 + 1024 - 128
    assert (joined[:fade] == 0.25).all()
    torch.testing.assert_close(joined[fade : fade + 128], torch.linspace(0.25, 1, 128))
    assert (joined[fade + 128 :] == 1).all()


def test_a_vocoder_with_another_hop_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint.path / "music_vocoder", tmp_path / "music_vocoder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "upsample_rates": [8, 8, 4]}))
    with pytest.raises(InputError, match="256, not 512"):
        MusicCodec.from_pretrained(checkpoint.path / "music_dcae_f8c8", folder)


def test_an_impossible_autoencoder_configuration_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint.path / "music_dcae_f8c8", tmp_path / "music_dcae_f8c8")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "encoder_block_types": ["Spiral"] * 4}))
    with pytest.raises(InputError, match="configuration"):
        MusicCodec.from_pretrained(folder, checkpoint.path / "music_vocoder")
