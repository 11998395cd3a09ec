"""The released vocoder: log-mel frames to a wave at 44.1 kHz.

A ConvNeXt backbone (Liu et al. 2022, arXiv:2201.03545) over mel frames and a HiFi-GAN generator (Kong et al. 2020,
arXiv:2010.05646) as its head. Parameter names are the released checkpoint's, with old-style weight norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from acestep_ray.models.weights import build_on_meta, load_weights, read_json


@dataclass(frozen=True)
class VocoderConfig:
    """`music_vocoder/config.json`; the defaults are the released model's."""

    input_channels: int = 128
    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (128, 256, 384, 512)
    kernel_sizes: tuple[int, ...] = (7,)
    upsample_rates: tuple[int, ...] = (4, 4, 2, 2, 2, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (8, 8, 4, 4, 4, 4, 4)
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11, 13)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5), (1, 3, 5))
    num_mels: int = 512
    """Channels between backbone and head; despite its name not the mels of the input."""
    upsample_initial_channel: int = 1024
    use_template: bool = False
    pre_conv_kernel_size: int = 13
    post_conv_kernel_size: int = 13

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> VocoderConfig:
        """From `config.json`; keys that shape no layer (sample rate, mel settings) are passed over.

        Raises ValueError for a variant with several backbone kernels or with a template signal, which the released
        model does not have.
        """
        known = {field.name for field in fields(cls)}
        config = cls(**{name: _frozen(value) for name, value in settings.items() if name in known})
        if len(config.kernel_sizes) != 1 or config.use_template:
            raise ValueError("the vocoder needs one entry in `kernel_sizes` and `use_template` false")
        return config

    @property
    def hop_length(self) -> int:
        """Samples that one mel frame becomes."""
        return prod(self.upsample_rates)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


class ChannelLayerNorm(nn.Module):
    """Layer norm over the channels of (B, C, T)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.mT, self.weight.shape, self.weight, self.bias, eps=1e-6).mT


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))
        self.dwconv = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.dwconv(x).mT)
        hidden = self.pwconv2(F.gelu(self.pwconv1(hidden)))
        return x + (self.gamma * hidden).mT


class ConvNeXtEncoder(nn.Module):
    """Mel frames (B, input_channels, T) → (B, dims[-1], T)."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        dims, kernel_size = config.dims, config.kernel_sizes[0]
        stem = nn.Sequential(
            nn.Conv1d(config.input_channels, dims[0], 7, padding=3, padding_mode="replicate"),
            ChannelLayerNorm(dims[0]),
        )
        between = [
            nn.Sequential(ChannelLayerNorm(narrow), nn.Conv1d(narrow, wide, 1))
            for narrow, wide in pairwise(dims)
        ]
        self.channel_layers = nn.ModuleList([stem, *between])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(dim, kernel_size) for _ in range(depth)))
            for dim, depth in zip(dims, config.depths, strict=True)
        )
        self.norm = ChannelLayerNorm(dims[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for channel_layer, stage in zip(self.channel_layers, self.stages, strict=True):
            x = stage(channel_layer(x))
        return self.norm(x)


class _WeightNorm(nn.Module):
    """Weight norm over dimension 0 with the parameter names `weight_g` and `weight_v`, mixed into a convolution."""

    weight: torch.Tensor

    def _normalise_weight(self) -> None:
        weight = self.weight.detach()
        del self.weight
        self.weight_g = nn.Parameter(torch.linalg.vector_norm(weight, dim=(1, 2), keepdim=True))
        self.weight_v = nn.Parameter(weight)

    def effective_weight(self) -> torch.Tensor:
        if "weight" in self._parameters:
            return self.weight
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def fold(self) -> None:
        weight = self.effective_weight().detach()
        del self.weight_g, self.weight_v
        self.weight = nn.Parameter(weight, requires_grad=False)


class WeightNormConv1d(_WeightNorm, nn.Conv1d):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, dilation: int = 1):
        padding = dilation * (kernel_size - 1) // 2
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation)
        self._normalise_weight()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv1d(x, self.effective_weight(), self.bias, padding=self.padding, dilation=self.dilation)


class WeightNormConvTranspose1d(_WeightNorm, nn.ConvTranspose1d):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=(kernel_size - stride) // 2)
        self._normalise_weight()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # takes no output size
        weight, padding = self.effective_weight(), cast(tuple[int], self.padding)
        return F.conv_transpose1d(x, weight, self.bias, stride=self.stride, padding=padding)


class ResidualBlock(nn.Module):
    """HiFi-GAN's residual block: for every dilation in turn, two convolutions with SiLU before each, added."""

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...]):
        super().__init__()
        self.convs1 = nn.ModuleList(
            WeightNormConv1d(channels, channels, kernel_size, dilation=dilation) for dilation in dilations
        )
        self.convs2 = nn.ModuleList(WeightNormConv1d(channels, channels, kernel_size) for _ in dilations)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            x = x + plain(F.silu(dilated(F.silu(x))))
        return x


class HiFiGANGenerator(nn.Module):
    """Features (B, num_mels, T) → wave (B, 1, T · hop_length) in [−1, 1]."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        channels = config.upsample_initial_channel
        self.conv_pre = WeightNormConv1d(config.num_mels, channels, config.pre_conv_kernel_size)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate, kernel_size in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
            self.ups.append(WeightNormConvTranspose1d(channels, channels // 2, kernel_size, stride=rate))
            channels //= 2
            for block_kernel, dilations in zip(
                config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
            ):
                self.resblocks.append(ResidualBlock(channels, block_kernel, dilations))
        self.conv_post = WeightNormConv1d(channels, 1, config.post_conv_kernel_size)
        self._blocks_per_rate = len(config.resblock_kernel_sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_pre(x)
        for i, upsample in enumerate(self.ups):
            x = upsample(F.silu(x))
            blocks = self.resblocks[i * self._blocks_per_rate : (i + 1) * self._blocks_per_rate]
            total = blocks[0](x)
            for block in blocks[1:]:
                total = total + block(x)
            x = total / self._blocks_per_rate
        return torch.tanh(self.conv_post(F.silu(x)))


class Vocoder(nn.Module):
    """Log-mel frames (B, 128, T) → wave (B, 1, T · hop_length) at 44.1 kHz, in [−1, 1]."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        self.config = config
        self.backbone = ConvNeXtEncoder(config)
        self.head = HiFiGANGenerator(config)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, device: torch.device | str = "cpu") -> Vocoder:
        """The vocoder in `music_vocoder/`, float32, frozen, weight norm folded. Raises `InputError` if broken."""
        directory = Path(directory)
        settings = read_json(directory / "config.json")
        vocoder = build_on_meta(lambda: cls(VocoderConfig.from_dict(settings)), directory)
        # A checkpoint may also carry the tables of its own mel front end, which are computed and no weights.
        load_weights(vocoder, directory, device=device, ignore=lambda name: name.startswith("mel_transform."))
        vocoder.eval().requires_grad_(False)
        vocoder.fold_weight_norm()
        return vocoder

    def fold_weight_norm(self) -> None:
        """Replace every `weight_g`, `weight_v` pair by the weight they make: for inference, not for saving."""
        for module in self.modules():
            if isinstance(module, _WeightNorm):
                module.fold()

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(mel))
