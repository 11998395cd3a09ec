"""Triton kernels of softmax attention of a song's frames to its conditioning, forward and backward.

As FlashAttention (Dao et al., 2022; Dao, 2023), in the three passes that few keys and many queries suggest: forward;
gradients of queries, a program for some frames; gradients of keys and values, a program for some tokens. Queries are
turned by their rotary positions on the way, and gradients of queries and keys turned back. Queries are
(B, W, heads · D), keys and values together (B, N, 2 · heads · D); `lengths` and `counts` (B,) int32 are each song's
valid frames and tokens, which come first. Sums are float32, and in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from acestep_ray.models.rotary_kernels import _rotate, _rotate_back
from acestep_ray.models.triton_kernels import _device_of

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tile:
    """What one program works on, and with."""

    frames: int
    tokens: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Of each pass."""

    forward: Tile
    queries: Tile
    keys: Tile


# By measurement on an H100; they fit the 99 KB of shared memory that GPUs for consumers have.
_TILES_16_BITS = Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(32, 64, 4, 3))
_TILES_32_BITS = Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2))


def _tiles(x: Tensor) -> Tiles:
    return _TILES_32_BITS if x.dtype == torch.float32 else _TILES_16_BITS


@triton.jit
def _load_tile(x, row, channel, limit, stride):
    """Rows below the limit, zeros beyond."""
    return tl.load(x + row[:, None] * stride + channel[None, :], mask=(row < limit)[:, None], other=0.0)


@triton.jit
def _store_tile(x, row, channel, limit, stride, value):
    tl.store(
        x + row[:, None] * stride + channel[None, :],
        value.to(x.dtype.element_ty),
        mask=(row < limit)[:, None],
    )


@triton.jit(do_not_specialize=["length", "keys"])
def _forward_kernel(
    query, keys_values, cos, sin, lengths, counts, out, sums, length, keys, query_stride, keys_stride, out_stride,
    factor, HEADS: tl.constexpr, D: tl.constexpr, FRAMES: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Some frames of one head: turned queries in place of the queries, softmax(q kᵀ) v, and log2 Σ exp of each row."""
    first = tl.program_id(0) * FRAMES
    head = tl.program_id(1)
    song = tl.program_id(2).to(tl.int64)
    limit = tl.load(lengths + song)
    count = tl.load(counts + song)
    row = first + tl.arange(0, FRAMES)
    channel = tl.arange(0, D)
    query += song * length * query_stride + head * D
    keys_values += song * keys * keys_stride + head * D
    out += song * length * out_stride + head * D
    sums += (song * HEADS + head) * length
    x = _load_tile(query, row, channel, length, query_stride).to(tl.float32)
    c = _load_tile(cos, row, channel, length, D)
    s = _load_tile(sin, row, channel, length, D)
    q = _rotate(x, c, s, FRAMES, D).to(query.dtype.element_ty)
    _store_tile(query, row, channel, length, query_stride, q)
    largest = tl.full([FRAMES], float("-inf"), tl.float32)
    total = tl.zeros([FRAMES], tl.float32)
    weighted = tl.zeros([FRAMES, D], tl.float32)
    for start in range(0, tl.where(first < limit, count, 0), TOKENS):
        token = start + tl.arange(0, TOKENS)
        key = _load_tile(keys_values, token, channel, count, keys_stride)
        value = _load_tile(keys_values + HEADS * D, token, channel, count, keys_stride)
        score = tl.dot(q, tl.trans(key), input_precision=PRECISION) * factor
        score = tl.where((token < count)[None, :], score, float("-inf"))
        larger = tl.maximum(largest, tl.max(score, axis=1))
        weight = tl.exp2(score - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weight, axis=1)
        weighted = weighted * shrink[:, None]
        weighted += tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        largest = larger
    # A tile without valid frames, or a song without tokens, is zero.
    total = tl.where(total > 0, total, 1.0)
    _store_tile(out, row, channel, length, out_stride, weighted / total[:, None])
    tl.store(sums + row, largest + tl.log2(total), mask=row < length)


@triton.jit(do_not_specialize=["length", "keys"])
def _query_gradient_kernel(
    query, keys_values, cos, sin, lengths, counts, out, out_grad, sums, products, query_grad, length, keys,
    query_stride, keys_stride, out_stride, out_grad_stride, grad_stride, factor, scale, HEADS: tl.constexpr,
    D: tl.constexpr, FRAMES: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some frames of one head: gradients of the queries before they were turned, and Σ out · gradient of each row."""
    first = tl.program_id(0) * FRAMES
    head = tl.program_id(1)
    song = tl.program_id(2).to(tl.int64)
    limit = tl.load(lengths + song)
    count = tl.load(counts + song)
    row = first + tl.arange(0, FRAMES)
    channel = tl.arange(0, D)
    query += song * length * query_stride + head * D
    keys_values += song * keys * keys_stride + head * D
    out += song * length * out_stride + head * D
    out_grad += song * length * out_grad_stride + head * D
    query_grad += song * length * grad_stride + head * D
    sums += (song * HEADS + head) * length
    products += (song * HEADS + head) * length
    q = _load_tile(query, row, channel, limit, query_stride)
    grad = _load_tile(out_grad, row, channel, limit, out_grad_stride)
    o = _load_tile(out, row, channel, limit, out_stride)
    product = tl.sum(o.to(tl.float32) * grad.to(tl.float32), axis=1)
    tl.store(products + row, product, mask=row < length)
    log_sum = tl.load(sums + row, mask=row < limit, other=0.0)
    total = tl.zeros([FRAMES, D], tl.float32)
    for start in range(0, tl.where(first < limit, count, 0), TOKENS):
        token = start + tl.arange(0, TOKENS)
        key = _load_tile(keys_values, token, channel, count, keys_stride)
        value = _load_tile(keys_values + HEADS * D, token, channel, count, keys_stride)
        score = tl.dot(q, tl.trans(key), input_precision=PRECISION) * factor
        # A token that is not valid has a key of zero and so no part in the sum below, whatever its weight.
        weight = tl.exp2(tl.where((token < count)[None, :], score - log_sum[:, None], float("-inf")))
        weight_grad = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        score_grad = weight * (weight_grad - product[:, None])
        total += tl.dot(score_grad.to(key.dtype), key, input_precision=PRECISION)
    c = _load_tile(cos, row, channel, length, D)
    s = _load_tile(sin, row, channel, length, D)
    _store_tile(query_grad, row, channel, length, grad_stride, _rotate_back(total * scale, c, s, FRAMES, D))


@triton.jit(do_not_specialize=["length", "keys"])
def _key_gradient_kernel(
    query, keys_values, cos, sin, lengths, counts, out_grad, sums, products, grads, length, keys, query_stride,
    keys_stride, out_grad_stride, grad_stride, factor, scale, HEADS: tl.constexpr, D: tl.constexpr,
    FRAMES: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head: gradients of the values, and of the keys before they were turned."""
    first = tl.program_id(0) * TOKENS
    head = tl.program_id(1)
    song = tl.program_id(2).to(tl.int64)
    limit = tl.load(lengths + song)
    count = tl.load(counts + song)
    token = first + tl.arange(0, TOKENS)
    channel = tl.arange(0, D)
    query += song * length * query_stride + head * D
    keys_values += song * keys * keys_stride + head * D
    out_grad += song * length * out_grad_stride + head * D
    grads += song * keys * grad_stride + head * D
    cos += song * keys * D
    sin += song * keys * D
    sums += (song * HEADS + head) * length
    products += (song * HEADS + head) * length
    key = _load_tile(keys_values, token, channel, count, keys_stride)
    value = _load_tile(keys_values + HEADS * D, token, channel, count, keys_stride)
    key_total = tl.zeros([TOKENS, D], tl.float32)
    value_total = tl.zeros([TOKENS, D], tl.float32)
    for start in range(0, tl.where(first < count, limit, 0), FRAMES):
        row = start + tl.arange(0, FRAMES)
        q = _load_tile(query, row, channel, limit, query_stride)
        grad = _load_tile(out_grad, row, channel, limit, out_grad_stride)
        log_sum = tl.load(sums + row, mask=row < limit, other=0.0)
        product = tl.load(products + row, mask=row < limit, other=0.0)
        score = tl.dot(key, tl.trans(q), input_precision=PRECISION) * factor
        weight = tl.exp2(score - log_sum[None, :])
        value_total += tl.dot(weight.to(grad.dtype), grad, input_precision=PRECISION)
        weight_grad = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        score_grad = weight * (weight_grad - product[None, :])
        key_total += tl.dot(score_grad.to(q.dtype), q, input_precision=PRECISION)
    # Rows of tokens that are not valid get no gradient.
    valid = (token < count)[:, None]
    _store_tile(grads + HEADS * D, token, channel, keys, grad_stride, tl.where(valid, value_total, 0.0))
    c = _load_tile(cos, token, channel, keys, D)
    s = _load_tile(sin, token, channel, keys, D)
    key_grad = _rotate_back(tl.where(valid, key_total, 0.0) * scale, c, s, TOKENS, D)
    _store_tile(grads, token, channel, keys, grad_stride, key_grad)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def cross_attention(
    query: Tensor,
    keys_values: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    counts: Tensor,
    heads: int,
    out: Tensor,
) -> Tensor:
    """Writes the attention into `out`, and the turned queries over the queries; keys come turned.

    Returns what the backward pass needs: log2 Σ exp of each row, (B, heads, W) float32.
    """
    batch, length, channels = query.shape
    keys, head_dim = keys_values.shape[1], channels // heads
    tile = _tiles(query).forward
    sums = query.new_empty(batch, heads, length, dtype=torch.float32)
    with _device_of(query):
        _forward_kernel[(triton.cdiv(length, tile.frames), heads, batch)](
            query, keys_values, cos, sin, lengths, counts, out, sums, length, keys, query.stride(1),
            keys_values.stride(1), out.stride(1), _LOG2_E / head_dim**0.5, HEADS=heads, D=head_dim,
            FRAMES=tile.frames, TOKENS=tile.tokens, PRECISION=_precision(query), num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    return sums


def cross_attention_backward(
    query: Tensor,
    keys_values: Tensor,
    query_angles: tuple[Tensor, Tensor],
    key_angles: tuple[Tensor, Tensor],
    lengths: Tensor,
    counts: Tensor,
    heads: int,
    out: Tensor,
    sums: Tensor,
    out_grad: Tensor,
    query_grad: Tensor,
    keys_values_grad: Tensor,
) -> None:
    """Fills the gradients of what was projected, before it was turned, from turned queries and keys."""
    batch, length, channels = query.shape
    keys, head_dim = keys_values.shape[1], channels // heads
    tiles = _tiles(query)
    scale = 1.0 / head_dim**0.5
    sizes = {"HEADS": heads, "D": head_dim, "PRECISION": _precision(query)}
    products = torch.empty_like(sums)
    with _device_of(query):
        tile = tiles.queries
        _query_gradient_kernel[(triton.cdiv(length, tile.frames), heads, batch)](
            query, keys_values, *query_angles, lengths, counts, out, out_grad, sums, products, query_grad, length,
            keys, query.stride(1), keys_values.stride(1), out.stride(1), out_grad.stride(1), query_grad.stride(1),
            _LOG2_E * scale, scale, FRAMES=tile.frames, TOKENS=tile.tokens, num_warps=tile.warps,
            num_stages=tile.stages, **sizes,
        )  # fmt: skip
        tile = tiles.keys
        _key_gradient_kernel[(triton.cdiv(keys, tile.tokens), heads, batch)](
            query, keys_values, *key_angles, lengths, counts, out_grad, sums, products, keys_values_grad, length,
            keys, query.stride(1), keys_values.stride(1), out_grad.stride(1), keys_values_grad.stride(1),
            _LOG2_E * scale, scale, FRAMES=tile.frames, TOKENS=tile.tokens, num_warps=tile.warps,
            num_stages=tile.stages, **sizes,
        )  # fmt: skip
