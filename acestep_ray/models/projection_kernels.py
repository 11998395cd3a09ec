"""Triton kernels around a projection's matrix products: rows in float8, and what a step has made of the LoRAs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acestep_ray.models.triton_kernels import _device_of


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
