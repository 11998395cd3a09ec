"""Triton kernels of the lyric encoder, forward and backward; `fused_lyrics` says what they compute.

Streams are (B, T, C) and contiguous. What is dropped is what `dropout.counter_dropout` drops, bit for bit; the hashes
are computed again in the backward pass, and no mask is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from acestep_ray.models import dropout
from acestep_ray.models.block_kernels import _slope
from acestep_ray.models.lyric_encoder import DROPOUT
from acestep_ray.models.triton_kernels import _TILE, _device_of, _is_fast, _silu

_GAMMA = tl.constexpr(dropout._GAMMA)
_MIX_1 = tl.constexpr(dropout._MIX_1)
_MIX_2 = tl.constexpr(dropout._MIX_2)
_MIX_1_32 = tl.constexpr(dropout._MIX_1_32)
_MIX_2_32 = tl.constexpr(dropout._MIX_2_32)
# Signed hashes from here on are kept.
_THRESHOLD = tl.constexpr(int(DROPOUT * (1 << 32)) - (1 << 31))
_GAIN = tl.constexpr(1.0 / (1.0 - DROPOUT))


@dataclass(frozen=True)
class Draw:
    """The mask of one place of the network; None in its place drops nothing."""

    seeds: Tensor
    """(B,) int64."""
    layer: int


# --- dropout ---------------------------------------------------------------------------------------------------


@triton.jit
def _splitmix64(x):
    x = x * _GAMMA
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _drop(value, key, row, column):
    """Zeros in a tile by the hashes of its row and column numbers, the rest scaled."""
    row_hashes = _splitmix64(key ^ _splitmix64(row.to(tl.int64))).to(tl.int32)
    column_hashes = _splitmix64(column.to(tl.int64)).to(tl.int32)
    hashes = row_hashes[:, None] ^ column_hashes[None, :]
    hashes = (hashes ^ ((hashes >> 16) & 0xFFFF)) * _MIX_1_32
    hashes = (hashes ^ ((hashes >> 15) & 0x1FFFF)) * _MIX_2_32
    return tl.where(hashes >= _THRESHOLD, value * _GAIN, 0.0)


@triton.jit(do_not_specialize=["length", "layer", "first_number", "number_step"])
def _dropout_kernel(
    x, grad, seeds, out, length, layer, first_number, number_step, factor, C: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SHARED: tl.constexpr, ACTIVATED: tl.constexpr, BACKWARD: tl.constexpr,
    DROPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dropout(factor · x), or of SiLU(x); BACKWARD the gradient of x from `grad`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    song = tl.program_id(2)
    inside = (row < length)[:, None] & (column < C)[None, :]
    offsets = row[:, None] * C + column[None, :]
    start = song.to(tl.int64) * length * C
    source = offsets if SHARED else start + offsets
    if BACKWARD:
        value = tl.load(grad + start + offsets, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATED:
            value *= _slope(tl.load(x + source, mask=inside, other=0.0).to(tl.float32), FAST)
    else:
        value = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATED:
            value = _silu(value, FAST)
    value *= factor
    if DROPS:
        key = _splitmix64(tl.load(seeds + song) + layer)
        value = _drop(value, key, first_number + row * number_step, column)
    tl.store(out + start + offsets, value.to(out.dtype.element_ty), mask=inside)


def dropout_pass(
    x: Tensor | None,
    grad: Tensor | None,
    out: Tensor,
    draw: Draw | None,
    *,
    factor: float = 1.0,
    activated: bool = False,
    first_number: int = 0,
    number_step: int = 1,
) -> Tensor:
    """dropout(factor · x), or dropout(SiLU(x)), into `out` (B, T, C); with `grad`, which is out's, the gradient of x.

    x is (B, T, C), or (T, C) for all samples. The backward pass reads it only where it is `activated`. Row t has the
    number `first_number` + t · `number_step`.
    """
    batch, length, channels = out.shape
    block = min(triton.next_power_of_2(channels), 512)
    rows = _TILE // block
    with _device_of(out):
        _dropout_kernel[(triton.cdiv(length, rows), triton.cdiv(channels, block), batch)](
            x, grad, draw and draw.seeds, out, length, draw.layer if draw else 0, first_number, number_step,
            float(factor), C=channels, BLOCK=block, ROWS=rows, SHARED=x is not None and x.dim() == 2,
            ACTIVATED=activated, BACKWARD=grad is not None, DROPS=draw is not None, FAST=_is_fast(out), num_warps=4,
        )  # fmt: skip
    return out


# --- residual, dropout and layer norm ----------------------------------------------------------------------------


@triton.jit(do_not_specialize=["length", "layer"])
def _add_norm_kernel(
    stream, update, seeds, weight, bias, added, normed, statistics, length, layer, eps, C: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, ADDS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    song = tl.program_id(1)
    inside = (row < length)[:, None] & (column < C)[None, :]
    rows = song.to(tl.int64) * length + row
    offsets = rows[:, None] * C + column[None, :]
    x = tl.load(stream + offsets, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        y = tl.load(update + offsets, mask=inside, other=0.0).to(tl.float32)
        if DROPS:
            y = _drop(y, _splitmix64(tl.load(seeds + song) + layer), row, column)
        x += y
        tl.store(added + offsets, x.to(added.dtype.element_ty), mask=inside)
    mean = tl.sum(x, axis=1) / C
    centred = tl.where((column < C)[None, :], x - mean[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    tl.store(statistics + 2 * rows, mean, mask=row < length)
    tl.store(statistics + 2 * rows + 1, factor, mask=row < length)
    gain = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
    value = centred * factor[:, None] * gain[None, :] + shift[None, :]
    tl.store(normed + offsets, value.to(normed.dtype.element_ty), mask=inside)


def add_norm(
    stream: Tensor,
    update: Tensor | None,
    draw: Draw | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """stream + dropout(update), of that the layer norm in `dtype`, and its mean and 1 / σ, (B, T, 2) float32."""
    batch, length, channels = stream.shape
    added = torch.empty_like(stream) if update is not None else stream
    normed = torch.empty_like(stream, dtype=dtype)
    statistics = stream.new_empty(batch, length, 2, dtype=torch.float32)
    block = triton.next_power_of_2(channels)
    rows = max(1, _TILE // block)
    with _device_of(stream):
        _add_norm_kernel[(triton.cdiv(length, rows), batch)](
            stream, update, draw and draw.seeds, weight, bias, added, normed, statistics, length,
            draw.layer if draw else 0, eps, C=channels, BLOCK=block, ROWS=rows, ADDS=update is not None,
            DROPS=draw is not None, num_warps=8,
        )  # fmt: skip
    return added, normed, statistics


@triton.jit(do_not_specialize=["length", "layer"])
def _add_norm_backward_kernel(
    added, statistics, seeds, weight, added_grad, normed_grad, stream_grad, update_grad, length, layer,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADDS: tl.constexpr, DROPS: tl.constexpr,
    FROM_ADDED: tl.constexpr, FROM_NORMED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    song = tl.program_id(1)
    inside = (row < length)[:, None] & (column < C)[None, :]
    rows = song.to(tl.int64) * length + row
    offsets = rows[:, None] * C + column[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    if FROM_NORMED:
        mean = tl.load(statistics + 2 * rows, mask=row < length, other=0.0)
        factor = tl.load(statistics + 2 * rows + 1, mask=row < length, other=0.0)
        gain = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
        x = tl.load(added + offsets, mask=inside, other=0.0).to(tl.float32)
        normalised = tl.where(inside, (x - mean[:, None]) * factor[:, None], 0.0)
        grad = tl.load(normed_grad + offsets, mask=inside, other=0.0).to(tl.float32) * gain[None, :]
        along = tl.sum(grad * normalised, axis=1) / C
        total = factor[:, None] * (grad - (tl.sum(grad, axis=1) / C)[:, None] - normalised * along[:, None])
    if FROM_ADDED:
        total += tl.load(added_grad + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(stream_grad + offsets, total.to(stream_grad.dtype.element_ty), mask=inside)
    if ADDS:
        if DROPS:
            total = _drop(total, _splitmix64(tl.load(seeds + song) + layer), row, column)
        tl.store(update_grad + offsets, total.to(update_grad.dtype.element_ty), mask=inside)


def add_norm_backward(
    added: Tensor,
    statistics: Tensor,
    draw: Draw | None,
    weight: Tensor,
    added_grad: Tensor | None,
    normed_grad: Tensor | None,
    update_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the stream and, in `update_dtype` if any, of the update."""
    batch, length, channels = added.shape
    stream_grad = torch.empty_like(added)
    update_grad = None if update_dtype is None else torch.empty_like(added, dtype=update_dtype)
    block = triton.next_power_of_2(channels)
    rows = max(1, _TILE // block)
    with _device_of(added):
        _add_norm_backward_kernel[(triton.cdiv(length, rows), batch)](
            added, statistics, draw and draw.seeds, weight, added_grad, normed_grad, stream_grad, update_grad,
            length, draw.layer if draw else 0, C=channels, BLOCK=block, ROWS=rows, ADDS=update_dtype is not None,
            DROPS=draw is not None, FROM_ADDED=added_grad is not None, FROM_NORMED=normed_grad is not None,
            num_warps=8,
        )  # fmt: skip
    return stream_grad, update_grad


# --- attention between its matrix products ------------------------------------------------------------------------


@triton.jit(do_not_specialize=["length"])
def _split_heads_kernel(
    q, k, v, bias_u, bias_v, out, length, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = H * D
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    song = tl.program_id(2).to(tl.int64)
    inside = (row < length)[:, None] & (column < C)[None, :]
    source = song * length * C + row[:, None] * C + column[None, :]
    place = song * length * C + (column // D)[None, :] * length * D + row[:, None] * D + (column % D)[None, :]
    size = tl.num_programs(2).to(tl.int64) * length * C
    query = tl.load(q + source, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(bias_u + column, mask=column < C, other=0.0).to(tl.float32)
    tl.store(out + place, (query + u[None, :]).to(out.dtype.element_ty), mask=inside)
    w = tl.load(bias_v + column, mask=column < C, other=0.0).to(tl.float32)
    tl.store(out + size + place, (query + w[None, :]).to(out.dtype.element_ty), mask=inside)
    tl.store(out + 2 * size + place, tl.load(k + source, mask=inside, other=0.0), mask=inside)
    tl.store(out + 3 * size + place, tl.load(v + source, mask=inside, other=0.0), mask=inside)


def split_heads(q: Tensor, k: Tensor, v: Tensor, bias_u: Tensor, bias_v: Tensor) -> Tensor:
    """q, k and v (B, T, C), biases (H, D) → q + u, q + v's, k and v, (4, B · H, T, D)."""
    batch, length, channels = q.shape
    heads, head_dim = bias_u.shape
    out = q.new_empty(4, batch * heads, length, head_dim)
    block = min(triton.next_power_of_2(channels), 512)
    rows = _TILE // block
    with _device_of(q):
        _split_heads_kernel[(triton.cdiv(length, rows), triton.cdiv(channels, block), batch)](
            q, k, v, bias_u, bias_v, out, length, H=heads, D=head_dim, BLOCK=block, ROWS=rows, num_warps=4
        )
    return out


@triton.jit(do_not_specialize=["length"])
def _join_heads_kernel(
    content_grad, position_grad, key_grad, value_grad, out, length, H: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = H * D
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    song = tl.program_id(2).to(tl.int64)
    inside = (row < length)[:, None] & (column < C)[None, :]
    target = song * length * C + row[:, None] * C + column[None, :]
    place = song * length * C + (column // D)[None, :] * length * D + row[:, None] * D + (column % D)[None, :]
    size = tl.num_programs(2).to(tl.int64) * length * C
    query = tl.load(content_grad + place, mask=inside, other=0.0).to(tl.float32)
    query += tl.load(position_grad + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + target, query.to(out.dtype.element_ty), mask=inside)
    tl.store(out + size + target, tl.load(key_grad + place, mask=inside, other=0.0), mask=inside)
    tl.store(out + 2 * size + target, tl.load(value_grad + place, mask=inside, other=0.0), mask=inside)


def join_heads(
    content_grad: Tensor, position_grad: Tensor, key_grad: Tensor, value_grad: Tensor, heads: int
) -> Tensor:
    """Gradients (B · H, T, D) of both queries, keys and values → of q, k and v, (3, B, T, C)."""
    count, length, head_dim = content_grad.shape
    batch, channels = count // heads, heads * head_dim
    out = content_grad.new_empty(3, batch, length, channels)
    block = min(triton.next_power_of_2(channels), 512)
    rows = _TILE // block
    with _device_of(out):
        _join_heads_kernel[(triton.cdiv(length, rows), triton.cdiv(channels, block), batch)](
            content_grad, position_grad, key_grad, value_grad, out, length,
            H=heads, D=head_dim, BLOCK=block, ROWS=rows, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _head_key(seeds, song, head, layer):
    return _splitmix64(_splitmix64(tl.load(seeds + song) + layer) ^ (head + 1).to(tl.int64))


# `length` is specialised on: the encoder fills it up to a multiple of 16, and rows are then read in wide pieces.
@triton.jit(do_not_specialize=["layer"])
def _relative_softmax_kernel(
    content, position, keys, seeds, weights, dropped, length, positions, layer, scale, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head with all their keys."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    head = tl.program_id(1)
    song = tl.program_id(2)
    inside = (row < length)[:, None] & (column < length)[None, :]
    start = (song * tl.num_programs(1) + head).to(tl.int64) * length
    offsets = start * length + row[:, None] * length + column[None, :]
    # Of the relative positions length − 1, length − 2, …, query i and key j have number length − 1 − i + j.
    shifted = start * positions + (row * positions + length - 1 - row)[:, None] + column[None, :]
    valid = tl.load(keys + song.to(tl.int64) * length + column, mask=column < length, other=0) != 0
    scores = tl.load(content + offsets, mask=inside, other=0.0).to(tl.float32)
    scores += tl.load(position + shifted, mask=inside, other=0.0).to(tl.float32)
    # Not −inf: dropped lyrics mask every key, and a row of −inf has no softmax.
    scores = tl.where(valid[None, :], scores * scale, -3.0e38)
    value = tl.where(valid[None, :], tl.exp(scores - tl.max(scores, axis=1)[:, None]), 0.0)
    total = tl.sum(value, axis=1)
    value = value / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(weights + offsets, value.to(weights.dtype.element_ty), mask=inside)
    if DROPS:
        value = _drop(value, _head_key(seeds, song, head, layer), row, column)
        tl.store(dropped + offsets, value.to(dropped.dtype.element_ty), mask=inside)


def relative_softmax(
    content: Tensor, position: Tensor, keys: Tensor, heads: int, scale: float, draw: Draw | None
) -> tuple[Tensor, Tensor]:
    """Softmax weights (B · H, T, T) and the same after dropout.

    Scores are `scale` times the sum of `content` (B · H, T, T) and of `position` (B · H, T, 2T − 1 or 2T), shifted as
    by `relative_shift`; `keys` (B, T) is true on valid tokens. Without one, weights are zero.
    """
    count, length, positions = position.shape
    weights = torch.empty_like(content)
    dropped = torch.empty_like(content) if draw is not None else weights
    block = triton.next_power_of_2(length)
    rows = max(1, _TILE // block)
    with _device_of(content):
        _relative_softmax_kernel[(triton.cdiv(length, rows), heads, count // heads)](
            content, position, keys.view(torch.uint8), draw and draw.seeds, weights, dropped, length, positions,
            draw.layer if draw else 0, scale, BLOCK=block, ROWS=rows, DROPS=draw is not None, num_warps=8,
        )  # fmt: skip
    return weights, dropped


@triton.jit(do_not_specialize=["layer"])
def _relative_softmax_backward_kernel(
    weights, dropped_grad, seeds, content_grad, position_grad, length, positions, layer, scale,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    head = tl.program_id(1)
    song = tl.program_id(2)
    inside = (row < length)[:, None] & (column < length)[None, :]
    start = (song * tl.num_programs(1) + head).to(tl.int64) * length
    offsets = start * length + row[:, None] * length + column[None, :]
    value = tl.load(weights + offsets, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dropped_grad + offsets, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        grad = _drop(grad, _head_key(seeds, song, head, layer), row, column)
    grad = value * (grad - tl.sum(value * grad, axis=1)[:, None]) * scale
    tl.store(content_grad + offsets, grad.to(content_grad.dtype.element_ty), mask=inside)
    first = length - 1 - row
    position_grad += start * positions + (row * positions)[:, None]
    tl.store(
        position_grad + first[:, None] + column[None, :], grad.to(position_grad.dtype.element_ty), mask=inside
    )
    # What no pair reads lies before the row's first position and after its last one.
    unread = tl.where(column[None, :] < first[:, None], column[None, :], column[None, :] + length)
    zeros = tl.zeros([ROWS, BLOCK], tl.float32).to(position_grad.dtype.element_ty)
    tl.store(position_grad + unread, zeros, mask=(row < length)[:, None] & (unread < positions))


def relative_softmax_backward(
    weights: Tensor, dropped_grad: Tensor, positions: int, heads: int, scale: float, draw: Draw | None
) -> tuple[Tensor, Tensor]:
    """Gradients of `content` (B · H, T, T) and `position` (B · H, T, `positions`)."""
    count, length, _ = weights.shape
    content_grad = torch.empty_like(weights)
    position_grad = weights.new_empty(count, length, positions)
    block = triton.next_power_of_2(length)
    rows = max(1, _TILE // block)
    with _device_of(weights):
        _relative_softmax_backward_kernel[(triton.cdiv(length, rows), heads, count // heads)](
            weights, dropped_grad, draw and draw.seeds, content_grad, position_grad, length, positions,
            draw.layer if draw else 0, scale, BLOCK=block, ROWS=rows, DROPS=draw is not None, num_warps=8,
        )  # fmt: skip
    return content_grad, position_grad
