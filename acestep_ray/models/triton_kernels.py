"""What the Triton kernels of all models share: activations, and where they are launched."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = triton.knobs.runtime.interpret
# Elements that one program of a pass over memory handles.
_TILE = 4096


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


def _is_fast(x: Tensor) -> bool:
    """Whether the hardware's approximations are finer than what is stored."""
    return x.dtype != torch.float32 and not _INTERPRETED


def _device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, whatever its arguments lie on."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
