"""From noise and latents to sound, and a picture of it."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
import psutil
import torch
from torch import Tensor

from acestep_ray.drawn_text import literal, with_fonts
from acestep_ray.generation.audio import write_audio as write_audio
from acestep_ray.models.codec import MEL_FRAMES_PER_LATENT, SAMPLE_RATE, MusicCodec
from acestep_ray.models.mel import N_MELS

# Copies of the decoder's widest layer that are alive at once are 4.7; the rest is for what convolutions work in.
_DECODER_COPIES = 6


def starting_noise(frames: int, seed: int) -> Tensor:
    """Noise (1, 8, 16, frames), the same on every device."""
    return torch.randn(1, 8, 16, frames, generator=torch.Generator().manual_seed(seed))


def decoding_bytes(codec: MusicCodec, frames: int) -> int:
    """Memory that decoding `frames` latent frames in one piece takes, about a quarter more than all its tensors."""
    channels = codec.autoencoder.config["decoder_block_out_channels"][0]
    return _DECODER_COPIES * channels * N_MELS * MEL_FRAMES_PER_LATENT * frames * 4


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still take on `device`."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@torch.no_grad()
def decode(codec: MusicCodec, latents: Tensor, *, overlapped: bool = False) -> np.ndarray:
    """Latents (1, 8, 16, W) → sound (2, samples) float32 at 48 kHz, within [−1, 1].

    `overlapped` bounds the memory, and changes the sound slightly near the windows' edges.
    """
    with torch.autocast(latents.device.type, enabled=False):
        to_sound = codec.decode_overlapped if overlapped else codec.decode
        return to_sound(latents.float())[0].clamp(-1, 1).cpu().numpy()


def write_mel_picture(file: Path | IO[bytes], waveform: np.ndarray, title: str) -> None:
    """A PNG of the log-mel spectrogram of (2, samples) at 48 kHz, both channels' mean."""
    from matplotlib.figure import Figure
    from torchaudio.transforms import MelSpectrogram

    mono = torch.from_numpy(waveform).mean(dim=0)
    hop = max(512, len(mono) // 2000)  # about as many columns as the picture has pixels
    transform = MelSpectrogram(
        SAMPLE_RATE, n_fft=4096, hop_length=hop, n_mels=128, f_min=40, f_max=16000, power=1
    )
    with torch.autocast("cpu", enabled=False):  # training on a CPU writes its samples in mixed precision
        mel = torch.log10(transform(mono).clamp(min=1e-5)).numpy()
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots()
    seconds = len(mono) / SAMPLE_RATE
    image = axes.imshow(mel, origin="lower", aspect="auto", extent=(0, seconds, 0, 128), cmap="magma")
    title, families = with_fonts(title)
    axes.set_title(literal(title), fontfamily=families)
    axes.set(xlabel="seconds", ylabel="mel band, 40 Hz to 16 kHz")
    figure.colorbar(image, label="log10 magnitude")
    figure.savefig(file, format="png", dpi=120)
