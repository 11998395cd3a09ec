"""The Triton kernel of the log-mel spectrogram; `kernels` has the same in plain torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acestep_ray.models.triton_kernels import _INTERPRETED, _device_of


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
