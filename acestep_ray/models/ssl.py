"""Self-supervised audio features that the training loss is held against: MERT and m-HuBERT.

MERT (Li et al. 2023, arXiv:2306.00107) and mHuBERT-147 (Boito et al. 2024, arXiv:2406.06371) are both HuBERTs
(Hsu et al. 2021, arXiv:2106.07447). MERT's published folder brings code of its own; its weights fit `HubertModel`, so
that code is not run.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchaudio.transforms import Resample
from transformers import HubertConfig, HubertModel

from acestep_ray.errors import InputError
from acestep_ray.models.weights import build_on_meta, load_weights, read_json

SAMPLE_RATE = 48_000
SAMPLES_PER_FRAME = 320
# Sample rate in Hz and seconds a chunk, as the released model was trained with.
SETTINGS = {"mert": (24_000, 5), "m-hubert": (16_000, 30)}
_SECONDS_PER_PASS = 60


class SSLEncoder(nn.Module):
    """Frozen features of a song: the last hidden state, chunk by chunk."""

    def __init__(self, name: str, sample_rate: int, chunk_seconds: int, model: HubertModel):
        super().__init__()
        self.name = name
        self.sample_rate = sample_rate
        self.chunk_seconds = chunk_seconds
        self.model = model
        self.resample = Resample(SAMPLE_RATE, sample_rate)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, name: str, *, device: torch.device | str = "cpu"
    ) -> SSLEncoder:
        """The encoder `name` ("mert" or "m-hubert") from its folder, float32, frozen. Raises `InputError` if broken."""
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
        return cls(name, *SETTINGS[name], model).to(device).eval()

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.model.config.hidden_size

    @torch.no_grad()
    def encode(self, stereo_48k: torch.Tensor) -> torch.Tensor:
        """A song (2, n) at 48 kHz → features (frames, dim), about one frame for 320 samples at the model's rate.

        The song is normalised as a whole; the last chunk is padded with zeros and only the frames that begin within
        the song are kept.
        """
        mono = self.resample(stereo_48k.to(self.resample.kernel.device).mean(dim=0))
        mono = (mono - mono.mean()) / torch.sqrt(mono.var(correction=0) + 1e-7)
        chunk_size = self.sample_rate * self.chunk_seconds
        samples = mono.shape[-1]
        chunks = F.pad(mono, (0, -samples % chunk_size)).unflatten(0, (-1, chunk_size))
        chunks_per_pass = max(1, _SECONDS_PER_PASS // self.chunk_seconds)
        hidden = torch.cat([self.model(batch).last_hidden_state for batch in chunks.split(chunks_per_pass)])
        # A full chunk gives fewer frames than samples / 320: its own count bounds the cut.
        last_frames = -(-(samples - (len(chunks) - 1) * chunk_size) // SAMPLES_PER_FRAME)
        return torch.cat([hidden[:-1].flatten(0, 1), hidden[-1, :last_frames]])


def _current_name(name: str) -> str:
    """Old-style weight norm and the prefix of a model with a head → the names of `HubertModel`."""
    name = name.removeprefix("hubert.")
    name = name.replace(
        "pos_conv_embed.conv.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0"
    )
    return name.replace(
        "pos_conv_embed.conv.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1"
    )
