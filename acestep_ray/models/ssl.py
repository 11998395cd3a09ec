"""Self-supervised audio features that the training loss is held against: MERT and m-HuBERT.

MERT (Li et al. 2023, arXiv:2306.00107) and mHuBERT-147 (Boito et al. 2024, arXiv:2406.06371) are both HuBERTs
(Hsu et al. 2021, arXiv:2106.07447). MERT's published folder brings code of its own; its weights fit `HubertModel`, so
that code is not run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from acestep_ray.device import small_tensor
from acestep_ray.errors import InputError
from acestep_ray.models.hubert import HubertFeatures
from acestep_ray.models.resample import Resampler
from acestep_ray.models.weights import build_on_meta, load_weights, read_json

if TYPE_CHECKING:
    from transformers import HubertModel

SAMPLE_RATE = 48_000
SAMPLES_PER_FRAME = 320
# Sample rate in Hz and seconds a chunk, as the released model was trained with.
SETTINGS = {"mert": (24_000, 5), "m-hubert": (16_000, 30)}
# Seconds of chunks that share a pass where nobody says otherwise: a CPU gains nothing from more, a GPU needs this many
# to be busy.
_SECONDS_PER_PASS = {"cpu": 60, "cuda": 480}


class SSLEncoder(nn.Module):
    """Frozen features of songs: the last hidden state, chunk by chunk.

    `chunks_per_pass` bounds the memory of a pass, None as suits the device; a pass that finds too little halves it for
    good.
    """

    def __init__(
        self,
        name: str,
        sample_rate: int,
        chunk_seconds: int,
        model: HubertModel,
        *,
        dtype: torch.dtype = torch.float32,
        chunks_per_pass: int | None = None,
    ):
        super().__init__()
        self.name = name
        self.sample_rate = sample_rate
        self.chunk_seconds = chunk_seconds
        self.dim: int = model.config.hidden_size
        """Width of the features."""
        self.resample = Resampler(SAMPLE_RATE, sample_rate)
        self.hubert = HubertFeatures(model, dtype)
        self.chunks_per_pass = chunks_per_pass

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> SSLEncoder:
        """The encoder `name` ("mert" or "m-hubert") from its folder, frozen. Raises `InputError` if broken."""
        # Seconds of imports that who loads no SSL encoder need not wait for.
        from transformers import HubertConfig, HubertModel

        directory = Path(directory)
        settings = read_json(directory / "config.json")
        for option in ("feature_extractor_cqt", "deepnorm"):
            if settings.get(option):
                raise InputError(
                    f"`{option}` is on, which HuBERT does not have",
                    where=str(directory / "config.json"),
                    fix="use m-a-p/MERT-v1-330M",
                )
        # "mert_model" and the pointers to the folder's own code would only draw warnings.
        for key in ("model_type", "auto_map", "architectures"):
            settings.pop(key, None)
        model = build_on_meta(lambda: HubertModel(HubertConfig.from_dict(settings)), directory)
        # Pre-training heads may lie in the file beside the encoder.
        load_weights(model, directory, device=device, rename=_current_name, ignore=lambda name: True)
        model.eval().requires_grad_(False)
        return cls(name, *SETTINGS[name], model, dtype=dtype).to(device).eval()

    def encode(self, stereo_48k: torch.Tensor) -> torch.Tensor:
        """A song (2, n) at 48 kHz → features (frames, dim), about one frame for 320 samples at the model's rate.

        The song is normalised as a whole; the last chunk is padded with zeros and only the frames that begin within
        the song are kept.
        """
        return self.encode_batch([stereo_48k])[0]

    @torch.no_grad()
    def encode_batch(self, songs: list[torch.Tensor]) -> list[torch.Tensor]:
        """`encode` of every song (2, n), float32 on the encoder's device; chunks of different songs share passes."""
        waves, samples = self._normalised(songs)
        size = self.sample_rate * self.chunk_seconds
        counts = [-(-n // size) for n in samples]
        chunks = torch.cat(
            [wave[: count * size].unflatten(0, (-1, size)) for wave, count in zip(waves, counts, strict=True)]
        )
        hidden = self._encode_chunks(chunks)
        features = []
        for song, n in zip(hidden.split(counts), samples, strict=True):
            # A full chunk gives fewer frames than samples / 320: its own count bounds the cut.
            last_frames = -(-(n - (len(song) - 1) * size) // SAMPLES_PER_FRAME)
            end = (len(song) - 1) * song.shape[1] + min(last_frames, song.shape[1])
            features.append(song.flatten(0, 1)[:end].float())
        return features

    def _normalised(self, songs: list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
        """Mono songs (B, N) at the model's rate, each of mean 0 and variance 1 over its own samples (B,), then zeros.

        N is a whole number of chunks.
        """
        device = self.resample.weight.device
        mono = torch.nn.utils.rnn.pad_sequence(
            [song.to(device).mean(dim=0) for song in songs], batch_first=True
        )
        waves = self.resample(mono)
        samples = [self.resample.length(song.shape[-1]) for song in songs]
        lengths = small_tensor(samples, device)[:, None]
        inside = torch.arange(waves.shape[1], device=device) < lengths
        # Resampling reaches past a song's end.
        mean = torch.where(inside, waves, 0).sum(dim=1, keepdim=True) / lengths
        centred = torch.where(inside, waves - mean, 0)
        variance = centred.square().sum(dim=1, keepdim=True) / lengths
        normalised = centred / torch.sqrt(variance + 1e-7)
        return F.pad(normalised, (0, -waves.shape[1] % (self.sample_rate * self.chunk_seconds))), samples

    def _encode_chunks(self, chunks: torch.Tensor) -> torch.Tensor:
        """Chunks (N, samples) → hidden states (N, frames, dim), a pass at a time."""
        hidden: list[torch.Tensor] = []
        done = 0
        if self.chunks_per_pass is None:  # the encoder may have been moved since it was made
            self.chunks_per_pass = max(1, _SECONDS_PER_PASS.get(chunks.device.type, 60) // self.chunk_seconds)
        while done < len(chunks):
            batch = chunks[done : done + self.chunks_per_pass]
            try:
                hidden.append(self.hubert(batch))
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.chunks_per_pass = len(batch) // 2
            else:
                done += len(batch)
                continue
            # Out of the handler, where the traceback no longer holds the pass's tensors.
            torch.cuda.empty_cache()
        return torch.cat(hidden)


def _current_name(name: str) -> str:
    """Old-style weight norm and the prefix of a model with a head → the names of `HubertModel`."""
    name = name.removeprefix("hubert.")
    name = name.replace(
        "pos_conv_embed.conv.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0"
    )
    return name.replace(
        "pos_conv_embed.conv.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1"
    )
