"""The best LoRA of a given rank, and the error that it leaves (Eckart and Young, 1936)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from acestep_ray.export.reading import LoraUpdate

# A decomposition of this size takes a second; of a larger one only as much is computed as the rank needs.
_WHOLE = 512
_OVERSAMPLING = 32
_MAX_ITERATIONS = 60
# Of what is not captured yet, and of the matrix.
_TOLERANCE, _ROUNDING = 1e-4, 1e-12


@dataclass(frozen=True)
class LayerError:
    """What a low rank leaves of one module's change D: ‖D‖ and ‖D − B A‖, Frobenius norms."""

    norm: float
    error: float
    rank: int

    @property
    def relative(self) -> float:
        """The error's share of the norm; 0 where there was nothing."""
        return self.error / self.norm if self.norm else 0.0


@torch.no_grad()
def best_of_rank(difference: Tensor, rank: int) -> tuple[LoraUpdate, LayerError]:
    """The LoRA nearest to `difference` (out, in), of at most this rank; on the device of `difference`, float64 inside.

    Projects on the first singular vectors. For large matrices they are found by subspace iteration, whose error is
    within a thousandth of the least possible one and is measured, not estimated.
    """
    d = difference.double()
    rank = min(rank, *d.shape)
    is_wide = d.shape[0] <= d.shape[1]
    rows = d if is_wide else d.T
    left = _first_left_vectors(rows, rank)
    right = left.T @ rows
    error = (rows - left @ right).norm().item()
    # Both matrices get the same size, so that neither overflows in half precision.
    root = right.norm(dim=1).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    left, right = left * root, right / root[:, None]
    a, b = (right, left) if is_wide else (left.T, right.T)
    return LoraUpdate(_stored(a), _stored(b), None), LayerError(d.norm().item(), error, rank)


def _first_left_vectors(d: Tensor, count: int) -> Tensor:
    """The first left singular vectors (rows, count) of `d` (rows, columns), by falling singular value."""
    width = count + _OVERSAMPLING
    if d.shape[0] <= max(_WHOLE, width):
        return torch.linalg.eigh(d @ d.T).eigenvectors[:, -count:].flip(1)
    # Halko, Martinsson and Tropp (2011, arXiv:0909.4061), repeated until no more of the matrix is captured.
    random = torch.randn(d.shape[1], width, dtype=d.dtype, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(d @ random.to(d.device)).Q
    total, captured = d.square().sum().item(), 0.0
    for _ in range(_MAX_ITERATIONS):
        within = basis.T @ d
        values, vectors = torch.linalg.eigh(within @ within.T)
        now = values[-count:].sum().item()
        if now - captured <= _TOLERANCE * (total - now) + _ROUNDING * total:
            break
        captured = now
        basis = torch.linalg.qr(d @ within.T).Q
    return basis @ vectors[:, -count:].flip(1)


@torch.no_grad()
def reduced(update: LoraUpdate, rank: int) -> tuple[LoraUpdate, LayerError]:
    """The LoRA of at most this rank that is nearest to `update`, which is no DoRA; no product of full size is made."""
    q_b, r_b = torch.linalg.qr(update.b.double())
    q_a, r_a = torch.linalg.qr(update.a.double().T)
    core, error = best_of_rank(r_b @ r_a.T, rank)
    smaller = LoraUpdate(_stored(core.a.double() @ q_a.T), _stored(q_b @ core.b.double()), None)
    return smaller, error


def total_relative_error(errors: Mapping[str, LayerError], left_out: float = 0.0) -> float:
    """The error over all modules as a share of the whole change; `left_out` is the norm of what no LoRA can hold."""
    error = sum(e.error**2 for e in errors.values()) + left_out**2
    norm = sum(e.norm**2 for e in errors.values()) + left_out**2
    return (error / norm) ** 0.5 if norm else 0.0


def _stored(matrix: Tensor) -> Tensor:
    return matrix.to("cpu", torch.float32).contiguous()
