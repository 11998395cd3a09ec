"""The lyric encoder: a pre-norm transformer with relative positions (Transformer-XL, Dai et al., 2019, Appendix B).

Parameter names are the released checkpoint's. There is no convolution module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acestep_ray.models.dropout import counter_dropout

if TYPE_CHECKING:
    from acestep_ray.models.fused_lyrics import FusedLyricEncoder

DROPOUT = 0.1
LAYER_NORM_EPS = 1e-5
# Added to relative positions to number them for dropout: larger than any sequence, so that none is negative.
POSITION_OFFSET = 1 << 20


@dataclass(frozen=True)
class LyricEncoderConfig:
    """Sizes of the lyric encoder; the defaults are the released model's."""

    attention_heads: int = 16
    linear_units: int = 4096
    num_blocks: int = 6


class Dropout:
    """The encoder's dropout for one forward pass; every call is a layer of its own."""

    def __init__(self, seeds: Tensor | None):
        self.seeds = seeds
        self.layer = 0

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        """Drop elements of x (B, …, rows, columns); `rows` are numbers that do not change with padding."""
        if self.seeds is None:
            return x
        self.layer += 1
        return counter_dropout(x, DROPOUT, self.seeds, self.layer, rows)


def relative_sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal embeddings (2 · length − 1, width) of the relative positions length − 1 … −(length − 1)."""
    positions = torch.arange(length - 1, -length, -1, dtype=torch.float32, device=device)
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    angles = positions[:, None] * torch.exp(exponents * -(math.log(10000.0) / width))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def relative_shift(scores: Tensor) -> Tensor:
    """(B, heads, T, 2T − 1), by relative position, → (B, heads, T, T), by key: Transformer-XL, Appendix B."""
    batch, heads, length, positions = scores.shape
    padded = F.pad(scores, (1, 0)).view(batch, heads, positions + 1, length)
    return padded[:, :, 1:].reshape(batch, heads, length, positions)[..., :length]


class RelativeSelfAttention(nn.Module):
    """Softmax self-attention with a content bias and a position bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.head_dim = width // heads
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, self.head_dim))

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor, dropout: Dropout) -> Tensor:
        """Attend within x (B, T, C); `mask` (B, T) is true on valid tokens; `positions` (B or 1, 2T − 1, C)."""
        q = self.linear_q(x).unflatten(-1, (self.heads, self.head_dim))
        k = self.linear_k(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        v = self.linear_v(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        p = self.linear_pos(positions).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        by_content = (q + self.pos_bias_u.to(q.dtype)).transpose(1, 2) @ k.transpose(-1, -2)
        by_position = (q + self.pos_bias_v.to(q.dtype)).transpose(1, 2) @ p.transpose(-1, -2)
        scores = (by_content + relative_shift(by_position)) / math.sqrt(self.head_dim)
        keys = mask[:, None, None, :]
        # Not −inf: dropped lyrics mask every key, and a row of −inf has no softmax.
        scores = scores.to(torch.float32).masked_fill(~keys, torch.finfo(torch.float32).min)
        weights = (scores.softmax(dim=-1) * keys).to(v.dtype)
        weights = dropout(weights, torch.arange(x.shape[1], device=x.device))
        return self.linear_out((weights @ v).transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """Two linear layers with a SiLU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.w_2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, dropout: Dropout) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        rows = torch.arange(x.shape[1], device=x.device)
        return self.w_2(dropout(F.silu(self.w_1(x)), rows))


class LyricEncoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, config: LyricEncoderConfig):
        super().__init__()
        self.self_attn = RelativeSelfAttention(width, config.attention_heads)
        self.feed_forward = FeedForward(width, config.linear_units)
        self.norm_ff = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.norm_mha = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor, dropout: Dropout) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        rows = torch.arange(x.shape[1], device=x.device)
        x = x + dropout(self.self_attn(self.norm_mha(x), mask, positions, dropout), rows)
        return x + dropout(self.feed_forward(self.norm_ff(x), dropout), rows)


class InputEmbedding(nn.Module):
    """Linear and layer norm, under the checkpoint's names `out.0` and `out.1`."""

    def __init__(self, width: int):
        super().__init__()
        self.out = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width, eps=LAYER_NORM_EPS))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        return self.out(x)


class LyricEncoder(nn.Module):
    """Encodes embedded lyric tokens."""

    def __init__(self, width: int, config: LyricEncoderConfig):
        super().__init__()
        self.embed = InputEmbedding(width)
        self.encoders = nn.ModuleList([LyricEncoderLayer(width, config) for _ in range(config.num_blocks)])
        self.after_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.fused: FusedLyricEncoder | None = None
        """The same in fewer passes, from `fused_lyrics.fuse_lyric_encoder`; used for what it takes."""

    def forward(self, x: Tensor, mask: Tensor, dropout_seeds: Tensor | None = None) -> Tensor:
        """Encode x (B, T, C); `mask` (B, T) is true on valid tokens.

        Dropout is on when `dropout_seeds` (B,) int64 is given, whatever the mode of the module.
        """
        if self.fused is not None and self.fused.takes(x):
            return self.fused(x, mask, dropout_seeds)
        dropout = Dropout(dropout_seeds)
        batch, length, width = x.shape
        rows = torch.arange(length, device=x.device)
        x = dropout(dropout(self.embed(x), rows) * math.sqrt(width), rows)
        positions = relative_sinusoids(length, width, x.device).to(x.dtype)[None]
        if dropout_seeds is not None:
            # Shifted so that every relative position has the same number, which is not negative, in any length.
            relative = torch.arange(length - 1, -length, -1, device=x.device) + POSITION_OFFSET
            positions = dropout(positions.expand(batch, -1, -1), relative)
        for layer in self.encoders:
            x = layer(x, mask, positions, dropout)
        return self.after_norm(x)
