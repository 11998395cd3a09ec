"""Dropout whose mask is a function of a sample's seed and an element's place, and of nothing else.

Ordinary dropout draws from a stream: a song's mask then depends on its batch mates and on every draw before. Here it
is a hash of (seed of the sample, layer, row, column), so that a sample is dropped alike alone, in any batch and after
a resume.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The splitmix64 finaliser (Steele, Lea and Flood, 2014), its constants as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
# A 32-bit finaliser of low bias (C. Wellons, "Prospecting for Hash Functions", 2018), likewise signed.
_MIX_1_32 = 0x7FEB352D
_MIX_2_32 = 0x846CA68B - (1 << 32)


def counter_dropout(x: Tensor, p: float, seeds: Tensor, layer: int, rows: Tensor) -> Tensor:
    """Zero elements of x (B, …, R, C) with probability p and scale the rest by 1 / (1 − p).

    `seeds` (B,) int64 are the samples' seeds, `layer` tells the places of the network apart, and `rows` (R,) int64
    number the rows in a way that does not change with padding; columns, and what lies between, count from 0.
    """
    keys = splitmix64(seeds + layer)
    for size in x.shape[1:-2]:
        keys = splitmix64(keys[..., None] ^ torch.arange(1, size + 1, device=x.device))
    row_hashes = splitmix64(keys[..., None] ^ splitmix64(rows)).to(torch.int32)
    column_hashes = splitmix64(torch.arange(x.shape[-1], device=x.device)).to(torch.int32)
    # Rows and columns are well mixed apart; only their joint hash is as large as x, and so it is short and in place.
    hashes = row_hashes[..., None] ^ column_hashes
    hashes ^= (hashes >> 16) & 0xFFFF
    hashes *= _MIX_1_32
    hashes ^= (hashes >> 15) & 0x1FFFF
    hashes *= _MIX_2_32
    keep = hashes >= int(p * (1 << 32)) - (1 << 31)
    return torch.where(keep, x / (1.0 - p), 0.0)


def splitmix64(x: Tensor) -> Tensor:
    """A well-mixed int64 for every int64 of `x`."""
    x = x * _GAMMA
    x = (x ^ _logical_shift_right(x, 30)) * _MIX_1
    x = (x ^ _logical_shift_right(x, 27)) * _MIX_2
    return x ^ _logical_shift_right(x, 31)


def _logical_shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
