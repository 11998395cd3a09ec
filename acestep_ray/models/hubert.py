"""HuBERT's forward pass (Hsu et al. 2021, arXiv:2106.07447) for many chunks at once, over transformers' weights.

The same numbers as `HubertModel`. Time comes before channels throughout, so that norms and products read memory in
order; q, k and v are one product; a residual is added by the product that feeds it. In 16 bits on a GPU, GELU is its
tanh form, 5e-4 off at most: less than what 16 bits round away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acestep_ray.models.kernels import layer_norm, wave_layer

if TYPE_CHECKING:
    from transformers import HubertModel


class HubertFeatures(nn.Module):
    """Chunks (N, samples), float32 → last hidden state (N, frames, dim) in `dtype`.

    `model` is frozen and converted to `dtype` in place, but for its first layer, whose few weights see the wave itself
    and stay float32.
    """

    taps: Tensor
    taps_bias: Tensor | None
    first_gain: Tensor
    first_shift: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    position_weight: Tensor
    stream_bias: Tensor

    def __init__(self, model: HubertModel, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model = cast(Any, model)  # what its layers hold is not in their types
        config, encoder = model.config, self.model.encoder
        self.heads = config.num_attention_heads
        self.norm_first = config.do_stable_layer_norm
        self.norm_over_time = config.feat_extract_norm == "group"
        first = self.model.feature_extractor.conv_layers[0]
        self._keep("taps", first.conv.weight[:, 0])
        self._keep("taps_bias", first.conv.bias)
        self._keep("first_gain", first.layer_norm.weight)
        self._keep("first_shift", first.layer_norm.bias)
        attentions = [layer.attention for layer in encoder.layers]
        self._keep("qkv_weight", _joined_projections(attentions, "weight"), dtype)
        self._keep("qkv_bias", _joined_projections(attentions, "bias"), dtype)
        self._keep("position_weight", encoder.pos_conv_embed.conv.weight, dtype)
        # Biases that the stream would have gathered before each half of each layer, and at the end.
        biases = [bias for layer in encoder.layers for bias in _output_biases(layer)]
        sums = torch.stack(biases).float().cumsum(dim=0)
        self._keep("stream_bias", torch.cat([torch.zeros_like(sums[:1]), sums]), dtype)
        self.model.to(dtype)
        self._spectra: dict[int, SpectralConvolution] = {}

    def _keep(self, name: str, weight: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        if weight is not None:
            # Cloned: the model's own parameter is about to change its dtype.
            weight = weight.detach().to(dtype, copy=True).contiguous()
        self.register_buffer(name, weight, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.qkv_weight.dtype

    def forward(self, chunks: Tensor) -> Tensor:
        x = self.project(self.extract(chunks))
        x = x + self.positions(x)
        return self.encode_first_normed(x) if self.norm_first else self.encode_last_normed(x)

    def extract(self, chunks: Tensor) -> Tensor:
        """Seven strided convolutions over the wave → (N, frames, 512)."""
        layers = self.model.feature_extractor.conv_layers
        x = wave_layer(
            chunks, self.taps, self.taps_bias, self.first_gain, self.first_shift, layers[0].layer_norm.eps,
            layers[0].conv.stride[0], over_time=self.norm_over_time, dtype=self.dtype,
        )  # fmt: skip
        for layer in layers[1:]:
            conv = layer.conv
            if self.norm_over_time:
                x = _gelu(strided_convolution(x, conv.weight, conv.bias, conv.stride[0]))
            else:
                norm = layer.layer_norm
                x = strided_convolution(x, conv.weight, None, conv.stride[0])
                x = layer_norm(x, norm.weight, norm.bias, norm.eps, added=conv.bias, gelu=True)
        return x

    def project(self, x: Tensor) -> Tensor:
        projection = self.model.feature_projection
        if projection.feat_proj_layer_norm:
            x = _normed(projection.layer_norm, x)
        return _linear(projection.projection, x)

    def positions(self, x: Tensor) -> Tensor:
        """The grouped convolution over time that tells the layers where a frame is."""
        conv = self.model.encoder.pos_conv_embed.conv
        if x.is_cuda:
            # cuDNN takes up to 17 ms a minute of song for it, depending on the number of chunks.
            return _gelu(self._position_spectra(x.shape[1])(x, conv.bias))
        weight = self.position_weight
        out = F.conv1d(
            x.transpose(1, 2), weight, conv.bias, padding=weight.shape[-1] // 2, groups=conv.groups
        )
        return _gelu(out.transpose(1, 2)[:, : x.shape[1]])

    def _position_spectra(self, frames: int) -> SpectralConvolution:
        if frames not in self._spectra:
            groups = self.model.encoder.pos_conv_embed.conv.groups
            self._spectra[frames] = SpectralConvolution(self.position_weight, groups, frames)
        return self._spectra[frames]

    def encode_first_normed(self, x: Tensor) -> Tensor:
        """The transformer of large HuBERTs, which normalise before each half of a layer.

        The stream lacks the biases of the layers' last products: they are added where it is read.
        """
        encoder = self.model.encoder
        x = x.contiguous()
        for number, layer in enumerate(encoder.layers):
            normed = _normed(layer.layer_norm, x, self.stream_bias[2 * number])
            _add_product(x, self.attend(number, normed), layer.attention.out_proj.weight)
            normed = _normed(layer.final_layer_norm, x, self.stream_bias[2 * number + 1])
            _add_product(x, expand(layer.feed_forward, normed), layer.feed_forward.output_dense.weight)
        return _normed(encoder.layer_norm, x, self.stream_bias[-1])

    def encode_last_normed(self, x: Tensor) -> Tensor:
        """The transformer of base HuBERTs, which normalise after each half of a layer."""
        encoder = self.model.encoder
        x = _normed(encoder.layer_norm, x)
        for number, layer in enumerate(encoder.layers):
            output, dense = layer.attention.out_proj, layer.feed_forward.output_dense
            _add_product(x, self.attend(number, x), output.weight)
            x = _normed(layer.layer_norm, x, output.bias)
            _add_product(x, expand(layer.feed_forward, x), dense.weight)
            x = _normed(layer.final_layer_norm, x, dense.bias)
        return x

    def attend(self, number: int, x: Tensor) -> Tensor:
        """Attention of layer `number` before its output product."""
        joined = F.linear(x, self.qkv_weight[number], self.qkv_bias[number])
        query, key, value = joined.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def strided_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """(N, T, C) → (N, T', C'), no padding, as a convolution of images one pixel high with their channels last."""
    image = x[:, None].permute(0, 3, 1, 2)
    out = F.conv2d(image, weight[:, :, None], bias, (1, stride))
    return out.permute(0, 2, 3, 1)[:, 0].contiguous()


def expand(block: Any, x: Tensor) -> Tensor:
    """The first half of the feed-forward, with GELU."""
    dense = block.intermediate_dense
    if x.is_cuda and x.dtype != torch.float32:
        # The product's own epilogue applies the tanh form: no further pass over the widest tensor of the layer.
        out = torch._addmm_activation(dense.bias, x.flatten(0, 1), dense.weight.T, use_gelu=True)
        return out.unflatten(0, x.shape[:2])
    return F.gelu(_linear(dense, x))


def _add_product(x: Tensor, factor: Tensor, weight: Tensor) -> None:
    """x += factor · weightᵀ."""
    x.flatten(0, 1).addmm_(factor.flatten(0, 1), weight.T)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh" if x.is_cuda and x.dtype != torch.float32 else "none")


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)


def _normed(norm: nn.LayerNorm, x: Tensor, added: Tensor | None = None) -> Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps, added=added)


def _joined_projections(attentions: list[Any], name: str) -> Tensor:
    """(layers, 3 · dim, …): q, k and v of every layer."""
    return torch.stack(
        [
            torch.cat(
                [getattr(p, name).detach() for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
            )
            for attention in attentions
        ]
    )


def _output_biases(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.attention.out_proj.bias.detach(), layer.feed_forward.output_dense.bias.detach()


class SpectralConvolution:
    """A wide grouped convolution over time, without its last frame where the kernel is even, as a product of spectra.

    For inputs of `frames` frames; float32 inside. `weight` is (C, C / groups, K), padded by K // 2 on both sides.
    """

    def __init__(self, weight: Tensor, groups: int, frames: int):
        width = weight.shape[-1]
        self.frames, self.groups, self.padding = frames, groups, width // 2
        self.length = _smooth_length(frames + width)
        # A convolution layer correlates: its kernel's spectrum is conjugated.
        spectrum = torch.fft.rfft(weight.float(), n=self.length, dim=-1).conj()
        self.kernel = spectrum.unflatten(0, (groups, -1)).permute(3, 0, 2, 1).resolve_conj().contiguous()

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        """(N, frames, C) → the same shape and dtype."""
        spectrum = torch.fft.rfft(x.float(), n=self.length, dim=1)  # (N, F, C)
        spectrum = spectrum.unflatten(-1, (self.groups, -1)).permute(1, 2, 0, 3)  # (F, G, N, in)
        product = torch.matmul(spectrum, self.kernel).permute(2, 0, 1, 3).flatten(2)
        full = torch.fft.irfft(product, n=self.length, dim=1)
        # Output t reads inputs from t − padding on: it lies at that place of the circular correlation.
        wrapped = full[:, self.length - self.padding :]
        out = torch.cat([wrapped, full[:, : self.frames - self.padding]], dim=1)[:, : self.frames]
        return (out + bias.float()).to(x.dtype)


def _smooth_length(length: int) -> int:
    """The next length without prime factors above 5, which Fourier transforms are fast for."""
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return length
        length += 1
