"""Triton kernels of the codec's encoder and of HuBERT; `kernels` has the same functions in plain torch and says what
they compute.

Images are (B, H, W, C), contiguous; `widths` (B,) are each song's valid columns, None takes all as valid. Sizes that
change from song to song are run-time arguments that Triton does not specialise on: a new length compiles nothing.
"""

# ruff: noqa: RUF005 - Triton joins tuples, it does not unpack them
from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = triton.knobs.runtime.interpret
# Elements that one program of a pass over memory handles.
_TILE = 4096
_ATTENTION_ROWS = 128
_ATTENTION_CHUNK = 1024


@triton.jit
def _times_sigmoid(x, u, FAST: tl.constexpr):
    """x · sigmoid(u)."""
    if FAST:
        # By the hardware's tanh: one special function instead of two, off by 2⁻¹¹ of x at most.
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * u], dtype=tl.float32, is_pure=True, pack=1
        )
        half = 0.5 * x
        result = half * tanh + half
    else:
        result = x / (1.0 + tl.exp(-u))
    return result


@triton.jit
def _silu(x, FAST: tl.constexpr):
    return _times_sigmoid(x, x, FAST)


@triton.jit
def _gelu(x, EXACT: tl.constexpr, FAST: tl.constexpr):
    if EXACT:
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # 0.5 · x · (1 + tanh u) is x · sigmoid(2u).
        result = _times_sigmoid(x, x * (1.5957691216057308 + 0.07135481627362755 * x * x), FAST)
    return result


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


# --- linear attention --------------------------------------------------------------------------------------


@triton.jit
def _project(x, projection, group, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """A group of the grouped 1×1 convolution, rounded as a layer of its own would round it."""
    inputs = tl.arange(0, BLOCK_D)[:, None]
    outputs = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(
        projection + (group * D + outputs) * D + inputs, mask=(inputs < D) & (outputs < D), other=0.0
    )
    return tl.dot(x, weight, input_precision=PRECISION).to(x.dtype)


@triton.jit(do_not_specialize=["pixels", "width", "heads", "first_head"])
def _attention_state_kernel(
    qkv, projection, widths, state, pixels, width, heads, first_head, C: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, PROJECTED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of pixels of one head: Σ relu(k)ᵀv and Σ relu(k), float32."""
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    song = tl.program_id(2)
    limit = width
    if MASKED:
        limit = tl.load(widths + song).to(tl.int32)
    column = tl.arange(0, BLOCK_D)
    qkv += (song.to(tl.int64) * pixels + chunk * CHUNK) * C + head * 3 * D
    sums = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    norms = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, CHUNK, ROWS):
        row = start + tl.arange(0, ROWS)
        pixel = chunk * CHUNK + row
        valid = pixel < pixels
        if MASKED:
            valid = valid & (pixel % width < limit)
        inside = valid[:, None] & (column < D)[None, :]
        pointers = qkv + row[:, None] * C + column[None, :]
        key = tl.load(pointers + D, mask=inside, other=0.0)
        value = tl.load(pointers + 2 * D, mask=inside, other=0.0)
        if PROJECTED:
            key = _project(key, projection, head * 3 + 1, D, BLOCK_D, PRECISION)
            value = _project(value, projection, head * 3 + 2, D, BLOCK_D, PRECISION)
        key = tl.maximum(key, 0.0).to(value.dtype)
        sums += tl.dot(tl.trans(key), value, input_precision=PRECISION)
        norms += tl.sum(key.to(tl.float32), axis=0)
    part = (song * heads + first_head + head) * tl.num_programs(1) + chunk
    state += part.to(tl.int64) * (D + 1) * D
    rows = tl.arange(0, BLOCK_D)
    tl.store(
        state + rows[:, None] * D + column[None, :], sums, mask=(rows < D)[:, None] & (column < D)[None, :]
    )
    tl.store(state + D * D + column, norms, mask=column < D)


@triton.jit(do_not_specialize=["pixels", "heads", "first_head"])
def _attention_apply_kernel(
    qkv, projection, state, out, pixels, heads, first_head, C: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PROJECTED: tl.constexpr, PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
):  # fmt: skip
    """relu(q)·S / (relu(q)·Σk + 1e-15) for one block of pixels of one head."""
    head = tl.program_id(0)
    song = tl.program_id(2)
    first = tl.program_id(1).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    channel_ok = column < D
    inside = (first + row < pixels)[:, None] & channel_ok[None, :]
    qkv += (song.to(tl.int64) * pixels + first) * C + head * 3 * D
    query = tl.load(qkv + row[:, None] * C + column[None, :], mask=inside, other=0.0)
    if PROJECTED:
        query = _project(query, projection, head * 3, D, BLOCK_D, PRECISION)
    query = tl.maximum(query.to(tl.float32), 0.0)
    state += (song * heads + first_head + head).to(tl.int64) * (D + 1) * D
    rows = tl.arange(0, BLOCK_D)
    sums = tl.load(
        state + rows[:, None] * D + column[None, :], mask=(rows < D)[:, None] & channel_ok[None, :], other=0.0
    )
    norms = tl.load(state + D * D + column, mask=channel_ok, other=0.0)
    # A float16 query is exact in tf32, and float32 sums do not overflow there.
    attended = tl.dot(query, sums, input_precision=STATE_PRECISION)
    attended = attended / (tl.sum(query * norms[None, :], axis=1)[:, None] + 1e-15)
    out += (song.to(tl.int64) * pixels + first) * heads * D + (first_head + head) * D
    tl.store(
        out + row[:, None] * (heads * D) + column[None, :], attended.to(out.dtype.element_ty), mask=inside
    )


def linear_attention(
    scales: list[tuple[Tensor, Tensor | None]], head_dim: int, widths: Tensor | None
) -> Tensor:
    images = [image for image, _ in scales]
    batch, height, width, channels = images[0].shape
    pixels = height * width
    heads_per_scale = channels // (3 * head_dim)
    heads = heads_per_scale * len(scales)
    chunks = triton.cdiv(pixels, _ATTENTION_CHUNK)
    exact = images[0].dtype == torch.float32
    precision = "ieee" if exact else "tf32"
    sizes = {
        "C": channels,
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "ROWS": _ATTENTION_ROWS,
        "PRECISION": precision,
    }
    parts = images[0].new_empty(batch, heads, chunks, (head_dim + 1) * head_dim, dtype=torch.float32)
    out = images[0].new_empty(batch, height, width, heads * head_dim)
    with _device_of(out):
        for number, (image, projection) in enumerate(scales):
            _attention_state_kernel[(heads_per_scale, chunks, batch)](
                image, projection, widths, parts, pixels, width, heads, number * heads_per_scale,
                CHUNK=_ATTENTION_CHUNK, PROJECTED=projection is not None, MASKED=widths is not None, **sizes,
                num_warps=4,
            )  # fmt: skip
        # Sums in a fixed order: a song has the same latents in every run.
        state = parts.sum(dim=2)
        for number, (image, projection) in enumerate(scales):
            _attention_apply_kernel[(heads_per_scale, triton.cdiv(pixels, _ATTENTION_ROWS), batch)](
                image, projection, state, out, pixels, heads, number * heads_per_scale,
                PROJECTED=projection is not None, STATE_PRECISION=precision, **sizes, num_warps=4,
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


# --- log-mel -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["frames", "bins"])
def _log_mel_kernel(
    spectrum, filters, out, frames, bins, BINS: tl.constexpr, MELS: tl.constexpr, FRAMES: tl.constexpr,
    BLOCK: tl.constexpr, FLOOR: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    wave = tl.program_id(1)
    frame = tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)
    mel = tl.arange(0, MELS)
    spectrum += wave.to(tl.int64) * frames * bins * 2
    total = tl.zeros([FRAMES, MELS], tl.float32)
    for start in range(0, BINS, BLOCK):
        bin = start + tl.arange(0, BLOCK)
        inside = (frame < frames)[:, None] & (bin < BINS)[None, :]
        pointers = spectrum + (frame[:, None] * bins + bin[None, :]) * 2
        real = tl.load(pointers, mask=inside, other=0.0)
        imaginary = tl.load(pointers + 1, mask=inside, other=0.0)
        magnitude = tl.sqrt(real * real + imaginary * imaginary + EPS)
        weights = tl.load(filters + bin[:, None] * MELS + mel[None, :], mask=(bin < BINS)[:, None], other=0.0)
        total += tl.dot(magnitude, weights, input_precision=PRECISION)
    total = tl.log(tl.maximum(total, FLOOR))
    out += wave.to(tl.int64) * MELS * frames + mel[None, :] * frames + frame[:, None]
    tl.store(out, total, mask=(frame < frames)[:, None])


def log_mel(
    spectrum: Tensor,
    filters: Tensor,
    used_bins: int,
    floor: float,
    eps: float,
    *,
    per_program: int = 32,
    block: int = 32,
    warps: int = 8,
) -> Tensor:
    waves, frames, bins = spectrum.shape
    mels = filters.shape[0]
    out = filters.new_empty(waves, mels, frames)
    with _device_of(filters):
        _log_mel_kernel[(triton.cdiv(frames, per_program), waves)](
            torch.view_as_real(spectrum), filters.T.contiguous(), out, frames, bins, BINS=used_bins, MELS=mels,
            FRAMES=per_program, BLOCK=block, FLOOR=floor, EPS=eps,
            # Three products of tf32 parts are as good as one of float32 where all is positive.
            PRECISION="ieee" if _INTERPRETED else "tf32x3", num_warps=warps,
        )  # fmt: skip
    return out


# --- HuBERT ------------------------------------------------------------------------------------------------


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


# --- launching ---------------------------------------------------------------------------------------------


def _is_fast(x: Tensor) -> bool:
    """Whether the hardware's approximations are finer than what is stored."""
    return x.dtype != torch.float32 and not _INTERPRETED


def _device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, whatever its arguments lie on."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
