from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
import torch
from diffusers import AutoencoderDC
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from acestep_ray.generation.audio import SUBTYPES, audio_bytes, write_audio
from acestep_ray.generation.render import decode, decoding_bytes
from acestep_ray.models.codec import MusicCodec
from acestep_ray.models.vocoder import Vocoder, VocoderConfig
from acestep_ray.tiny_checkpoint import AUTOENCODER_CONFIG, VOCODER_CONFIG


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made and still alive; on the meta device, where they take none."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.alive[reference.cdata] = reference, storage.nbytes()
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def codec_of(vocoder: VocoderConfig) -> MusicCodec:
    """The codec with an autoencoder of the released size, shapes alone."""
    widths, layers = [128, 256, 512, 1024], [3, 3, 3, 3]
    released = {
        "decoder_block_out_channels": widths,
        "decoder_layers_per_block": layers,
        "attention_head_dim": 32,
    }
    with torch.device("meta"):
        autoencoder = AutoencoderDC.from_config({**AUTOENCODER_CONFIG, **released})
        vocoder = Vocoder(vocoder)
        vocoder.fold_weight_norm()
    return MusicCodec(autoencoder, vocoder).to("meta").eval()


def peak_of(work, frames: int) -> int:
    """Most bytes of tensors at a time while `work` decodes so many latent frames."""
    latents = torch.randn(1, 8, 16, frames, device="meta")
    with torch.no_grad(), Memory() as memory:
        work(latents)
    return memory.peak


def sound_bytes(frames: int) -> int:
    """Of the mel, and of six copies of the wave: resampling pads, convolves and reorders it."""
    return 4 * 2 * (128 * 8 * frames + 6 * 8 * 512 * frames)


def test_decoding_in_one_piece_takes_the_memory_that_is_foretold():
    codec = codec_of(VocoderConfig())
    assert 0.7 * decoding_bytes(codec, 2584) < peak_of(codec.decode, 2584) < decoding_bytes(codec, 2584)


def test_memory_of_overlapped_decoding_grows_by_the_sound_alone():
    codec = codec_of(
        VocoderConfig.from_dict(VOCODER_CONFIG)
    )  # hundreds of passes through the released one take long
    window = peak_of(codec.autoencoder.decode, 512)
    for frames in (768, 1536):
        assert peak_of(codec.decode_overlapped, frames) < window + sound_bytes(frames)
    assert peak_of(codec.decode, 1536) > 2 * (window + sound_bytes(1536))


@pytest.mark.parametrize("format", SUBTYPES)
def test_every_format_holds_the_sound(format, tmp_path):
    seconds = np.arange(48_000 * 2 + 77) / 48_000
    sound = np.stack([0.5 * np.sin(2 * np.pi * 440 * seconds), 0.25 * np.sin(2 * np.pi * 880 * seconds)])
    path = tmp_path / f"folder/sound.{format}"
    write_audio(path, sound.astype(np.float32))
    assert soundfile.info(path).format == format.upper()
    read, rate = soundfile.read(path)
    assert rate == 48_000
    assert len(read) == len(seconds)
    tolerance = 1e-4 if format in ("wav", "flac") else 0.05
    assert np.abs(read[4800:-4800] - sound.T[4800:-4800]).max() < tolerance
    assert list(path.parent.iterdir()) == [path]


def test_minutes_of_vorbis_are_written_whole():
    """libsndfile's encoder ends the process that hands it all of this at once."""
    content = audio_bytes(np.zeros((2, 60 * 48_000), np.float32), "ogg")
    assert soundfile.info(io.BytesIO(content)).frames == 60 * 48_000


def test_sound_stays_within_full_scale():
    class Loud:
        """Stands in for a codec whose resampling overshoots."""

        def decode(self, latents):
            return torch.tensor([[[-1.5, 0.25], [0.5, 2.0]]])

    wave = decode(Loud(), torch.zeros(1, 8, 16, 1))
    assert wave.dtype == np.float32
    assert wave.tolist() == [[-1.0, 0.25], [0.5, 1.0]]
