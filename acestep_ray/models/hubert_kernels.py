"""Triton kernels of HuBERT: layer norms with what surrounds them, and the first layer; `kernels` has the same in plain
torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acestep_ray.models.triton_kernels import _TILE, _device_of, _is_fast, _times_sigmoid


@triton.jit
def _gelu(x, EXACT: tl.constexpr, FAST: tl.constexpr):
    if EXACT:
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # 0.5 · x · (1 + tanh u) is x · sigmoid(2u).
        result = _times_sigmoid(x, x * (1.5957691216057308 + 0.07135481627362755 * x * x), FAST)
    return result


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_kernel(
    x, added, weight, bias, out, rows, eps, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ADDED: tl.constexpr, ACTIVATED: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    channel_ok = channel < C
    inside = (first + row < rows)[:, None] & channel_ok[None, :]
    offsets = first * C + row[:, None] * C + channel[None, :]
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        value += tl.load(added + channel, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
    value = _normalise(value, weight, bias, eps, channel, C)
    if ACTIVATED:
        value = _gelu(value, EXACT, FAST)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _normalise(value, weight, bias, eps, channel, C: tl.constexpr):
    """Layer norm of rows; the channels past C are zero and stay out of the statistics."""
    mean = tl.sum(value, axis=1) / C
    centred = tl.where((channel < C)[None, :], value - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    gain = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    return centred * scale[:, None] * gain[None, :] + shift[None, :]


def layer_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float, activated: bool
) -> Tensor:
    channels = x.shape[-1]
    block = triton.next_power_of_2(channels)
    rows = max(1, _TILE // block)
    count = x.numel() // channels
    out = torch.empty_like(x)
    with _device_of(x):
        _layer_norm_kernel[(triton.cdiv(count, rows),)](
            x, added, weight, bias, out, count, eps,
            C=channels, BLOCK=block, ROWS=rows, ADDED=added is not None, ACTIVATED=activated,
            EXACT=x.dtype == torch.float32, FAST=_is_fast(x), num_warps=4,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["samples", "frames"])
def _wave_layer_kernel(
    wave, taps, conv_bias, weight, bias, out, samples, frames, eps, C: tl.constexpr, WIDTH: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK: tl.constexpr, FRAMES: tl.constexpr,
    BIASED: tl.constexpr, NORMALISED: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The first layer of HuBERT for FRAMES frames: convolution, norm, GELU. Without NORMALISED, `weight` and `bias`
    (N, C) are each chunk's own."""
    chunk = tl.program_id(1)
    frame = tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)
    tap = tl.arange(0, BLOCK_WIDTH)
    channel = tl.arange(0, BLOCK)
    channel_ok = channel < C
    patches = tl.load(
        wave + chunk.to(tl.int64) * samples + frame[:, None] * STRIDE + tap[None, :],
        mask=(frame < frames)[:, None] & (tap < WIDTH)[None, :],
        other=0.0,
    )
    kernel = tl.load(
        taps + channel[None, :] * WIDTH + tap[:, None],
        mask=(tap < WIDTH)[:, None] & channel_ok[None, :],
        other=0.0,
    )
    value = tl.dot(patches.to(tl.float32), kernel.to(tl.float32), input_precision=PRECISION)
    if BIASED:
        value += tl.load(conv_bias + channel, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
    if NORMALISED:
        value = _normalise(value, weight, bias, eps, channel, C)
    else:
        gain = tl.load(weight + chunk * C + channel, mask=channel_ok, other=0.0).to(tl.float32)
        shift = tl.load(bias + chunk * C + channel, mask=channel_ok, other=0.0).to(tl.float32)
        value = value * gain[None, :] + shift[None, :]
    value = _gelu(value, EXACT, FAST)
    out += (chunk.to(tl.int64) * frames + frame[:, None]) * C + channel[None, :]
    tl.store(out, value.to(out.dtype.element_ty), mask=(frame < frames)[:, None] & channel_ok[None, :])


def wave_layer(
    chunks: Tensor,
    taps: Tensor,
    conv_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stride: int,
    normalised: bool,
    dtype: torch.dtype,
    *,
    per_program: int = 32,
    warps: int = 8,
) -> Tensor:
    count, samples = chunks.shape
    channels, width = taps.shape
    frames = (samples - width) // stride + 1
    block = max(16, triton.next_power_of_2(channels))
    out = chunks.new_empty(count, frames, channels, dtype=dtype)
    exact = dtype == torch.float32
    with _device_of(chunks):
        _wave_layer_kernel[(triton.cdiv(frames, per_program), count)](
            chunks.contiguous(), taps.contiguous(), conv_bias, weight.contiguous(), bias.contiguous(), out,
            samples, frames, eps,
            C=channels, WIDTH=width, STRIDE=stride, BLOCK_WIDTH=max(16, triton.next_power_of_2(width)),
            BLOCK=block, FRAMES=per_program, BIASED=conv_bias is not None, NORMALISED=normalised,
            EXACT=exact, FAST=_is_fast(out), PRECISION="ieee" if exact else "tf32", num_warps=warps,
        )  # fmt: skip
    return out
