"""Triton kernels of the linear attention in the codec's encoder; `kernels` has the same in plain torch.

Images are (B, H, W, C), contiguous; `widths` (B,) are each song's valid columns, None takes all as valid. Sizes that
change from song to song are run-time arguments that Triton does not specialise on: a new length compiles nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acestep_ray.models.triton_kernels import _device_of

_ATTENTION_ROWS = 128
_ATTENTION_CHUNK = 1024


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
