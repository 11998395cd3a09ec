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
    x, cos, sin, period, stride, HEADS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    BACKWARD: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """The first HEADS heads of one frame."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK)[:, None]
    channel = tl.arange(0, D)[None, :]
    place = (row % period) * D + channel
    inside = (head < HEADS) & (channel < D)
    c = tl.broadcast_to(tl.load(cos + place), (BLOCK, D))
    s = tl.broadcast_to(tl.load(sin + place), (BLOCK, D))
    x += row * stride + head * D + channel
    value = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    value = _rotate_back(value, c, s, BLOCK, D) if BACKWARD else _rotate(value, c, s, BLOCK, D)
    if RELU:
        value = tl.maximum(value, 0.0)
    tl.store(x, value.to(x.dtype.element_ty), mask=inside)


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, heads: int, *, backward: bool = False, relu: bool = False
) -> None:
    """Turns the first `heads` heads of x (rows, C) in place; row i by the angles (P, head_dim) of row i modulo P."""
    with _device_of(x):
        _rotary_kernel[(len(x),)](
            x, cos, sin, len(cos), x.stride(0), HEADS=heads, BLOCK=triton.next_power_of_2(heads),
            D=cos.shape[-1], BACKWARD=backward, RELU=relu, num_warps=4,
        )  # fmt: skip
