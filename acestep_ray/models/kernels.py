"""What the encoders do between matrix products and convolutions, each as one pass over memory.

Images are (B, H, W, C), contiguous; `widths` (B,) int64 are each song's valid columns, None takes all as valid. On a
GPU the passes are Triton kernels; on a CPU, and where Triton cannot compile, the same functions are plain torch.
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

# As in diffusers' linear attention.
ATTENTION_EPS = 1e-15


def runs_triton(x: Tensor) -> bool:
    """Whether Triton kernels do the work on the device of `x`; elsewhere plain torch does."""
    return x.is_cuda and _compiles()


@functools.cache
def _compiles() -> bool:
    """Tried once in a process: Triton needs a C compiler and a GPU that it knows."""
    try:
        from acestep_ray.models import codec_kernels

        x = torch.zeros(1, 1, 1, 16, device="cuda", dtype=torch.float16)
        codec_kernels.bias_silu_(x, x.flatten(), None)
    except Exception as error:  # whatever the compiler, the driver or the import raise
        warnings.warn(
            f"Triton compiles nothing here ({type(error).__name__}: {error}); the encoders run several times slower",
            stacklevel=2,
        )
        return False
    return True


def column_mask(x: Tensor, widths: Tensor) -> Tensor:
    """(B, 1, W, 1), one where a column of the image `x` lies within its song."""
    columns = torch.arange(x.shape[2], device=x.device)
    return (columns < widths[:, None])[:, None, :, None]


def masked(x: Tensor, widths: Tensor | None) -> Tensor:
    """Zeros past each song's end, which is what a convolution finds past the end of a song alone."""
    return x if widths is None else torch.where(column_mask(x, widths), x, 0)


def first_convolution(mel: Tensor, weight: Tensor, bias: Tensor, widths: Tensor | None) -> Tensor:
    """A 3×3 convolution of mel (B, channels, H, W) into an image of the weight's dtype, masked."""
    if runs_triton(mel):
        from acestep_ray.models import codec_kernels

        return codec_kernels.first_convolution(mel, weight, bias, widths)
    if widths is not None:
        mel = torch.where(
            torch.arange(mel.shape[-1], device=mel.device) < widths[:, None, None, None], mel, 0
        )
    out = F.conv2d(mel.to(weight.dtype), weight, bias, padding=1)
    return masked(out.permute(0, 2, 3, 1).contiguous(), widths)


def bias_silu_(x: Tensor, bias: Tensor, widths: Tensor | None) -> Tensor:
    """silu(x + bias), masked; may write over `x`."""
    if runs_triton(x):
        from acestep_ray.models import codec_kernels

        return codec_kernels.bias_silu_(x, bias, widths)
    return masked(F.silu(x + bias), widths)


def add_rms_norm_(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, widths: Tensor | None
) -> Tensor:
    """residual + RMSNorm(x), over the channels and in float32, masked; may write over `x`."""
    if runs_triton(x):
        from acestep_ray.models import codec_kernels

        return codec_kernels.add_rms_norm_(residual, x, weight, bias, eps, widths)
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return masked((scaled * weight + bias + residual).to(x.dtype), widths)


def add_halved_(x: Tensor, convolved: Tensor, bias: Tensor, group: int, widths: Tensor | None) -> Tensor:
    """convolved + bias + shortcut, masked; may write over `convolved` (B, H / 2, W / 2, C').

    The shortcut of x (B, H, W, C) is the mean over each `group` neighbouring channels of pixel_unshuffle(x, 2).
    """
    if runs_triton(x):
        from acestep_ray.models import codec_kernels

        return codec_kernels.add_halved_(x, convolved, bias, group, widths)
    shuffled = F.pixel_unshuffle(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    return masked(convolved + bias + shuffled.unflatten(-1, (-1, group)).mean(dim=-1), widths)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, widths: Tensor | None) -> Tensor:
    """A depthwise K×K convolution with `weight` (C, 1, K, K), K odd; what lies past a song's end is read as zero."""
    if runs_triton(x):
        from acestep_ray.models import codec_kernels

        return codec_kernels.depthwise(x, weight, bias, widths, gated=False)
    image = masked(x, widths).permute(0, 3, 1, 2)
    out = F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return out.permute(0, 2, 3, 1).contiguous()


def gated_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, widths: Tensor | None) -> Tensor:
    """`depthwise` of silu(x), then the first half of the channels times SiLU of the second: (B, H, W, C / 2)."""
    if runs_triton(x):
        from acestep_ray.models import codec_kernels

        return codec_kernels.depthwise(x, weight, bias, widths, gated=True)
    hidden, gate = depthwise(F.silu(x), weight, bias, widths).chunk(2, dim=-1)
    return hidden * F.silu(gate)


def linear_attention(
    scales: list[tuple[Tensor, Tensor | None]], head_dim: int, widths: Tensor | None
) -> Tensor:
    """ReLU linear attention of every pixel with its song → (B, H, W, heads · head_dim), heads scale after scale.

    Each scale is an image whose channels are, head by head, a query, a key and a value of `head_dim` channels, and the
    weight (C, head_dim, 1, 1) of a 1×1 convolution in groups of `head_dim` that comes first, or None.
    """
    if runs_triton(scales[0][0]):
        from acestep_ray.models import codec_attention_kernels

        return codec_attention_kernels.linear_attention(scales, head_dim, widths)
    joined = [
        image if weight is None else _grouped_linear(image, weight.flatten(1)) for image, weight in scales
    ]
    image = torch.cat(joined, dim=-1)
    heads = image.flatten(1, 2).unflatten(-1, (-1, 3, head_dim))
    query, key, value = heads.float().permute(0, 2, 3, 1, 4).unbind(dim=2)  # (B, heads, H·W, head_dim)
    query, key = F.relu(query), F.relu(key)
    if widths is not None:
        # Padding has a zero key: it adds to neither the sums nor their normalisation.
        inside = column_mask(image, widths).expand(-1, image.shape[1], -1, -1).flatten(1, 2)
        key = torch.where(inside[:, None], key, 0)
    attended = query @ (key.transpose(-1, -2) @ value)
    attended = attended / (query @ key.sum(dim=-2)[..., None] + ATTENTION_EPS)
    return attended.to(image.dtype).transpose(1, 2).reshape(*image.shape[:3], -1)


def _grouped_linear(image: Tensor, weight: Tensor) -> Tensor:
    """A grouped 1×1 convolution with `weight` (C, C / groups): one small matrix product a group."""
    size = weight.shape[1]
    groups = weight.unflatten(0, (-1, size))  # (G, out, in)
    flat = image.flatten(0, -2).unflatten(-1, (-1, size)).transpose(0, 1)  # (G, N, in)
    return torch.bmm(flat, groups.transpose(1, 2)).transpose(0, 1).reshape(image.shape)


def log_mel(spectrum: Tensor, filters: Tensor, used_bins: int, *, floor: float, eps: float) -> Tensor:
    """Spectra (N, T, bins) complex and filters (mels, bins), zero from `used_bins` on → (N, mels, T).

    Natural logarithm of the filtered magnitudes √(re² + im² + eps), not under `floor`.
    """
    if runs_triton(filters):
        from acestep_ray.models import mel_kernels

        return mel_kernels.log_mel(spectrum.contiguous(), filters, used_bins, floor, eps)
    magnitude = torch.sqrt(spectrum.real.square() + spectrum.imag.square() + eps)
    return torch.log((filters @ magnitude.transpose(1, 2)).clamp(min=floor))


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, added: Tensor | None = None, gelu: bool = False
) -> Tensor:
    """Layer norm of x + added over the last dimension, then GELU if asked; in 16 bits its tanh form."""
    if runs_triton(x):
        from acestep_ray.models import hubert_kernels

        return hubert_kernels.layer_norm(x, added, weight, bias, eps, gelu)
    if added is not None:
        x = x + added
    x = F.layer_norm(x, weight.shape, weight, bias, eps)
    return F.gelu(x) if gelu else x


def wave_layer(
    chunks: Tensor,
    taps: Tensor,
    conv_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stride: int,
    *,
    over_time: bool,
    dtype: torch.dtype,
) -> Tensor:
    """HuBERT's first layer: chunks (N, samples) float32, taps (C, width) → GELU of the normalised convolution
    (N, frames, C) in `dtype`.

    The norm is over the channels, or, `over_time`, each channel's over its chunk.
    """
    patches = chunks.unfold(1, taps.shape[1], stride)  # (N, frames, width)
    if runs_triton(chunks):
        from acestep_ray.models import hubert_kernels

        if not over_time:
            return hubert_kernels.wave_layer(chunks, taps, conv_bias, weight, bias, eps, stride, True, dtype)
        mean, variance = _filtered_moments(patches, taps)
        gain = torch.rsqrt(variance + eps) * weight
        # A bias before this norm moves the mean and changes nothing.
        return hubert_kernels.wave_layer(
            chunks, taps, None, gain, bias - mean * gain, eps, stride, False, dtype
        )
    x = F.linear(patches, taps, conv_bias)
    if over_time:
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        x = (x - mean) * torch.rsqrt(variance + eps) * weight + bias
    else:
        x = F.layer_norm(x, weight.shape, weight, bias, eps)
    return F.gelu(x).to(dtype)


def _filtered_moments(patches: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over time (N, C) of each filter's output, from the moments of what it filters.

    The variance of w·x is wᵀ Cov(x) w, so the output itself, hundreds of channels wide, is not needed.
    """
    frames = patches.shape[1]
    mean = patches.mean(dim=1)
    # Sums over shorter stretches first: one long product of two narrow matrices leaves most of a GPU idle.
    stretch = 512
    padded = F.pad(patches - mean[:, None], (0, 0, 0, -frames % stretch)).unflatten(1, (-1, stretch))
    covariance = torch.matmul(padded.transpose(-1, -2), padded).sum(dim=1) / frames  # (N, width, width)
    variance = torch.einsum("ci,nij,cj->nc", taps, covariance, taps)
    return mean @ taps.T, variance
