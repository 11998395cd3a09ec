"""The lyric encoder in fewer passes over memory, for a GPU: the numbers of `lyric_encoder`, sooner.

Linear layers run as they are, whatever LoRA lies on them. What is between them is one pass each, forward and backward,
with masks of dropout that are computed again and never stored. The stream is float32, what products read 16-bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count, repeat
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from acestep_ray.models import lyric_kernels as kernels
from acestep_ray.models.lyric_encoder import (
    POSITION_OFFSET,
    LyricEncoder,
    LyricEncoderLayer,
    RelativeSelfAttention,
    relative_sinusoids,
)
from acestep_ray.models.lyric_kernels import Draw

# Tokens are filled up to a multiple of this: rows of attention weights then begin where wide reads can.
LENGTH_STEP = 16


class _Dropout(torch.autograd.Function):
    """dropout(factor · x) or dropout(SiLU(x)), in the given dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, draw: Draw | None, factor: float, activated: bool, dtype: torch.dtype
    ) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x if activated else None)
        ctx.draw, ctx.factor, ctx.activated, ctx.dtype = draw, factor, activated, x.dtype
        out = torch.empty_like(x, dtype=dtype)
        return kernels.dropout_pass(x, None, out, draw, factor=factor, activated=activated)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad = torch.empty_like(out_grad, dtype=ctx.dtype, memory_format=torch.contiguous_format)
        kernels.dropout_pass(
            x, out_grad.contiguous(), grad, ctx.draw, factor=ctx.factor, activated=ctx.activated
        )
        return grad, None, None, None, None


class _AddNorm(torch.autograd.Function):
    """stream + dropout(update) (without an update the stream itself), and of that the layer norm."""

    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        update: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        draw: Draw | None,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        if update is not None:
            update = update.contiguous()
        added, normed, statistics = kernels.add_norm(stream, update, draw, weight, bias, eps, dtype)
        ctx.save_for_backward(added, statistics, weight)
        ctx.draw = draw
        ctx.update_dtype = None if update is None else update.dtype
        ctx.bias_dtype = bias.dtype
        ctx.set_materialize_grads(False)
        return added, normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, added_grad: Tensor | None, normed_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        added, statistics, weight = ctx.saved_tensors
        if added_grad is None and normed_grad is None:
            return (None,) * 7
        added_grad, normed_grad = (g if g is None else g.contiguous() for g in (added_grad, normed_grad))
        stream_grad, update_grad = kernels.add_norm_backward(
            added, statistics, ctx.draw, weight, added_grad, normed_grad, ctx.update_dtype
        )
        weight_grad = bias_grad = None
        if normed_grad is not None and (ctx.needs_input_grad[2] or ctx.needs_input_grad[3]):
            mean, factor = statistics.split(1, dim=-1)
            of_normed = normed_grad.float()
            weight_grad = (of_normed * (added.float() - mean) * factor).sum(dim=(0, 1)).to(weight.dtype)
            bias_grad = of_normed.sum(dim=(0, 1)).to(ctx.bias_dtype)
        return stream_grad, update_grad, weight_grad, bias_grad, None, None, None


class _RelativeAttention(torch.autograd.Function):
    """`RelativeSelfAttention` between its linear layers."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        p: Tensor,
        bias_u: Tensor,
        bias_v: Tensor,
        mask: Tensor,
        draw: Draw | None,
    ) -> Tensor:
        batch = len(q)
        heads, head_dim = bias_u.shape
        scale = 1.0 / math.sqrt(head_dim)
        q, k, v = (x.contiguous() for x in (q, k, v))
        q_u, q_v, k, v = kernels.split_heads(q, k, v, bias_u, bias_v).unbind()
        by_head = p.unflatten(-1, (heads, head_dim)).transpose(1, 2)
        places = by_head.expand(batch, -1, -1, -1).reshape(batch * heads, -1, head_dim)
        content = torch.bmm(q_u, k.transpose(1, 2))
        position = torch.bmm(q_v, places.transpose(1, 2))
        weights, dropped = kernels.relative_softmax(content, position, mask, heads, scale, draw)
        ctx.save_for_backward(q_u, q_v, k, v, places, weights, dropped)
        ctx.heads, ctx.scale, ctx.draw = heads, scale, draw
        ctx.shared_positions = len(p) != batch
        ctx.bias_dtypes = bias_u.dtype, bias_v.dtype
        return torch.bmm(dropped, v).unflatten(0, (batch, heads)).transpose(1, 2).reshape(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        q_u, q_v, k, v, places, weights, dropped = ctx.saved_tensors
        heads, needs = ctx.heads, ctx.needs_input_grad
        head_dim = q_u.shape[-1]
        out_grad = out_grad.unflatten(-1, (heads, head_dim)).transpose(1, 2).reshape(q_u.shape)
        v_grad = torch.bmm(dropped.transpose(1, 2), out_grad)
        dropped_grad = torch.bmm(out_grad, v.transpose(1, 2))
        content_grad, position_grad = kernels.relative_softmax_backward(
            weights, dropped_grad, places.shape[1], heads, ctx.scale, ctx.draw
        )
        k_grad = torch.bmm(content_grad.transpose(1, 2), q_u)
        q_u_grad = torch.bmm(content_grad, k)
        q_v_grad = torch.bmm(position_grad, places)
        p_grad = None
        if needs[3]:
            by_head = torch.bmm(position_grad.transpose(1, 2), q_v).unflatten(0, (-1, heads))
            p_grad = by_head.transpose(1, 2).flatten(2)
            if ctx.shared_positions:
                p_grad = p_grad.sum(dim=0, keepdim=True)
        bias_grads = [
            grad.unflatten(0, (-1, heads)).sum(dim=(0, 2), dtype=torch.float32).to(dtype) if needed else None
            for grad, dtype, needed in zip((q_u_grad, q_v_grad), ctx.bias_dtypes, needs[4:6], strict=True)
        ]
        q_grad, k_grad, v_grad = kernels.join_heads(q_u_grad, q_v_grad, k_grad, v_grad, heads).unbind()
        return q_grad, k_grad, v_grad, p_grad, *bias_grads, None, None


class FusedLyricEncoder:
    """A `LyricEncoder` in few passes."""

    def __init__(self, encoder: LyricEncoder):
        self.encoder = encoder

    def takes(self, x: Tensor) -> bool:
        """Whether x is work for it: in 16 bits, on a GPU."""
        return x.is_cuda and _dtype_of(x).itemsize == 2

    def __call__(self, x: Tensor, mask: Tensor, dropout_seeds: Tensor | None = None) -> Tensor:
        """As `LyricEncoder.forward`, in the dtype of products; what it gives for padding is finite, and no more."""
        dtype = _dtype_of(x)
        draws = _draws(dropout_seeds)
        length, filling = x.shape[1], -x.shape[1] % LENGTH_STEP
        if filling:
            x, mask = F.pad(x, (0, 0, 0, filling)), F.pad(mask, (0, filling))
        mask = mask.contiguous()
        embedded = self.encoder.embed(x)
        stream = _Dropout.apply(embedded, next(draws), math.sqrt(x.shape[-1]), False, torch.float32)
        if dropout_seeds is not None:
            stream = _Dropout.apply(stream, next(draws), 1.0, False, torch.float32)
        positions = _positions(stream, next(draws), dtype)
        layers = cast(list[LyricEncoderLayer], list(self.encoder.encoders))
        stream, normed = _add_norm(stream, None, layers[0].norm_mha, None, dtype)
        following = [*(layer.norm_mha for layer in layers[1:]), self.encoder.after_norm]
        for layer, norm in zip(layers, following, strict=True):
            stream, normed = _layer(layer, stream, normed, norm, mask, positions, draws)
        return normed[:, :length]


def _layer(
    layer: LyricEncoderLayer,
    stream: Tensor,
    normed: Tensor,
    following: nn.LayerNorm,
    mask: Tensor,
    positions: Tensor,
    draws: Iterator[Draw | None],
) -> tuple[Tensor, Tensor]:
    """The stream and its norm for the layer to the same for what follows."""
    dtype = normed.dtype
    attended = _attend(layer.self_attn, normed, mask, positions, next(draws))
    stream, normed = _add_norm(stream, attended, layer.norm_ff, next(draws), dtype)
    hidden = layer.feed_forward.w_1(normed)
    hidden = _Dropout.apply(hidden, next(draws), 1.0, True, hidden.dtype)
    return _add_norm(stream, layer.feed_forward.w_2(hidden), following, next(draws), dtype)


def _attend(
    attention: RelativeSelfAttention, x: Tensor, mask: Tensor, positions: Tensor, draw: Draw | None
) -> Tensor:
    attended = _RelativeAttention.apply(
        attention.linear_q(x),
        attention.linear_k(x),
        attention.linear_v(x),
        attention.linear_pos(positions),
        attention.pos_bias_u,
        attention.pos_bias_v,
        mask,
        draw,
    )
    return attention.linear_out(attended)


def _add_norm(
    stream: Tensor, update: Tensor | None, norm: nn.LayerNorm, draw: Draw | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _AddNorm.apply(stream, update, norm.weight, norm.bias, draw, norm.eps, dtype)


def _positions(stream: Tensor, draw: Draw | None, dtype: torch.dtype) -> Tensor:
    """Sinusoids of the relative positions T − 1 … −T, (B, 2T, C), or (1, 2T, C) where nothing is dropped.

    No pair reads the last one; with it, rows of scores by position have a length that products are fast at.
    """
    batch, length, width = stream.shape
    # Of one token more, without its first and most distant position.
    sinusoids = relative_sinusoids(length + 1, width, stream.device)[1:]
    if draw is None:
        return sinusoids.to(dtype)[None]
    out = sinusoids.new_empty(batch, 2 * length, width, dtype=dtype)
    # Numbered as the plain encoder numbers them.
    return kernels.dropout_pass(
        sinusoids, None, out, draw, first_number=length - 1 + POSITION_OFFSET, number_step=-1
    )


def _draws(seeds: Tensor | None) -> Iterator[Draw | None]:
    """One for every call of dropout, in the plain encoder's order."""
    if seeds is None:
        return repeat(None)
    seeds = seeds.contiguous()
    return (Draw(seeds, layer) for layer in count(1))


def _dtype_of(x: Tensor) -> torch.dtype:
    """What products are computed in where x is."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def fuse_lyric_encoder(encoder: LyricEncoder) -> None:
    """Let the encoder run here wherever it is given 16-bit work on a GPU."""
    encoder.fused = FusedLyricEncoder(encoder)
