"""The released music autoencoder: stereo at 48 kHz ↔ latents of 10.77 frames a second.

Mel frames through a deep-compression autoencoder (Chen et al. 2024, arXiv:2410.10733) and back through the vocoder.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from torch import nn
from torchaudio.transforms import Resample

from acestep_ray.errors import InputError
from acestep_ray.models.mel import HOP_LENGTH, MEL_SAMPLE_RATE, LogMelSpectrogram
from acestep_ray.models.vocoder import Vocoder
from acestep_ray.models.weights import build_on_meta, load_weights, read_json

SAMPLE_RATE = 48_000
MEL_FRAMES_PER_LATENT = 8
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
    """Waves (B, 2, N) at 48 kHz ↔ scaled latents (B, 8, 16, W). The input is moved to the codec's device."""

    def __init__(self, autoencoder: AutoencoderDC, vocoder: Vocoder):
        super().__init__()
        self.autoencoder = autoencoder
        self.vocoder = vocoder
        self.mel = LogMelSpectrogram()
        self.to_mel_rate = Resample(SAMPLE_RATE, MEL_SAMPLE_RATE)
        self.from_mel_rate = Resample(MEL_SAMPLE_RATE, SAMPLE_RATE)

    @classmethod
    def from_pretrained(
        cls,
        autoencoder_directory: str | Path,
        vocoder_directory: str | Path,
        *,
        device: torch.device | str = "cpu",
    ) -> MusicCodec:
        """The codec of `music_dcae_f8c8/` and `music_vocoder/`, float32, frozen. Raises `InputError` if broken."""
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
        return cls(autoencoder, vocoder).to(device).eval()

    @property
    def device(self) -> torch.device:
        return self.mel.window.device

    @torch.no_grad()
    def encode(
        self, waves: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Waves (B, 2, N) and valid samples (B,) → latents (B, 8, 16, W) and valid latent frames (B,) int64.

        A song's latents do not depend on its batch: the autoencoder's attention sees the whole time axis, so only
        songs of equal padded length share a pass. Frames past a song's own are zero.
        """
        if lengths is None:
            lengths = torch.full((waves.shape[0],), waves.shape[-1])
        samples = lengths.tolist()
        mels = [self.log_mel(wave[:, :n].to(self.device)) for wave, n in zip(waves, samples, strict=True)]
        by_frames: dict[int, list[int]] = {}
        for song, mel in enumerate(mels):
            by_frames.setdefault(mel.shape[-1], []).append(song)
        latents: list[torch.Tensor] = [torch.empty(0)] * len(mels)
        for songs in by_frames.values():
            for song, encoded in zip(
                songs, self.mel_to_latents(torch.stack([mels[i] for i in songs])), strict=True
            ):
                latents[song] = encoded
        longest = max(encoded.shape[-1] for encoded in latents)
        padded = torch.stack([F.pad(encoded, (0, longest - encoded.shape[-1])) for encoded in latents])
        return padded, torch.tensor([latent_frames(n) for n in samples], device=self.device)

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

    def log_mel(self, wave: torch.Tensor) -> torch.Tensor:
        """Wave (2, n) at 48 kHz → log-mel (2, 128, T), T a multiple of 8: zeros fill the last latent frame."""
        wave = self.to_mel_rate(wave)
        return self.mel(F.pad(wave, (0, -wave.shape[-1] % (HOP_LENGTH * MEL_FRAMES_PER_LATENT))))

    def mel_to_latents(self, mel: torch.Tensor) -> torch.Tensor:
        """Log-mel (B, 2, 128, T) → scaled latents (B, 8, 16, T // 8)."""
        normalised = (mel - _MEL_MIN) / (_MEL_MAX - _MEL_MIN) * 2 - 1
        return (self.autoencoder.encode(normalised).latent - LATENT_SHIFT) * LATENT_SCALE

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


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    """Starts of windows every `stride` until one reaches the end."""
    count = max(0, -(-(length - window) // stride)) + 1
    return [i * stride for i in range(count)]
