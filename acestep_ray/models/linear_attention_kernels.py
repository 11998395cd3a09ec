"""Triton kernels of linear attention, forward and backward; `fused` says where it stands.

Streams are (B, W, C) with contiguous channels; `lengths` (B,) int32 are each song's valid frames. Sizes that change
from song to song are run-time arguments that Triton does not specialise on: a new length compiles nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acestep_ray.models.triton_kernels import _device_of

# Frames of which one part of the state is summed, and those of one step; by measurement on an H100.
_CHUNK = 512
_ROWS = 64
_WARPS = 8


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
