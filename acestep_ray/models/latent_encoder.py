"""The encoder half of the deep-compression autoencoder (Chen et al. 2024, arXiv:2410.10733), for many songs at once.

The same weights and numbers as diffusers' `AutoencoderDC.encoder`, with two differences: a song padded at the end gets
the latents that it gets alone, and on a GPU everything between the large convolutions and matrix products is one pass
over memory each. Images are (B, H, W, C): channels last, as the tensor cores read them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acestep_ray.models.kernels import (
    add_halved_,
    add_rms_norm_,
    bias_silu_,
    depthwise,
    first_convolution,
    gated_depthwise,
    linear_attention,
    masked,
)

# One of diffusers' modules: what it holds depends on the model's configuration, which its type does not tell.
Block = Any


def encode_mel(encoder: Block, mel: Tensor, frames: Tensor | None = None) -> Tensor:
    """Normalised mel (B, 2, 128, T) → latents (B, 8, 16, T / 8), unscaled, in the weights' dtype.

    `encoder` is that of an `AutoencoderDC`. `frames` (B,) int64 are each song's valid mel frames, multiples of 8; None
    takes all as valid. Latents past a song's own are zero, as every image between two blocks is.
    """
    widths = frames
    x = first_convolution(mel, encoder.conv_in.weight, encoder.conv_in.bias, widths)
    for stage in encoder.down_blocks:
        for block in stage:
            if type(block).__name__ == "DCDownBlock2d" and widths is not None:
                widths = widths // 2
            x = _BLOCKS[type(block).__name__](block, x, widths)
    latents = _convolve(encoder.conv_out, x) + encoder.conv_out.bias
    if encoder.out_shortcut:
        latents = latents + x.unflatten(-1, (-1, encoder.out_shortcut_average_group_size)).mean(dim=-1)
    return masked(latents, widths).permute(0, 3, 1, 2)


def residual_block(block: Block, x: Tensor, widths: Tensor | None) -> Tensor:
    """Two 3×3 convolutions with SiLU between, RMSNorm, residual."""
    hidden = bias_silu_(_convolve(block.conv1, x), block.conv1.bias, widths)
    return _add_norm(block.norm, x, _convolve(block.conv2, hidden), widths)


def down_block(block: Block, x: Tensor, widths: Tensor | None) -> Tensor:
    """Half the height and width; the shortcut averages neighbouring pixels and channels. `widths` are the result's."""
    return add_halved_(x, _convolve(block.conv, x), block.conv.bias, block.group_size, widths)


def efficient_vit_block(block: Block, x: Tensor, widths: Tensor | None) -> Tensor:
    """EfficientViT (Cai et al. 2023, arXiv:2205.14756): multi-scale linear attention, then a gated feed-forward."""
    attention = block.attn
    weight = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
    joined = F.linear(x, weight)
    scales: list[tuple[Tensor, Tensor | None]] = [(joined, None)]
    for projection in attention.to_qkv_multiscale:
        wide = depthwise(joined, projection.proj_in.weight, projection.proj_in.bias, widths)
        scales.append((wide, projection.proj_out.weight))
    # The released model cuts q, k and v out of every 3 · head_dim neighbouring channels of the joined scales.
    attended = linear_attention(scales, attention.attention_head_dim, widths)
    x = _add_norm(attention.norm_out, x, F.linear(attended, attention.to_out.weight), widths)

    feed_forward = block.conv_out
    inverted, depth = feed_forward.conv_inverted, feed_forward.conv_depth
    hidden = F.linear(x, inverted.weight.flatten(1), inverted.bias)
    hidden = gated_depthwise(hidden, depth.weight, depth.bias, widths)
    return _add_norm(
        feed_forward.norm, x, F.linear(hidden, feed_forward.conv_point.weight.flatten(1)), widths
    )


_BLOCKS = {
    "ResBlock": residual_block,
    "DCDownBlock2d": down_block,
    "EfficientViTBlock": efficient_vit_block,
}


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution of an image, without its bias, which the next pass adds."""
    out = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, None, conv.stride, conv.padding)
    return out.permute(0, 2, 3, 1).contiguous()


def _add_norm(norm: Block, residual: Tensor, x: Tensor, widths: Tensor | None) -> Tensor:
    return add_rms_norm_(residual, x, norm.weight, norm.bias, norm.eps, widths)
