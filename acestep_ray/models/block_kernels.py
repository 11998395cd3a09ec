"""Triton kernels of what is between the blocks' layers, forward and backward; `fused` says what they compute.

Streams are (B, W, C) with contiguous channels; `lengths` (B,) int32 are each song's valid frames. Sizes that change
from song to song are run-time arguments that Triton does not specialise on: a new length compiles nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acestep_ray.models.triton_kernels import _device_of, _is_fast, _silu, _times_sigmoid

# Frames that one program of the convolution passes over, and channels; by measurement on an H100.
_RUN, _BACKWARD_RUN = 8, 32
_CHANNELS = 512


# --- residual, norm and modulation -----------------------------------------------------------------------------


@triton.jit(do_not_specialize=["length"])
def _add_norm_kernel(
    stream, update, gate, shift, scale, added, normed, factors, length, vectors, normed_stride, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, GATED: tl.constexpr, NORMS: tl.constexpr,
    WRITES: tl.constexpr,
):  # fmt: skip
    """One frame: added = stream + gate · update, and of that the modulated RMSNorm, or a copy."""
    row = tl.program_id(0).to(tl.int64)
    song = row // length
    column = tl.arange(0, BLOCK)
    inside = column < C
    x = tl.load(stream + row * C + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        y = tl.load(update + row * C + column, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            y *= tl.load(gate + song * vectors + column, mask=inside, other=0.0).to(tl.float32)
        x += y
        tl.store(added + row * C + column, x.to(added.dtype.element_ty), mask=inside)
    if WRITES:
        if NORMS:
            factor = tl.rsqrt(tl.sum(x * x) / C + eps)
            tl.store(factors + row, factor)
            a = tl.load(scale + song * vectors + column, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(shift + song * vectors + column, mask=inside, other=0.0).to(tl.float32)
            x = x * factor * (1.0 + a) + b
        tl.store(normed + row * normed_stride + column, x.to(normed.dtype.element_ty), mask=inside)


def add_norm(
    stream: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    normed: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    batch, length, channels = stream.shape
    added = torch.empty_like(stream) if update is not None else stream
    norms = scale is not None
    factors = stream.new_empty(batch * length, dtype=torch.float32) if norms else None
    vector = gate if gate is not None else scale
    with _device_of(stream):
        _add_norm_kernel[(batch * length,)](
            stream, update, gate, shift, scale, added, normed, factors, length,
            0 if vector is None else vector.stride(0), 0 if normed is None else normed.stride(1), eps,
            C=channels, BLOCK=triton.next_power_of_2(channels), ADDS=update is not None, GATED=gate is not None,
            NORMS=norms, WRITES=normed is not None, num_warps=8,
        )  # fmt: skip
    return added, factors


@triton.jit(do_not_specialize=["length"])
def _add_norm_backward_kernel(
    added, factors, gate, scale, added_grad, normed_grad, stream_grad, update_grad, length, vectors, grad_stride,
    update_stride, C: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, GATED: tl.constexpr, NORMS: tl.constexpr,
    FROM_ADDED: tl.constexpr, FROM_NORMED: tl.constexpr, NEEDS_STREAM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    song = row // length
    column = tl.arange(0, BLOCK)
    inside = column < C
    total = tl.zeros([BLOCK], tl.float32)
    if FROM_NORMED:
        total = tl.load(normed_grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        if NORMS:
            factor = tl.load(factors + row)
            a = tl.load(scale + song * vectors + column, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(added + row * C + column, mask=inside, other=0.0).to(tl.float32) * factor
            total *= 1.0 + a
            total = factor * (total - x * (tl.sum(total * x) / C))
    if FROM_ADDED:
        total += tl.load(added_grad + row * C + column, mask=inside, other=0.0).to(tl.float32)
    if NEEDS_STREAM:
        tl.store(stream_grad + row * C + column, total.to(stream_grad.dtype.element_ty), mask=inside)
    if ADDS:
        if GATED:
            total *= tl.load(gate + song * vectors + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(
            update_grad + row * update_stride + column, total.to(update_grad.dtype.element_ty), mask=inside
        )


def add_norm_backward(
    added: Tensor,
    factors: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    added_grad: Tensor | None,
    normed_grad: Tensor | None,
    *,
    channels: int,
    stream_dtype: torch.dtype | None,
    update_grad: Tensor | None,
) -> Tensor | None:
    """Fills `update_grad`; returns the gradient of the stream in `stream_dtype`. Needs one gradient at least."""
    given = added_grad if added_grad is not None else normed_grad
    assert given is not None
    batch, length = given.shape[:2]
    stream_grad = None
    if stream_dtype is not None:
        stream_grad = given.new_empty(batch, length, channels, dtype=stream_dtype)
    vector = gate if gate is not None else scale
    with _device_of(given):
        _add_norm_backward_kernel[(batch * length,)](
            added, factors, gate, scale, added_grad, normed_grad, stream_grad, update_grad, length,
            0 if vector is None else vector.stride(0), 0 if normed_grad is None else normed_grad.stride(1),
            0 if update_grad is None else update_grad.stride(1), C=channels,
            BLOCK=triton.next_power_of_2(channels), ADDS=update_grad is not None, GATED=gate is not None,
            NORMS=factors is not None, FROM_ADDED=added_grad is not None, FROM_NORMED=normed_grad is not None,
            NEEDS_STREAM=stream_dtype is not None, num_warps=8,
        )  # fmt: skip
    return stream_grad


# --- feed-forward between its matrix products ----------------------------------------------------------------------


@triton.jit
def _slope(u, FAST: tl.constexpr):
    """Of SiLU at u."""
    sigmoid = _times_sigmoid(1.0, u, FAST)
    return sigmoid * (1.0 + u * (1.0 - sigmoid))


@triton.jit
def _load_frame(x, t, limit, STEP: tl.constexpr, inside):
    """A frame's channels in float32, zero outside the song."""
    return tl.load(x + t * STEP, mask=inside & (t >= 0) & (t < limit), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length"])
def _gated_conv_kernel(
    x, weight, bias, lengths, out, length, H: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """RUN frames of BLOCK channels: SiLU, the depthwise convolution over time, the gate."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < H
    first = tl.program_id(1) * RUN
    song = tl.program_id(2)
    limit = tl.load(lengths + song)
    x += song.to(tl.int64) * length * 2 * H + channel
    out += song.to(tl.int64) * length * H + channel
    v_before = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    v_here = tl.load(weight + 2 * H + channel, mask=inside, other=0.0).to(tl.float32)
    v_after = tl.load(weight + 4 * H + channel, mask=inside, other=0.0).to(tl.float32)
    v_bias = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    g_before = tl.load(weight + H + channel, mask=inside, other=0.0).to(tl.float32)
    g_here = tl.load(weight + 3 * H + channel, mask=inside, other=0.0).to(tl.float32)
    g_after = tl.load(weight + 5 * H + channel, mask=inside, other=0.0).to(tl.float32)
    g_bias = tl.load(bias + H + channel, mask=inside, other=0.0).to(tl.float32)
    v0 = _silu(_load_frame(x, first - 1, limit, 2 * H, inside), FAST)
    g0 = _silu(_load_frame(x + H, first - 1, limit, 2 * H, inside), FAST)
    v1 = _silu(_load_frame(x, first, limit, 2 * H, inside), FAST)
    g1 = _silu(_load_frame(x + H, first, limit, 2 * H, inside), FAST)
    for i in range(RUN):
        t = first + i
        v2 = _silu(_load_frame(x, t + 1, limit, 2 * H, inside), FAST)
        g2 = _silu(_load_frame(x + H, t + 1, limit, 2 * H, inside), FAST)
        value = v_before * v0 + v_here * v1 + v_after * v2 + v_bias
        gate = g_before * g0 + g_here * g1 + g_after * g2 + g_bias
        value *= _silu(gate, FAST)
        tl.store(out + t * H, value.to(out.dtype.element_ty), mask=inside & (t < length))
        v0, v1, g0, g1 = v1, v2, g1, g2


def gated_conv(x: Tensor, weight: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    """x (B, W, 2H), weight (3, 2H)."""
    batch, length, channels = x.shape
    half = channels // 2
    out = x.new_empty(batch, length, half)
    block = min(_CHANNELS, triton.next_power_of_2(half))
    with _device_of(x):
        _gated_conv_kernel[(triton.cdiv(half, block), triton.cdiv(length, _RUN), batch)](
            x,
            weight,
            bias,
            lengths,
            out,
            length,
            H=half,
            RUN=_RUN,
            BLOCK=block,
            FAST=_is_fast(x),
            num_warps=4,
        )
    return out


@triton.jit(do_not_specialize=["length"])
def _gated_conv_backward_kernel(
    x, weight, bias, lengths, out_grad, x_grad, weight_grad, length, H: tl.constexpr, RUN: tl.constexpr,
    BLOCK: tl.constexpr, FAST: tl.constexpr, TRAINS: tl.constexpr,
):  # fmt: skip
    """RUN frames of BLOCK channels. The convolution's gradient is needed from one frame before to one after; frame t of
    the input is finished when that of t + 1 is known. With TRAINS also this run's part of the taps' and bias'."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < H
    first = tl.program_id(1) * RUN
    song = tl.program_id(2)
    limit = tl.load(lengths + song)
    x += song.to(tl.int64) * length * 2 * H + channel
    x_grad += song.to(tl.int64) * length * 2 * H + channel
    out_grad += song.to(tl.int64) * length * H + channel
    v_before = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    v_here = tl.load(weight + 2 * H + channel, mask=inside, other=0.0).to(tl.float32)
    v_after = tl.load(weight + 4 * H + channel, mask=inside, other=0.0).to(tl.float32)
    v_bias = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    g_before = tl.load(weight + H + channel, mask=inside, other=0.0).to(tl.float32)
    g_here = tl.load(weight + 3 * H + channel, mask=inside, other=0.0).to(tl.float32)
    g_after = tl.load(weight + 5 * H + channel, mask=inside, other=0.0).to(tl.float32)
    g_bias = tl.load(bias + H + channel, mask=inside, other=0.0).to(tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)
    v0 = _silu(_load_frame(x, first - 2, limit, 2 * H, inside), FAST)
    g0 = _silu(_load_frame(x + H, first - 2, limit, 2 * H, inside), FAST)
    u = _load_frame(x, first - 1, limit, 2 * H, inside)
    v1, v1_slope = _silu(u, FAST), _slope(u, FAST)
    u = _load_frame(x + H, first - 1, limit, 2 * H, inside)
    g1, g1_slope = _silu(u, FAST), _slope(u, FAST)
    v0_slope, g0_slope = zero, zero
    # Gradients of the convolution's output at t − 2 and t − 1.
    dv0, dv1, dg0, dg1 = zero, zero, zero, zero
    wv0, wv1, wv2, wv3 = zero, zero, zero, zero
    wg0, wg1, wg2, wg3 = zero, zero, zero, zero
    for i in range(RUN + 2):
        t = first - 1 + i
        u = _load_frame(x, t + 1, limit, 2 * H, inside)
        v2, v2_slope = _silu(u, FAST), _slope(u, FAST)
        u = _load_frame(x + H, t + 1, limit, 2 * H, inside)
        g2, g2_slope = _silu(u, FAST), _slope(u, FAST)
        value = v_before * v0 + v_here * v1 + v_after * v2 + v_bias
        gate = g_before * g0 + g_here * g1 + g_after * g2 + g_bias
        grad = _load_frame(out_grad, t, length, H, inside)
        dv2 = grad * _silu(gate, FAST)
        dg2 = grad * value * _slope(gate, FAST)
        if i >= 2:
            finished = inside & (t - 1 < length)
            valid = t - 1 < limit
            dv = (v_after * dv0 + v_here * dv1 + v_before * dv2) * v0_slope
            dg = (g_after * dg0 + g_here * dg1 + g_before * dg2) * g0_slope
            dv = tl.where(valid, dv, 0.0)
            dg = tl.where(valid, dg, 0.0)
            tl.store(x_grad + (t - 1) * 2 * H, dv.to(x_grad.dtype.element_ty), mask=finished)
            tl.store(x_grad + (t - 1) * 2 * H + H, dg.to(x_grad.dtype.element_ty), mask=finished)
        if TRAINS:
            own = ((t >= first) & (t < first + RUN)).to(
                tl.float32
            )  # the frames before and after are other runs'
            wv0 += own * dv2 * v0
            wv1 += own * dv2 * v1
            wv2 += own * dv2 * v2
            wv3 += own * dv2
            wg0 += own * dg2 * g0
            wg1 += own * dg2 * g1
            wg2 += own * dg2 * g2
            wg3 += own * dg2
        v0, v1, g0, g1 = v1, v2, g1, g2
        v0_slope, v1_slope, g0_slope, g1_slope = v1_slope, v2_slope, g1_slope, g2_slope
        dv0, dv1, dg0, dg1 = dv1, dv2, dg1, dg2
    if TRAINS:
        run = song * tl.num_programs(1) + tl.program_id(1)
        weight_grad += run.to(tl.int64) * 8 * H + channel
        tl.store(weight_grad, wv0, mask=inside)
        tl.store(weight_grad + H, wg0, mask=inside)
        tl.store(weight_grad + 2 * H, wv1, mask=inside)
        tl.store(weight_grad + 3 * H, wg1, mask=inside)
        tl.store(weight_grad + 4 * H, wv2, mask=inside)
        tl.store(weight_grad + 5 * H, wg2, mask=inside)
        tl.store(weight_grad + 6 * H, wv3, mask=inside)
        tl.store(weight_grad + 7 * H, wg3, mask=inside)


def gated_conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    lengths: Tensor,
    out_grad: Tensor,
    *,
    trains: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x, and where it `trains` of the taps and the bias, (4, 2H) float32."""
    batch, length, channels = x.shape
    half = channels // 2
    x_grad = torch.empty_like(x)
    runs = triton.cdiv(length, _BACKWARD_RUN)
    parts = x.new_empty(batch * runs, 4, channels, dtype=torch.float32) if trains else None
    block = min(_CHANNELS, triton.next_power_of_2(half))
    with _device_of(x):
        _gated_conv_backward_kernel[(triton.cdiv(half, block), runs, batch)](
            x, weight, bias, lengths, out_grad, x_grad, parts, length, H=half, RUN=_BACKWARD_RUN, BLOCK=block,
            FAST=_is_fast(x), TRAINS=trains, num_warps=4,
        )  # fmt: skip
    return x_grad, None if parts is None else parts.sum(dim=0)
