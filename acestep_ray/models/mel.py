"""Log-mel spectrogram at 44.1 kHz, as the released autoencoder and vocoder expect it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchaudio.functional import melscale_fbanks

from acestep_ray.models.kernels import log_mel

MEL_SAMPLE_RATE = 44_100
HOP_LENGTH = 512
N_FFT = 2048
N_MELS = 128
_PADDING = (N_FFT - HOP_LENGTH) // 2
_TOP_FREQUENCY = 16_000.0


class LogMelSpectrogram(nn.Module):
    """Magnitudes of a Hann-windowed spectrum on 128 Slaney mels from 40 to 16,000 Hz, floored at 1e-5, log."""

    filters: torch.Tensor
    window: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        filters = melscale_fbanks(
            n_freqs=N_FFT // 2 + 1,
            f_min=40.0,
            f_max=_TOP_FREQUENCY,
            n_mels=N_MELS,
            sample_rate=MEL_SAMPLE_RATE,
            norm="slaney",
            mel_scale="slaney",
        )
        self.used_bins = int(_TOP_FREQUENCY / MEL_SAMPLE_RATE * N_FFT) + 1
        self.register_buffer("filters", filters.T.contiguous(), persistent=False)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    def forward(self, waves: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """`waves` (..., samples) at 44.1 kHz → (..., 128, samples // 512), natural logarithm.

        `lengths` (B,) int64 of waves (B, channels, samples): each song is reflected at its own end, so its frames are
        those that it has alone; the frames past its end are unspecified.
        """
        padded = _reflect(waves, lengths).flatten(0, -2)
        spectrum = torch.stft(
            padded, N_FFT, HOP_LENGTH, window=self.window, center=False, onesided=True, return_complex=True
        )
        mel = log_mel(spectrum.transpose(1, 2), self.filters, self.used_bins, floor=1e-5, eps=1e-6)
        return mel.unflatten(0, waves.shape[:-1])


def _reflect(waves: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    if lengths is None:
        flat = F.pad(waves.flatten(0, -2), (_PADDING, _PADDING), mode="reflect")
        return flat.unflatten(0, waves.shape[:-1])
    padded = F.pad(waves, (_PADDING, _PADDING))
    padded[..., :_PADDING] = waves[..., 1 : _PADDING + 1].flip(-1)
    past = torch.arange(_PADDING, device=waves.device)
    end = lengths[:, None, None].expand(-1, waves.shape[1], 1)
    return padded.scatter_(2, _PADDING + end + past, waves.gather(2, end - 2 - past))
