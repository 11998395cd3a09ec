"""The released music autoencoder: stereo at 48 kHz ↔ latents of 10.77 frames a second.

Mel frames through a deep-compression autoencoder (Chen et al. 2024, arXiv:2410.10733) and back through the vocoder.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torchaudio.transforms import Resample

from acestep_ray.device import small_tensor, wait_for
from acestep_ray.errors import InputError
from acestep_ray.models.latent_encoder import encode_mel
from acestep_ray.models.mel import HOP_LENGTH, MEL_SAMPLE_RATE, LogMelSpectrogram
from acestep_ray.models.resample import Resampler
from acestep_ray.models.vocoder import Vocoder
from acestep_ray.models.weights import build_on_meta, load_weights, read_json

if TYPE_CHECKING:
    from diffusers.models import AutoencoderDC

SAMPLE_RATE = 48_000
MEL_FRAMES_PER_LATENT = 8
_SAMPLES_PER_LATENT = HOP_LENGTH * MEL_FRAMES_PER_LATENT
LATENT_SHIFT = -1.9091
LATENT_SCALE = 0.1786
_MEL_MIN, _MEL_MAX = -11.0, 3.0

# Overlapped decoding: latent windows, then vocoder windows that share 1,024 samples on each side.
_LATENT_WINDOW, _LATENT_STRIDE = 512, 256
_MEL_TRIM = _LATENT_WINDOW * MEL_FRAMES_PER_LATENT // 4
_VOCODER_WINDOW, _VOCODER_STRIDE = 512, 508
_OVERLAP, _FADE = 1024, 128


def latent_frames(samples: int) -> int:
    """Valid latent frames of `samples` at 48 kHz."""
    return int(samples / SAMPLE_RATE * MEL_SAMPLE_RATE / HOP_LENGTH / MEL_FRAMES_PER_LATENT)


class MusicCodec(nn.Module):
    """Waves (B, 2, N) at 48 kHz ↔ scaled latents (B, 8, 16, W). The input is moved to the codec's device.

    `encoder_dtype` float16 makes encoding several times as fast on a GPU and stays within 2e-3 of float32; a song that
    overflows it is encoded again in float32. All else is float32.
    """

    def __init__(
        self, autoencoder: AutoencoderDC, vocoder: Vocoder, *, encoder_dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.autoencoder = autoencoder
        self.vocoder = vocoder
        self.mel = LogMelSpectrogram()
        self.to_mel_rate = Resampler(SAMPLE_RATE, MEL_SAMPLE_RATE)
        self.from_mel_rate = Resample(MEL_SAMPLE_RATE, SAMPLE_RATE)
        self.half_encoder: nn.Module | None = None
        if encoder_dtype != torch.float32:
            encoder = copy.deepcopy(autoencoder.encoder)
            self.half_encoder = encoder.to(encoder_dtype).to(memory_format=torch.channels_last)

    @classmethod
    def from_pretrained(
        cls,
        autoencoder_directory: str | Path,
        vocoder_directory: str | Path,
        *,
        device: torch.device | str = "cpu",
        encoder_dtype: torch.dtype = torch.float32,
    ) -> MusicCodec:
        """The codec of `music_dcae_f8c8/` and `music_vocoder/`, float32, frozen. Raises `InputError` if broken."""
        # Seconds of imports that who loads no codec need not wait for.
        from diffusers.models import AutoencoderDC

        directory = Path(autoencoder_directory)
        config = read_json(directory / "config.json")
        autoencoder = build_on_meta(lambda: AutoencoderDC.from_config(config), directory)
        load_weights(autoencoder, directory, device=device)
        autoencoder.eval().requires_grad_(False)
        vocoder = Vocoder.from_pretrained(vocoder_directory, device=device)
        if vocoder.config.hop_length != HOP_LENGTH:
            raise InputError(
                f"`upsample_rates` multiply to {vocoder.config.hop_length}, not {HOP_LENGTH}",
                where=str(Path(vocoder_directory) / "config.json"),
            )
        return cls(autoencoder, vocoder, encoder_dtype=encoder_dtype).to(device).eval()

    @property
    def device(self) -> torch.device:
        return self.mel.window.device

    @torch.no_grad()
    def encode(
        self, waves: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Waves (B, 2, N) and valid samples (B,) → latents (B, 8, 16, W) and, on the CPU, valid frames (B,) int64.

        One pass for all songs; a song's latents do not depend on its batch. A song's last latent frame may reach past
        its valid ones, as far as its zero-padded wave does; what follows is zero.
        """
        samples = [waves.shape[-1]] * len(waves) if lengths is None else lengths.tolist()
        waves = waves[..., : max(samples)].to(self.device)
        if min(samples) == max(samples):
            latents = self.mel_to_latents(self.log_mel(waves))
        else:
            mels, frames = self._log_mels(waves, samples)
            latents = self.mel_to_latents(mels, frames)
            columns = torch.arange(latents.shape[-1], device=self.device)
            inside = columns < frames[:, None, None, None] // MEL_FRAMES_PER_LATENT
            latents = torch.where(inside, latents, 0)
        return latents, torch.tensor([latent_frames(n) for n in samples])

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, num_samples: int | None = None) -> torch.Tensor:
        """Latents (B, 8, 16, W) → waves (B, 2, samples) at 48 kHz, cut to `num_samples` if given."""
        waves = []
        for song in latents:
            mel = self.latents_to_mel(song[None].to(self.device))[0]
            # One channel at a time: the vocoder's last layers hold several wide copies of the wave.
            waves.append(torch.cat([self.vocoder(channel[None])[0] for channel in mel]))
        return self.from_mel_rate(torch.stack(waves))[..., :num_samples]

    @torch.no_grad()
    def decode_overlapped(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, 8, 16, W) → waves (B, 2, int(8·W · 512 · 48000 / 44100)), one window at a time.

        Memory does not grow with the song, beyond the mel and the wave themselves; near the windows' edges the result
        differs from `decode`.
        """
        waves = [self._vocode_overlapped(self._mel_overlapped(song.to(self.device))) for song in latents]
        mel_frames = latents.shape[-1] * MEL_FRAMES_PER_LATENT
        length = int(mel_frames * HOP_LENGTH * SAMPLE_RATE / MEL_SAMPLE_RATE)
        return self.from_mel_rate(torch.stack(waves))[..., :length]

    def log_mel(self, waves: torch.Tensor) -> torch.Tensor:
        """Waves (..., n) at 48 kHz → log-mel (..., 128, T), T a multiple of 8: zeros fill the last latent frame."""
        waves = self.to_mel_rate(waves)
        return self.mel(F.pad(waves, (0, -waves.shape[-1] % _SAMPLES_PER_LATENT)))

    def _log_mels(self, waves: torch.Tensor, samples: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Waves (B, 2, n) of `samples` each → log-mels (B, 2, 128, T) and each song's frames (B,) int64."""
        waves = _cut(waves, samples)
        # A filter reaches past the end of its input: each song's result is cut where it would end alone.
        resampled = [self.to_mel_rate.length(n) for n in samples]
        padded = [n + -n % _SAMPLES_PER_LATENT for n in resampled]
        waves = self.to_mel_rate(waves)
        waves = _cut(F.pad(waves, (0, max(padded) - waves.shape[-1])), resampled)
        lengths = small_tensor(padded, self.device)
        return self.mel(waves, lengths), lengths // HOP_LENGTH

    def mel_to_latents(self, mel: torch.Tensor, frames: torch.Tensor | None = None) -> torch.Tensor:
        """Log-mel (B, 2, 128, T) → scaled latents (B, 8, 16, T // 8), float32.

        `frames` (B,) int64 are the songs' valid mel frames, multiples of 8; latents past them mean nothing.
        """
        normalised = (mel - _MEL_MIN) / (_MEL_MAX - _MEL_MIN) * 2 - 1
        if self.half_encoder is None:
            latents = encode_mel(self.autoencoder.encoder, normalised, frames)
        else:
            latents = encode_mel(self.half_encoder, normalised, frames).float()
            finite = latents.isfinite().flatten(1).all(dim=1)
            wait_for(finite.device)
            if not finite.all():
                broken = (~finite).nonzero()[:, 0]
                latents[broken] = encode_mel(
                    self.autoencoder.encoder, normalised[broken], None if frames is None else frames[broken]
                )
        return (latents - LATENT_SHIFT) * LATENT_SCALE

    def latents_to_mel(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, 8, 16, W) → log-mel (B, 2, 128, 8·W)."""
        normalised = self.autoencoder.decode(latents / LATENT_SCALE + LATENT_SHIFT).sample
        return (normalised + 1) / 2 * (_MEL_MAX - _MEL_MIN) + _MEL_MIN

    def _mel_overlapped(self, latents: torch.Tensor) -> torch.Tensor:
        """(8, 16, W) → (2, 128, 8·W): half-overlapping windows, a quarter trimmed at every inner edge."""
        pieces = []
        for start in _window_starts(latents.shape[-1], _LATENT_WINDOW, _LATENT_STRIDE):
            mel = self.latents_to_mel(latents[None, ..., start : start + _LATENT_WINDOW])[0]
            is_last = start + _LATENT_WINDOW >= latents.shape[-1]
            pieces.append(mel[..., _MEL_TRIM if start else 0 : None if is_last else -_MEL_TRIM])
        return torch.cat(pieces, dim=-1)

    def _vocode_overlapped(self, mel: torch.Tensor) -> torch.Tensor:
        """(2, 128, T) → (2, 512·T) at 44.1 kHz: windows joined by short cross-fades."""
        frames = mel.shape[-1]
        wave = mel.new_empty(mel.shape[0], frames * HOP_LENGTH)
        fade_in = torch.linspace(0, 1, _FADE, device=mel.device)
        for start in _window_starts(frames, _VOCODER_WINDOW, _VOCODER_STRIDE):
            window = mel[..., start : start + _VOCODER_WINDOW]
            valid = window.shape[-1] * HOP_LENGTH
            window = F.pad(window, (0, _VOCODER_WINDOW - window.shape[-1]))
            piece = torch.cat([self.vocoder(channel[None])[0] for channel in window])[..., :valid]
            if start:
                piece = piece[..., _OVERLAP - _FADE :]
                join = wave[..., start * HOP_LENGTH + _OVERLAP - _FADE :][..., :_FADE]
                piece[..., :_FADE] = join * (1 - fade_in) + piece[..., :_FADE] * fade_in
                wave[..., start * HOP_LENGTH + _OVERLAP - _FADE :][..., : piece.shape[-1]] = piece
            else:
                wave[..., :valid] = piece
        return wave


def _cut(waves: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Waves (B, 2, n) with zeros past each song's length."""
    columns = torch.arange(waves.shape[-1], device=waves.device)
    return torch.where(columns < small_tensor(lengths, waves.device)[:, None, None], waves, 0)


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    """Starts of windows every `stride` until one reaches the end."""
    count = max(0, -(-(length - window) // stride)) + 1
    return [i * stride for i in range(count)]
