"""Dropout whose mask is a function of a sample's seed and an element's place, and of nothing else.

Ordinary dropout draws from a stream: a song's mask then depends on its batch mates and on every draw before. Here it is
a hash of (seed of the sample, layer, index of the element), so that a sample is dropped alike alone, in any batch and
after a resume.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Multipliers of the splitmix64 finaliser (Steele, Lea and Flood, 2014), as signed 64-bit integers.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _logical_shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """A well-mixed int64 for every int64 of `x`."""
    x = x * _GOLDEN_GAMMA
    x = (x ^ _logical_shift_right(x, 30)) * _MIX_1
    x = (x ^ _logical_shift_right(x, 27)) * _MIX_2
    return x ^ _logical_shift_right(x, 31)


def counter_dropout(x: Tensor, p: float, seeds: Tensor, layer: int, index: Tensor) -> Tensor:
    """Zero elements of x (B, …) with probability p and scale the rest by 1 / (1 − p).

    `seeds` (B,) int64 are the samples' seeds, `layer` tells the places of the network apart, and `index` (int64,
    broadcastable to x[0]) names each element in a way that does not change with padding.
    """
    sample = splitmix64(seeds + layer).view(-1, *[1] * (x.ndim - 1))
    uniform_24bit = _logical_shift_right(splitmix64(sample ^ splitmix64(index)), 40)
    keep = uniform_24bit >= int(p * (1 << 24))
    return torch.where(keep, x / (1.0 - p), 0.0)
