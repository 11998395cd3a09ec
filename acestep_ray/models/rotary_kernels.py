"""Triton kernels that turn heads by rotary positions, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from acestep_ray.models.triton_kernels import _device_of


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
