"""Linear self-attention and softmax cross-attention of the ACE-Step v1 transformer, and their rotary positions.

Both keep one linear layer for each of q, k, v and the output, under the released checkpoint's names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The released model divides by the sum of weights plus this.
NORMALISER_EPS = 1e-15


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine (..., N, head_dim) in float32 for integer `positions` (..., N).

    The frequencies are laid out in halves, cat(f, f), while `apply_rotary` pairs neighbours: the mixture is the
    released model's, and its weights depend on it.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = 1.0 / theta**exponents
    angles = positions.to(torch.float32)[..., None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring channels, (x0, x1) → (−x1, x0), of x (B, heads, N, head_dim); float32 out."""
    cos, sin = angles
    x = x.to(torch.float32)
    rotated = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos + rotated * sin


class Attention(nn.Module):
    """The four projections that both kinds of attention share."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, heads * head_dim)
        self.to_k = nn.Linear(dim, heads * head_dim)
        self.to_v = nn.Linear(dim, heads * head_dim)
        # A list of one, as in the checkpoint: `to_out.0`.
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, dim)])

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, heads · head_dim) → (B, heads, N, head_dim)."""
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def merge_heads(self, x: Tensor) -> Tensor:
        """(B, heads, N, head_dim) → (B, N, heads · head_dim)."""
        return x.transpose(1, 2).flatten(-2)


class LinearSelfAttention(Attention):
    """ReLU linear attention (Katharopoulos et al., 2020; as in SANA), its sums in float32."""

    def forward(self, x: Tensor, mask: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Attend within x (B, W, D); `mask` (B, W) is true on valid frames; `angles` (W, head_dim)."""
        q = self.split_heads(self.to_q(x))
        k = self.split_heads(self.to_k(x))
        v = self.split_heads(self.to_v(x))
        dtype = v.dtype
        with torch.autocast(x.device.type, enabled=False):
            valid = mask[:, None, :, None]
            q = F.relu(apply_rotary(q, angles))
            # A key of zero has no weight: padded frames add nothing to either sum.
            k = F.relu(apply_rotary(k, angles)) * valid
            v = v.to(torch.float32) * valid
            key_values = k.transpose(-1, -2) @ v
            key_sum = k.sum(dim=-2).unsqueeze(-1)
            out = (q @ key_values) / (q @ key_sum + NORMALISER_EPS)
        return self.to_out[0](self.merge_heads(out).to(dtype))


class CrossAttention(Attention):
    """Softmax attention from the latents' stream to the conditioning sequence."""

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        condition_mask: Tensor,
        angles: tuple[Tensor, Tensor],
        condition_angles: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Attend from x (B, W, D) to `condition` (B, N, D) where `condition_mask` (B, N) is true."""
        v = self.split_heads(self.to_v(condition))
        q = apply_rotary(self.split_heads(self.to_q(x)), angles).to(v.dtype)
        k = apply_rotary(self.split_heads(self.to_k(condition)), condition_angles).to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=condition_mask[:, None, None, :])
        return self.to_out[0](self.merge_heads(out))
