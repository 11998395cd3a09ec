"""Log-mel spectrogram at 44.1 kHz, as the released autoencoder and vocoder expect it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchaudio.functional import melscale_fbanks

MEL_SAMPLE_RATE = 44_100
HOP_LENGTH = 512
N_FFT = 2048
N_MELS = 128
_PADDING = (N_FFT - HOP_LENGTH) // 2


class LogMelSpectrogram(nn.Module):
    """Magnitudes of a Hann-windowed spectrum on 128 Slaney mels from 40 to 16,000 Hz, floored at 1e-5, log."""

    def __init__(self):
        super().__init__()
        filters = melscale_fbanks(
            n_freqs=N_FFT // 2 + 1,
            f_min=40.0,
            f_max=16_000.0,
            n_mels=N_MELS,
            sample_rate=MEL_SAMPLE_RATE,
            norm="slaney",
            mel_scale="slaney",
        )
        self.register_buffer("filters", filters.T.contiguous(), persistent=False)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        """`waves` (..., samples) at 44.1 kHz → (..., 128, samples // 512), natural logarithm."""
        padded = F.pad(waves.flatten(0, -2), (_PADDING, _PADDING), mode="reflect")
        spectrum = torch.stft(
            padded, N_FFT, HOP_LENGTH, window=self.window, center=False, onesided=True, return_complex=True
        )
        magnitude = torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-6)
        mel = torch.log((self.filters @ magnitude).clamp(min=1e-5))
        return mel.unflatten(0, waves.shape[:-1])
