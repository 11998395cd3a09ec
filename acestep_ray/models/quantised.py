"""Frozen linear layers whose weights are stored in 8 or 4 bits, with gradients to their inputs.

Products are those of the compute dtype: the weight is written out for each of them, forward and backward, and forgotten
again. Plain torch, so that it runs on a CPU as on a GPU and inside `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INT8_LEVELS = 127
NF4_BLOCK = 64
# Quantiles of the normal distribution with an exact zero: QLoRA (Dettmers et al., 2023, arXiv:2305.14314), Appendix E.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def encode_int8(weight: Tensor) -> tuple[Tensor, ...]:
    """Codes (out, in) int8 and scales (out, 1) float32 of a weight (out, in), symmetric by output channel."""
    weight = weight.to(torch.float32)
    scale = weight.abs().amax(dim=1, keepdim=True) / INT8_LEVELS
    # A row of zeros has no scale, and its codes are zeros with any.
    codes = (weight / scale.clamp(min=torch.finfo(torch.float32).tiny)).round()
    return codes.to(torch.int8), scale


def decode_int8(codes: Tensor, scale: Tensor, *, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight (out, in) in `dtype`, rounded once."""
    # With `out` the product goes to memory in `dtype`, without a float32 copy of the weight.
    return torch.mul(codes, scale, out=torch.empty(size, dtype=dtype, device=codes.device))


def encode_nf4(weight: Tensor) -> tuple[Tensor, ...]:
    """Codes (blocks, 32) uint8, two in a byte, scales (blocks, 1) bfloat16, and what each byte stands for, (256, 2).

    The blocks are 64 elements of the flattened weight (out, in), the last one filled up with zeros.
    """
    flat = weight.to(torch.float32).flatten()
    blocks = F.pad(flat, (0, -flat.numel() % NF4_BLOCK)).unflatten(0, (-1, NF4_BLOCK))
    scale = blocks.abs().amax(dim=1, keepdim=True).to(torch.bfloat16)
    values = torch.tensor(NF4_VALUES, device=weight.device)
    between = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks / scale.to(torch.float32).clamp(min=1e-30), between, out_int32=True)
    codes = codes.to(torch.uint8)
    pairs = torch.cartesian_prod(values, values)
    return codes[:, 0::2] * len(NF4_VALUES) + codes[:, 1::2], scale, pairs


def decode_nf4(
    codes: Tensor, scale: Tensor, pairs: Tensor, *, size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weight (out, in) in `dtype`."""
    values = F.embedding(codes.to(torch.int32), pairs.to(dtype)).flatten(1)
    values.mul_(scale)
    return values.flatten()[: size[0] * size[1]].view(size)


Encode = Callable[[Tensor], tuple[Tensor, ...]]
"""A weight (out, in) → its codes and what they are decoded with."""
Decode = Callable[..., Tensor]
"""These, `size` and `dtype` → the weight."""

FORMS: dict[str, tuple[Encode, Decode]] = {
    "int8": (encode_int8, decode_int8),
    "nf4": (encode_nf4, decode_nf4),
}


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ + b with a gradient for x alone; what is kept for it are the codes, not the weight."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, form: str, size: tuple[int, int], *stored: Tensor) -> Tensor:
        return F.linear(x, FORMS[form][1](*stored, size=size, dtype=x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.form, ctx.size, *stored = inputs
        ctx.save_for_backward(*stored)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors  # once: recomputed blocks give them out only once
        weight = FORMS[ctx.form][1](*stored, size=ctx.size, dtype=gradient.dtype)
        return gradient @ weight, *(None for _ in range(3 + len(stored)))


class QuantisedLinear(nn.Module):
    """A linear layer, or a 1 × 1 convolution, that holds codes in place of its weight; nothing of it is trained."""

    def __init__(self, layer: nn.Linear, form: str, device: torch.device | str | None = None):
        """Stand in for `layer`, with its weight quantised on `device`, by default its own; `form` is int8 or nf4."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.form = form
        self.shape = layer.weight.shape
        weight = layer.weight.detach().to(device).flatten(1)
        # Not buffers: DDP would send those around in every step.
        self.stored = nn.ParameterList(
            nn.Parameter(tensor, requires_grad=False) for tensor in FORMS[form][0](weight)
        )
        self.bias = layer.bias if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), False)

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, in the layer's shape, float32; a new tensor with every call."""
        size = (self.out_features, self.in_features)
        return FORMS[self.form][1](*self.stored, size=size, dtype=torch.float32).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out), in autocast's precision where that is on."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        return _FrozenProduct.apply(x, bias, self.form, (self.out_features, self.in_features), *self.stored)


def quantise_linear_layers(
    model: nn.Module, within: Sequence[str], form: str, device: torch.device | str | None = None
) -> None:
    """Quantise the frozen linear layers below the submodules `within`, one after another; in place.

    Only a layer's codes are left on `device`: a model on the CPU never lies there whole.
    """
    for top in within:
        for parent in list(model.get_submodule(top).modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear) and not any(p.requires_grad for p in layer.parameters()):
                    setattr(parent, name, QuantisedLinear(layer, form, device))
