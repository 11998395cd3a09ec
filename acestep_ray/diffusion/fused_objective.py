"""Triton kernels of the SSL losses: interpolation in time and cosine, one pass over the features each way.

The projection is read in its own dtype and the features in theirs; sums are float32 and in a fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from acestep_ray.models.triton_kernels import _TILE, _device_of

if TYPE_CHECKING:
    from acestep_ray.diffusion.objective import SSLTarget

# As in `F.cosine_similarity`.
_EPS = tl.constexpr(1e-8)


@triton.jit
def _interpolation(place, ratio, last):
    """Left frame, right frame and the right one's weight at places of a sequence: `interpolate_time`."""
    position = tl.maximum((place.to(tl.float32) + 0.5) * ratio - 0.5, 0.0)
    left = tl.minimum(position.to(tl.int32), last)
    right = tl.minimum(left + 1, last)
    weight = tl.minimum(tl.maximum(position - left.to(tl.float32), 0.0), 1.0)
    return left, right, weight


@triton.jit(do_not_specialize=["width", "count", "stride"])
def _cosine_kernel(
    projection, features, sources, targets, ratios, cosines, norms, width, count, stride, C: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS places of one song: their cosines, and the norms of both vectors."""
    kept = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    song = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    valid = (kept < count) & (kept * stride < tl.load(targets + song))
    inside = valid[:, None] & (column < C)[None, :]
    last = tl.load(sources + song).to(tl.int32) - 1
    left, right, weight = _interpolation(kept * stride, tl.load(ratios + song), last)
    frames = projection + song * width * C + column[None, :]
    before = tl.load(frames + left[:, None] * C, mask=inside, other=0.0).to(tl.float32)
    after = tl.load(frames + right[:, None] * C, mask=inside, other=0.0).to(tl.float32)
    x = before + weight[:, None] * (after - before)
    y = tl.load(features + song * count * C + kept[:, None] * C + column[None, :], mask=inside, other=0)
    y = y.to(tl.float32)
    x_norm = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), _EPS)
    y_norm = tl.maximum(tl.sqrt(tl.sum(y * y, axis=1)), _EPS)
    cosine = tl.sum(x * y, axis=1) / x_norm / y_norm
    tl.store(cosines + song * count + kept, cosine, mask=kept < count)
    tl.store(norms + 2 * (song * count + kept), x_norm, mask=kept < count)
    tl.store(norms + 2 * (song * count + kept) + 1, y_norm, mask=kept < count)


@triton.jit(do_not_specialize=["width", "count", "stride"])
def _cosine_backward_kernel(
    projection, features, sources, targets, ratios, cosines, norms, cosines_grad, projection_grad, width, count,
    stride, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One frame: the sum over the few places that lie next to it.

    With x the interpolated and y the feature, a place's gradient is grad · (y / |x||y| − cosine · x / |x|²). The
    parts along x are added up as numbers, by the frames that x is made of.
    """
    frame = tl.program_id(0)
    song = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < C
    sources_end = tl.load(sources + song).to(tl.int32)
    last = sources_end - 1
    ratio = tl.load(ratios + song)
    valid = (tl.load(targets + song).to(tl.int32) + stride - 1) // stride
    # Places between the frames before and after, with one to spare for rounding on either side.
    spacing = ratio * stride
    first = ((frame - 0.5) / spacing - 0.5 / stride).to(tl.int32) - 2
    end = ((frame + 1.5) / spacing - 0.5 / stride).to(tl.int32) + 3
    first = tl.maximum(first, 0)
    end = tl.minimum(tl.minimum(end, valid), count)
    end = tl.where(frame < sources_end, end, 0)
    features += song * count * C + column
    total = tl.zeros([BLOCK], tl.float32)
    of_before = tl.full((), 0.0, tl.float32)
    of_here = tl.full((), 0.0, tl.float32)
    of_after = tl.full((), 0.0, tl.float32)
    for kept in range(first, end):
        left, right, weight = _interpolation(kept * stride, ratio, last)
        share = tl.where(left == frame, 1.0 - weight, 0.0) + tl.where(right == frame, weight, 0.0)
        place = song * count + kept
        grad = tl.load(cosines_grad + place) * share
        x_norm = tl.load(norms + 2 * place)
        y_norm = tl.load(norms + 2 * place + 1)
        reached = (left == frame) | (right == frame)
        y = tl.load(features + kept * C, mask=inside & reached, other=0).to(tl.float32)
        total += grad / x_norm / y_norm * y
        along = grad * tl.load(cosines + place) / x_norm / x_norm
        of_before += tl.where(left == frame - 1, along * (1.0 - weight), 0.0)
        of_here += along * share
        of_after += tl.where(right == frame + 1, along * weight, 0.0)
    projection += song * width * C + frame * C + column
    before = tl.load(projection - C, mask=inside & (frame >= 1) & (frame <= last), other=0.0).to(tl.float32)
    here = tl.load(projection, mask=inside & (frame <= last), other=0.0).to(tl.float32)
    after = tl.load(projection + C, mask=inside & (frame < last), other=0.0).to(tl.float32)
    total -= of_before * before + of_here * here + of_after * after
    projection_grad += song * width * C + frame * C + column
    tl.store(projection_grad, total.to(projection_grad.dtype.element_ty), mask=inside)


class _ProjectionCosines(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projection: Tensor,
        features: Tensor,
        source_lengths: Tensor,
        target_lengths: Tensor,
        stride: int,
    ) -> Tensor:
        projection, features = projection.contiguous(), features.contiguous()
        batch, width, channels = projection.shape
        count = features.shape[1]
        ratios = source_lengths.to(torch.float32) / target_lengths.to(torch.float32)
        cosines = projection.new_empty(batch, count, dtype=torch.float32)
        norms = projection.new_empty(batch, count, 2, dtype=torch.float32)
        block = triton.next_power_of_2(channels)
        rows = max(1, _TILE // block)
        with _device_of(projection):
            # Without fused multiply-adds, which would round the places otherwise than the plain function does.
            _cosine_kernel[(triton.cdiv(count, rows), batch)](
                projection, features, source_lengths, target_lengths, ratios, cosines, norms, width, count, stride,
                C=channels, BLOCK=block, ROWS=rows, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
        ctx.save_for_backward(projection, features, source_lengths, target_lengths, ratios, cosines, norms)
        ctx.stride = stride
        return cosines

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cosines_grad: Tensor) -> tuple[Tensor | None, ...]:
        projection, features, source_lengths, target_lengths, ratios, cosines, norms = ctx.saved_tensors
        batch, width, channels = projection.shape
        grad = torch.empty_like(projection)
        with _device_of(projection):
            _cosine_backward_kernel[(width, batch)](
                projection, features, source_lengths, target_lengths, ratios, cosines, norms,
                cosines_grad.contiguous(), grad, width, features.shape[1], ctx.stride,
                C=channels, BLOCK=triton.next_power_of_2(channels), num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        return grad, None, None, None, None


def projection_cosines(projection: Tensor, source_lengths: Tensor, target: SSLTarget) -> Tensor:
    """Cosine (B, P) float32 of the projection (B, W, dim), interpolated in time as by `interpolate_time`, and the
    features (B, P, dim); zero past a song's features."""
    return _ProjectionCosines.apply(
        projection, target.features, source_lengths, target.lengths, target.stride
    )
