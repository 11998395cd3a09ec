"""From conditions to sound: sample latents, decode them, write audio and a picture of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from acestep_ray.diffusion.sampler import sample
from acestep_ray.models.codec import SAMPLE_RATE, MusicCodec
from acestep_ray.models.transformer import ACEStepTransformer

# soundfile chooses the format by the suffix; what a suffix means beyond that is decided here.
SUBTYPES = {".wav": "PCM_16", ".flac": "PCM_16", ".ogg": "VORBIS", ".mp3": "MPEG_LAYER_III"}


def starting_noise(frames: int, seed: int) -> Tensor:
    """Noise (1, 8, 16, frames), the same on every device."""
    return torch.randn(1, 8, 16, frames, generator=torch.Generator().manual_seed(seed))


def render(
    transformer: ACEStepTransformer,
    codec: MusicCodec,
    condition: dict[str, Tensor],
    *,
    frames: int,
    seed: int,
    steps: int,
    guidance_scale: float,
    omega: float,
    shift: float,
    overlapped: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Sound (2, samples) float32 at 48 kHz of `frames` latent frames; `condition` is for one song."""
    device = condition["text"].device
    latents = sample(
        transformer,
        starting_noise(frames, seed).to(device),
        condition,
        steps=steps,
        guidance_scale=guidance_scale,
        omega=omega,
        shift=shift,
        on_step=on_step,
    )
    return decode(codec, latents, overlapped=overlapped)


@torch.no_grad()
def decode(codec: MusicCodec, latents: Tensor, *, overlapped: bool = False) -> np.ndarray:
    """Latents (1, 8, 16, W) → sound (2, samples) float32 at 48 kHz, within [−1, 1]."""
    with torch.autocast(latents.device.type, enabled=False):
        to_sound = codec.decode_overlapped if overlapped else codec.decode
        return to_sound(latents.float())[0].clamp(-1, 1).cpu().numpy()


def write_audio(path: Path, waveform: np.ndarray) -> None:
    """Write (2, samples) at 48 kHz in the format of the suffix, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    soundfile.write(partial, waveform.T, SAMPLE_RATE, subtype=SUBTYPES[path.suffix.lower()])
    partial.replace(path)


def write_mel_picture(path: Path, waveform: np.ndarray, title: str) -> None:
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
    axes.set(title=title, xlabel="seconds", ylabel="mel band, 40 Hz to 16 kHz")
    figure.colorbar(image, label="log10 magnitude")
    figure.savefig(path, dpi=120)
