"""Triton kernels of the transformer's blocks, forward and backward; `fused` says what they compute.

Streams are (B, W, C) with contiguous channels; `lengths` (B,) int32 are each song's valid frames. Sizes that change
from song to song are run-time arguments that Triton does not specialise on: a new length compiles nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acestep_ray.models.triton_kernels import _device_of, _is_fast, _silu, _times_sigmoid

# Frames that one program of the convolution passes over, and channels; by measurement on an H100, as what follows.
_RUN, _BACKWARD_RUN = 8, 32
_CHANNELS = 512
# Frames of which linear attention sums one part of its state, and those of one step.
_CHUNK = 512
_ROWS = 64
_WARPS = 8


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


# --- rotary positions ------------------------------------------------------------------------------------------


@triton.jit
def _rotate(x, cos, sin, T: tl.constexpr, D: tl.constexpr):
    """Neighbouring channels (x0, x1) of x (T, D) to (x0·cos0 − x1·sin0, x1·cos1 + x0·sin1)."""
    x0, x1 = tl.split(tl.reshape(x, (T, D // 2, 2)))
    cos0, cos1 = tl.split(tl.reshape(cos, (T, D // 2, 2)))
    sin0, sin1 = tl.split(tl.reshape(sin, (T, D // 2, 2)))
    return tl.reshape(tl.join(x0 * cos0 - x1 * sin0, x1 * cos1 + x0 * sin1), (T, D))


@triton.jit
def _rotate_back(y, cos, sin, T: tl.constexpr, D: tl.constexpr):
    """The transpose of `_rotate`: what the gradient goes through."""
    y0, y1 = tl.split(tl.reshape(y, (T, D // 2, 2)))
    cos0, cos1 = tl.split(tl.reshape(cos, (T, D // 2, 2)))
    sin0, sin1 = tl.split(tl.reshape(sin, (T, D // 2, 2)))
    return tl.reshape(tl.join(y0 * cos0 + y1 * sin1, y1 * cos1 - y0 * sin0), (T, D))


@triton.jit(do_not_specialize=["period"])
def _rotary_kernel(
    x, cos, sin, valid, out, period, x_stride, out_stride, HEADS: tl.constexpr, ALL: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, BACKWARD: tl.constexpr, RELU: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One frame: the first HEADS of ALL heads are rotated, the others copied."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK)[:, None]
    channel = tl.arange(0, D)[None, :]
    turns = (head < HEADS) & (channel < D)
    place = (row % period) * D + channel
    # Heads that are only copied turn by an angle of zero.
    c = tl.where(turns, tl.load(cos + place), 1.0)
    s = tl.where(turns, tl.load(sin + place), 0.0)
    inside = (head < ALL) & (channel < D)
    read = inside
    if MASKED:
        read = inside & (tl.load(valid + row) != 0)
    value = tl.load(x + row * x_stride + head * D + channel, mask=read, other=0.0).to(tl.float32)
    value = _rotate_back(value, c, s, BLOCK, D) if BACKWARD else _rotate(value, c, s, BLOCK, D)
    if RELU:
        value = tl.where(turns, tl.maximum(value, 0.0), value)
    tl.store(out + row * out_stride + head * D + channel, value.to(out.dtype.element_ty), mask=inside)


def rotary(
    x: Tensor,
    out: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    *,
    backward: bool = False,
    relu: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """Rotates the first `heads` heads of x (rows, C) into `out`, which may be x; rows not `valid` become zero."""
    rows, channels = x.shape
    head_dim = cos.shape[-1]
    # In place, what is only copied need not be read, unless rows become zero.
    count = heads if out is x and valid is None else channels // head_dim
    with _device_of(x):
        _rotary_kernel[(rows,)](
            x, cos, sin, valid, out, cos.shape[0], x.stride(0), out.stride(0), HEADS=heads, ALL=count,
            BLOCK=triton.next_power_of_2(count), D=head_dim, BACKWARD=backward, RELU=relu,
            MASKED=valid is not None, num_warps=4,
        )  # fmt: skip
    return out


# --- linear attention --------------------------------------------------------------------------------------------


@triton.jit
def _load_rows(x, row, channel, limit, STRIDE):
    inside = (row < limit)[:, None] & (channel >= 0)[None, :]
    return tl.load(x + row[:, None] * STRIDE + channel[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(x, row, channel, limit, STRIDE, value):
    inside = (row < limit)[:, None] & (channel >= 0)[None, :]
    tl.store(x + row[:, None] * STRIDE + channel[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "chunks"])
def _state_kernel(
    qkv, lengths, state, length, chunks, stride, HEADS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of frames of one head: Σ kᵀv and Σ k over valid frames, float32."""
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    song = tl.program_id(2)
    limit = tl.load(lengths + song)
    channel = tl.arange(0, D)
    qkv += song.to(tl.int64) * length * stride + head * D
    sums = tl.zeros([D, D], tl.float32)
    norms = tl.zeros([D], tl.float32)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, limit), ROWS):
        row = start + tl.arange(0, ROWS)
        key = _load_rows(qkv + HEADS * D, row, channel, limit, stride)
        value = _load_rows(qkv + 2 * HEADS * D, row, channel, limit, stride)
        sums += tl.dot(tl.trans(key), value, input_precision=PRECISION)
        norms += tl.sum(key.to(tl.float32), axis=0)
    state += ((song * HEADS + head) * chunks + chunk).to(tl.int64) * (D + 1) * D
    tl.store(state + channel[:, None] * D + channel[None, :], sums)
    tl.store(state + D * D + channel, norms)


@triton.jit(do_not_specialize=["length"])
def _apply_kernel(
    qkv, sums, norms, out, length, stride, out_stride, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q·S / (q·Σk + ε) for one block of frames of one head."""
    head = tl.program_id(0)
    song = tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, D)
    sums += (song * HEADS + head).to(tl.int64) * D * D
    norms += (song * HEADS + head).to(tl.int64) * D
    query = _load_rows(qkv + song.to(tl.int64) * length * stride + head * D, row, channel, length, stride)
    state = tl.load(sums + channel[:, None] * D + channel[None, :])
    weight = tl.sum(query.to(tl.float32) * tl.load(norms + channel)[None, :], axis=1) + 1e-15
    value = tl.dot(query, state, input_precision=PRECISION) / weight[:, None]
    _store_rows(
        out + song.to(tl.int64) * length * out_stride + head * D, row, channel, length, out_stride, value
    )


@triton.jit(do_not_specialize=["length"])
def _query_backward_kernel(
    qkv, sums, norms, out_grad, qkv_grad, factors, length, stride, out_stride, grad_stride, HEADS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of frames' queries, and what the state's needs of each: 1 / weight, and the weight's
    gradient."""
    head = tl.program_id(0)
    song = tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, D)
    sums += (song * HEADS + head).to(tl.int64) * D * D
    norms += (song * HEADS + head).to(tl.int64) * D
    query = _load_rows(qkv + song.to(tl.int64) * length * stride + head * D, row, channel, length, stride)
    grad = _load_rows(
        out_grad + song.to(tl.int64) * length * out_stride + head * D, row, channel, length, out_stride
    )
    state = tl.load(sums + channel[:, None] * D + channel[None, :])
    key_sum = tl.load(norms + channel)[None, :]
    weight = tl.sum(query.to(tl.float32) * key_sum, axis=1) + 1e-15
    # Without a positive channel the query has no weight and no gradient; a gradient over ε would be infinite.
    inverse = tl.where(weight > 1e-15, 1.0 / weight, 0.0)
    value = tl.dot(query, state, input_precision=PRECISION)
    weight_grad = -tl.sum(grad.to(tl.float32) * value, axis=1) * inverse * inverse
    query_grad = tl.dot(grad, tl.trans(state), input_precision=PRECISION) * inverse[:, None]
    query_grad = tl.where(query > 0, query_grad + weight_grad[:, None] * key_sum, 0.0)
    qkv_grad += song.to(tl.int64) * length * grad_stride + head * D
    _store_rows(qkv_grad, row, channel, length, grad_stride, query_grad)
    factors += ((song * HEADS + head) * 2).to(tl.int64) * length
    tl.store(factors + row, inverse, mask=row < length)
    tl.store(factors + length + row, weight_grad, mask=row < length)


@triton.jit(do_not_specialize=["length", "chunks"])
def _state_backward_kernel(
    qkv, out_grad, factors, state_grad, length, chunks, stride, out_stride, HEADS: tl.constexpr,
    D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of frames' part of the state's gradient."""
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    song = tl.program_id(2)
    channel = tl.arange(0, D)
    qkv += song.to(tl.int64) * length * stride + head * D
    out_grad += song.to(tl.int64) * length * out_stride + head * D
    factors += ((song * HEADS + head) * 2).to(tl.int64) * length
    sums = tl.zeros([D, D], tl.float32)
    norms = tl.zeros([D], tl.float32)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length), ROWS):
        row = start + tl.arange(0, ROWS)
        query = _load_rows(qkv, row, channel, length, stride)
        grad = _load_rows(out_grad, row, channel, length, out_stride)
        inverse = tl.load(factors + row, mask=row < length, other=0.0)
        weight_grad = tl.load(factors + length + row, mask=row < length, other=0.0)
        scaled = (grad.to(tl.float32) * inverse[:, None]).to(grad.dtype)
        sums += tl.dot(tl.trans(query), scaled, input_precision=PRECISION)
        norms += tl.sum(query.to(tl.float32) * weight_grad[:, None], axis=0)
    state_grad += ((song * HEADS + head) * chunks + chunk).to(tl.int64) * (D + 1) * D
    tl.store(state_grad + channel[:, None] * D + channel[None, :], sums)
    tl.store(state_grad + D * D + channel, norms)


@triton.jit(do_not_specialize=["length"])
def _key_backward_kernel(
    qkv, lengths, sums_grad, norms_grad, qkv_grad, length, stride, grad_stride, HEADS: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of frames' keys and values."""
    head = tl.program_id(0)
    song = tl.program_id(2)
    limit = tl.load(lengths + song)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, D)
    qkv += song.to(tl.int64) * length * stride + (HEADS + head) * D
    qkv_grad += song.to(tl.int64) * length * grad_stride + (HEADS + head) * D
    sums_grad += (song * HEADS + head).to(tl.int64) * D * D
    norms_grad += (song * HEADS + head).to(tl.int64) * D
    key = _load_rows(qkv, row, channel, limit, stride)
    value = _load_rows(qkv + HEADS * D, row, channel, limit, stride)
    state_grad = tl.load(sums_grad + channel[:, None] * D + channel[None, :])
    key_grad = tl.dot(value, tl.trans(state_grad), input_precision=PRECISION)
    key_grad += tl.load(norms_grad + channel)[None, :]
    _store_rows(qkv_grad, row, channel, length, grad_stride, tl.where(key > 0, key_grad, 0.0))
    value_grad = tl.dot(key, state_grad, input_precision=PRECISION)
    _store_rows(qkv_grad + HEADS * D, row, channel, length, grad_stride, value_grad)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def linear_attention(qkv: Tensor, lengths: Tensor, heads: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries and keys that are not negative; writes into `out`.

    Returns the state that the backward pass needs: Σ kᵀv (B, heads, D, D) in qkv's dtype, Σ k (B, heads, D) float32.
    """
    batch, length, channels = qkv.shape
    head_dim = channels // (3 * heads)
    chunks = triton.cdiv(length, _CHUNK)
    sizes = {"HEADS": heads, "D": head_dim, "ROWS": _ROWS, "PRECISION": _precision(qkv)}
    parts = qkv.new_empty(batch, heads, chunks, head_dim + 1, head_dim, dtype=torch.float32)
    with _device_of(qkv):
        _state_kernel[(heads, chunks, batch)](
            qkv, lengths, parts, length, chunks, qkv.stride(1), CHUNK=_CHUNK, **sizes, num_warps=_WARPS
        )
        sums, norms = _joined(parts, qkv.dtype)
        _apply_kernel[(heads, triton.cdiv(length, _ROWS), batch)](
            qkv, sums, norms, out, length, qkv.stride(1), out.stride(1), **sizes, num_warps=_WARPS
        )
    return sums, norms


def linear_attention_backward(
    qkv: Tensor,
    lengths: Tensor,
    heads: int,
    state: tuple[Tensor, Tensor],
    out_grad: Tensor,
    grad: Tensor,
) -> None:
    """Writes the gradient of qkv, through the ReLU of queries and keys, into `grad`."""
    batch, length, channels = qkv.shape
    head_dim = channels // (3 * heads)
    chunks = triton.cdiv(length, _CHUNK)
    sizes = {"HEADS": heads, "D": head_dim, "ROWS": _ROWS, "PRECISION": _precision(qkv)}
    parts = qkv.new_empty(batch, heads, chunks, head_dim + 1, head_dim, dtype=torch.float32)
    factors = qkv.new_empty(batch, heads, 2, length, dtype=torch.float32)
    with _device_of(qkv):
        _query_backward_kernel[(heads, triton.cdiv(length, _ROWS), batch)](
            qkv, *state, out_grad, grad, factors, length, qkv.stride(1), out_grad.stride(1), grad.stride(1),
            **sizes, num_warps=_WARPS,
        )  # fmt: skip
        _state_backward_kernel[(heads, chunks, batch)](
            qkv, out_grad, factors, parts, length, chunks, qkv.stride(1), out_grad.stride(1), CHUNK=_CHUNK,
            **sizes, num_warps=_WARPS,
        )  # fmt: skip
        sums_grad, norms_grad = _joined(parts, qkv.dtype)
        _key_backward_kernel[(heads, triton.cdiv(length, _ROWS), batch)](
            qkv, lengths, sums_grad, norms_grad, grad, length, qkv.stride(1), grad.stride(1), **sizes,
            num_warps=_WARPS,
        )  # fmt: skip


def _joined(parts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The chunks' states, added up: the matrices in `dtype`, the vectors float32.

    In a fixed order, so that a step gives the same numbers in every run. In 16 bits the matrices fit the shared memory
    of small GPUs.
    """
    state = parts.sum(dim=2)
    return state[:, :, :-1].to(dtype).contiguous(), state[:, :, -1].contiguous()


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


# --- around matrix products ------------------------------------------------------------------------------------


@triton.jit
def _quantise_kernel(
    x, out, scales, stride, C: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One row, so that its largest element becomes the largest number of the format."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < C
    value = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-12) / LARGEST
    tl.store(scales + row, scale)
    tl.store(out + row * C + column, (value / scale).to(out.dtype.element_ty), mask=inside)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, C) as float8 (M, C) and what its rows are to be multiplied with, (M, 1) float32."""
    rows, channels = x.shape
    out = x.new_empty(rows, channels, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(rows, 1, dtype=torch.float32)
    with _device_of(x):
        _quantise_kernel[(rows,)](
            x, out, scales, x.stride(0), C=channels, BLOCK=triton.next_power_of_2(channels),
            LARGEST=torch.finfo(out.dtype).max, num_warps=8,
        )  # fmt: skip
    return out, scales


@triton.jit
def _copy_kernel(places, factors, place_of, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """One block of one matrix of a table; see `CopyTable`."""
    places += tl.program_id(0) * 9
    source = tl.load(places).to(tl.pointer_type(tl.float32))
    place = tl.load(places + 1).to(tl.pointer_type(place_of.dtype.element_ty))
    scales = tl.load(places + 2).to(tl.pointer_type(tl.float32))
    columns = tl.load(places + 3)
    elements = tl.load(places + 4)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    row = index // columns
    column = index % columns
    scale = tl.load(scales + row * tl.load(places + 7) + column * tl.load(places + 8), mask=inside, other=1.0)
    value = tl.load(source + index, mask=inside, other=0.0) * tl.load(factors + tl.program_id(0)) / scale
    value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
    place += row * tl.load(places + 5) + column * tl.load(places + 6)
    tl.store(place, value.to(place_of.dtype.element_ty), mask=inside)


class CopyTable:
    """Writes many small matrices (source · factor / scales) into other tensors at once."""

    _BLOCK = 1024

    def __init__(self, copies: list[tuple[Tensor, Tensor, float, Tensor | None]]):
        """Of (source, place, factor, scales), matrices of one shape; the places of all are of one dtype.

        Sources and scales are float32, sources contiguous; all must outlive the table.
        """
        self.place = copies[0][1]
        one = torch.ones(1, 1, device=self.place.device)
        rows = []
        for source, place, _, scales in copies:
            if source.dtype != torch.float32 or not source.is_contiguous():
                raise ValueError("the sources must be float32 and contiguous")
            scales = (one if scales is None else scales).expand(source.shape)
            addresses = (source.data_ptr(), place.data_ptr(), scales.data_ptr())
            rows.append((*addresses, place.shape[1], place.numel(), *place.stride(), *scales.stride()))
        self.one = one
        self.places = torch.tensor(rows, device=self.place.device)
        self.factors = torch.tensor([factor for _, _, factor, _ in copies], device=self.place.device)
        self.blocks = triton.cdiv(max(source.numel() for source, *_ in copies), self._BLOCK)

    def run(self) -> None:
        """Copy."""
        with _device_of(self.place):
            _copy_kernel[(len(self.places), self.blocks)](
                self.places, self.factors, self.place, BLOCK=self._BLOCK,
                LARGEST=torch.finfo(self.place.dtype).max, num_warps=4,
            )  # fmt: skip
