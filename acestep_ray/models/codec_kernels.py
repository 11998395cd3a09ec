"""Triton kernels of the codec's encoder: depthwise convolutions, and passes over memory around the others; `kernels`
has the same functions in plain torch and says what they compute.

Images are (B, H, W, C), contiguous; `widths` (B,) are each song's valid columns, None takes all as valid. Sizes that
change from song to song are run-time arguments that Triton does not specialise on: a new length compiles nothing.
"""

# ruff: noqa: RUF005 - Triton joins tuples, it does not unpack them
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acestep_ray.models.triton_kernels import _TILE, _device_of, _is_fast, _silu

# --- depthwise convolution ---------------------------------------------------------------------------------


@triton.jit
def _load_pixels(
    x, in_rows, first, limit, STEP: tl.constexpr, channel_ok, ACTIVATED: tl.constexpr, FAST: tl.constexpr,
    EVEN: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """COUNT neighbouring pixels of a row in float32, zero outside the song."""
    pixels = ()
    for i in tl.static_range(COUNT):
        column = first + i
        inside = in_rows & (column >= 0) & (column < limit)
        pixel = tl.load(x + i * STEP, mask=inside if EVEN else channel_ok & inside, other=0.0).to(tl.float32)
        if ACTIVATED:
            pixel = _silu(pixel, FAST)
        pixels = pixels + (pixel,)
    return pixels


@triton.jit
def _load_taps(weight, channels, channel_ok, COUNT: tl.constexpr):
    taps = ()
    for i in tl.static_range(COUNT):
        taps = taps + (tl.load(weight + i * channels, mask=channel_ok, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _zeros(BLOCK: tl.constexpr, COUNT: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros([BLOCK], tl.float32),)
    return zeros


@triton.jit
def _add_row(totals, pixels, taps, K: tl.constexpr, RUN: tl.constexpr):
    """Add one input row to the K output rows that it reaches, the uppermost first, of RUN columns each."""
    result = ()
    for row in tl.static_range(K):
        for column in tl.static_range(RUN):
            total = totals[row * RUN + column]
            for tap in tl.static_range(K):
                total += pixels[column + tap] * taps[(K - 1 - row) * K + tap]
            result = result + (total,)
    return result


@triton.jit(do_not_specialize=["height", "width"])
def _depthwise_kernel(
    x, weight, bias, widths, out, height, width, C: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RUN columns of BLOCK channels, from the first row to the last: each thread keeps its own channels' K rows of
    running sums, so an element is read once a program and activated once."""
    OUT: tl.constexpr = C // 2 if GATED else C
    EVEN: tl.constexpr = OUT % BLOCK == 0
    REACH: tl.constexpr = K // 2
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel_ok = channel < OUT
    first = tl.program_id(1) * RUN
    song = tl.program_id(2)
    limit = width
    if MASKED:
        limit = tl.minimum(tl.load(widths + song).to(tl.int32), width)
    taps = _load_taps(weight + channel, C, channel_ok, K * K)
    start = tl.zeros([BLOCK], tl.float32)
    if BIASED:
        start = tl.load(bias + channel, mask=channel_ok, other=0.0).to(tl.float32)
    totals = _zeros(BLOCK, K * RUN)
    if GATED:
        gate_taps = _load_taps(weight + OUT + channel, C, channel_ok, K * K)
        gate_start = tl.zeros([BLOCK], tl.float32)
        if BIASED:
            gate_start = tl.load(bias + OUT + channel, mask=channel_ok, other=0.0).to(tl.float32)
        gate_totals = _zeros(BLOCK, K * RUN)
    pixel = song.to(tl.int64) * height * width + first
    x += (pixel - REACH) * C + channel
    out += (pixel - REACH * width) * OUT + channel
    for row in range(0, height + REACH):
        pixels = _load_pixels(
            x, row < height, first - REACH, limit, C, channel_ok, GATED, FAST, EVEN, RUN + K - 1
        )
        totals = _add_row(totals, pixels, taps, K, RUN)
        if GATED:
            gates = _load_pixels(
                x + OUT, row < height, first - REACH, limit, C, channel_ok, True, FAST, EVEN, RUN + K - 1
            )
            gate_totals = _add_row(gate_totals, gates, gate_taps, K, RUN)
        if row >= REACH:
            for column in tl.static_range(RUN):
                value = totals[column] + start
                if GATED:
                    value = value * _silu(gate_totals[column] + gate_start, FAST)
                inside = first + column < width
                tl.store(
                    out + column * OUT,
                    value.to(out.dtype.element_ty),
                    mask=inside if EVEN else channel_ok & inside,
                )
        totals = totals[RUN:] + _zeros(BLOCK, RUN)
        if GATED:
            gate_totals = gate_totals[RUN:] + _zeros(BLOCK, RUN)
        x += width.to(tl.int64) * C
        out += width.to(tl.int64) * OUT


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Tensor | None,
    gated: bool,
    *,
    run: int = 4,
    block: int = 256,
    warps: int = 4,
) -> Tensor:
    batch, height, width, channels = x.shape
    size = weight.shape[-1]
    outputs = channels // 2 if gated else channels
    block = min(block, triton.next_power_of_2(outputs))
    out = x.new_empty(batch, height, width, outputs)
    taps = weight.flatten(1).t().contiguous()  # (K², C)
    grid = (triton.cdiv(outputs, block), triton.cdiv(width, run), batch)
    with _device_of(x):
        _depthwise_kernel[grid](
            x, taps, bias, widths, out, height, width,
            C=channels, K=size, GATED=gated, BIASED=bias is not None, MASKED=widths is not None,
            FAST=_is_fast(x), RUN=run, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out


# --- passes over memory around convolutions ------------------------------------------------------------------


@triton.jit
def _columns_ok(first, row, rows, pixels, width, widths):
    """Which rows of a flattened (B, H, W) are pixels within their song."""
    pixel = first + row
    limit = tl.load(widths + pixel // pixels, mask=pixel < rows, other=0)
    return pixel % width < limit


@triton.jit(do_not_specialize=["rows", "pixels", "width"])
def _bias_silu_kernel(
    x, bias, widths, rows, pixels, width, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (first + row < rows)[:, None] & (channel < C)[None, :]
    pointers = x + first.to(tl.int64) * C + row[:, None] * C + channel[None, :]
    shift = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    value = _silu(tl.load(pointers, mask=inside, other=0.0).to(tl.float32) + shift[None, :], FAST)
    if MASKED:
        value = tl.where(_columns_ok(first, row, rows, pixels, width, widths)[:, None], value, 0.0)
    tl.store(pointers, value.to(x.dtype.element_ty), mask=inside)


def bias_silu_(x: Tensor, bias: Tensor, widths: Tensor | None) -> Tensor:
    batch, height, width, channels = x.shape
    block = min(triton.next_power_of_2(channels), 512)
    rows = _TILE // block
    count = batch * height * width
    with _device_of(x):
        _bias_silu_kernel[(triton.cdiv(count, rows), triton.cdiv(channels, block))](
            x, bias, widths, count, height * width, width,
            C=channels, BLOCK=block, ROWS=rows, MASKED=widths is not None, FAST=_is_fast(x), num_warps=4,
        )  # fmt: skip
    return x


@triton.jit(do_not_specialize=["rows", "pixels", "width"])
def _add_rms_norm_kernel(
    residual, x, weight, bias, widths, rows, pixels, width, eps, C: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    inside = (first + row < rows)[:, None] & (channel < C)[None, :]
    offsets = first.to(tl.int64) * C + row[:, None] * C + channel[None, :]
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / C + eps)
    gain = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    value = value * scale[:, None] * gain[None, :] + shift[None, :]
    value += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    if MASKED:
        value = tl.where(_columns_ok(first, row, rows, pixels, width, widths)[:, None], value, 0.0)
    tl.store(x + offsets, value.to(x.dtype.element_ty), mask=inside)


def add_rms_norm_(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, widths: Tensor | None
) -> Tensor:
    batch, height, width, channels = x.shape
    block = triton.next_power_of_2(channels)
    rows = max(1, _TILE // block)
    count = batch * height * width
    with _device_of(x):
        _add_rms_norm_kernel[(triton.cdiv(count, rows),)](
            residual, x, weight, bias, widths, count, height * width, width, eps,
            C=channels, BLOCK=block, ROWS=rows, MASKED=widths is not None, num_warps=4,
        )  # fmt: skip
    return x


@triton.jit(do_not_specialize=["height", "width"])
def _add_halved_kernel(
    x, convolved, bias, widths, height, width, C: tl.constexpr, OUT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`height` and `width` are those of the halved image."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    line = tl.program_id(2)
    song = line // height
    inside = (column < width) & (channel < OUT)
    # Line h of a halved image begins at line 2h of the image, both counted through the batch.
    x += line.to(tl.int64) * 4 * width * C
    total = tl.zeros([COLUMNS, BLOCK], tl.float32)
    if GROUP == 2:  # neighbouring outputs come from two rows of one channel: both read in order
        half = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        there = (column < width) & (half < C)
        left = x + 2 * column * C + half
        top = tl.load(left, mask=there, other=0.0).to(tl.float32)
        top += tl.load(left + C, mask=there, other=0.0).to(tl.float32)
        bottom = tl.load(left + 2 * width * C, mask=there, other=0.0).to(tl.float32)
        bottom += tl.load(left + 2 * width * C + C, mask=there, other=0.0).to(tl.float32)
        total = tl.interleave(top, bottom)
    for i in tl.static_range(0 if GROUP == 2 else GROUP):
        source = channel * GROUP + i  # of pixel_unshuffle: channel, then row, then column of the 2×2 pixels
        offset = (((source % 4) // 2) * 2 * width + 2 * column + source % 2) * C + source // 4
        total += tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    pointers = convolved + line.to(tl.int64) * width * OUT + column * OUT + channel
    value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32) + total / GROUP
    value += tl.load(bias + channel, mask=channel < OUT, other=0.0).to(tl.float32)
    if MASKED:
        value = tl.where(column < tl.load(widths + song), value, 0.0)
    tl.store(pointers, value.to(convolved.dtype.element_ty), mask=inside)


def add_halved_(x: Tensor, convolved: Tensor, bias: Tensor, group: int, widths: Tensor | None) -> Tensor:
    batch, height, width, channels = convolved.shape
    block = min(triton.next_power_of_2(channels), 128)
    columns = 16
    grid = (triton.cdiv(channels, block), triton.cdiv(width, columns), batch * height)
    with _device_of(x):
        _add_halved_kernel[grid](
            x, convolved, bias, widths, height, width,
            C=x.shape[3], OUT=channels, GROUP=group, BLOCK=block, COLUMNS=columns,
            MASKED=widths is not None, num_warps=4,
        )  # fmt: skip
    return convolved


@triton.jit(do_not_specialize=["height", "width"])
def _first_convolution_kernel(
    mel, weight, bias, widths, out, height, width, CHANNELS: tl.constexpr, OUT: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_TAPS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    line = tl.program_id(1)
    song = line // height
    row = line % height
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    limit = width
    if MASKED:
        limit = tl.minimum(tl.load(widths + song).to(tl.int32), width)
    tap = tl.arange(0, BLOCK_TAPS)
    plane = tap // 9
    tap_row = row + (tap % 9) // 3 - 1
    tap_column = column[:, None] + (tap % 3 - 1)[None, :]
    valid = (tap < TAPS) & (tap_row >= 0) & (tap_row < height)
    mel += song.to(tl.int64) * CHANNELS * height * width
    patches = tl.load(
        mel + (plane * height + tap_row)[None, :] * width + tap_column,
        mask=valid[None, :] & (tap_column >= 0) & (tap_column < limit),
        other=0.0,
    ).to(out.dtype.element_ty)
    taps = tl.load(
        weight + channel[None, :] * TAPS + tap[:, None],
        mask=(tap < TAPS)[:, None] & (channel < OUT)[None, :],
        other=0.0,
    )
    value = tl.dot(patches, taps, input_precision=PRECISION)
    value += tl.load(bias + channel, mask=channel < OUT, other=0.0).to(tl.float32)[None, :]
    value = tl.where((column < limit)[:, None], value, 0.0)
    tl.store(
        out + (line.to(tl.int64) * width + column[:, None]) * OUT + channel[None, :],
        value.to(out.dtype.element_ty),
        mask=(column < width)[:, None] & (channel < OUT)[None, :],
    )


def first_convolution(mel: Tensor, weight: Tensor, bias: Tensor, widths: Tensor | None) -> Tensor:
    batch, channels, height, width = mel.shape
    outputs = weight.shape[0]
    taps = channels * 9
    block = min(max(16, triton.next_power_of_2(outputs)), 128)
    columns = 128
    out = weight.new_empty(batch, height, width, outputs)
    with _device_of(mel):
        _first_convolution_kernel[
            (triton.cdiv(width, columns), batch * height, triton.cdiv(outputs, block))
        ](
            mel.contiguous(), weight.contiguous(), bias, widths, out, height, width,
            CHANNELS=channels, OUT=outputs, TAPS=taps, BLOCK_TAPS=max(16, triton.next_power_of_2(taps)),
            BLOCK=block, COLUMNS=columns, MASKED=widths is not None,
            PRECISION="ieee" if weight.dtype == torch.float32 else "tf32", num_warps=8,
        )  # fmt: skip
    return out
