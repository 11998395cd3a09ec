"""The fused SSL loss in Triton's interpreter against the plain one; run with TRITON_INTERPRET=1, prints JSON.

TRITON_INTERPRET=1 python -m tests.diffusion.fused_objective_cases
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from acestep_ray.diffusion import fused_objective, objective
from acestep_ray.diffusion.objective import SSLTarget, projection_loss

DIM = 20
# Frames of the songs and of their features: more of them, as many, fewer, one.
SONGS = [(11, 30), (5, 26), (6, 6), (11, 5), (1, 3), (4, 1)]
FRAMES = 13


def target_of(stride: int, dtype: torch.dtype) -> SSLTarget:
    lengths = torch.tensor([length for _, length in SONGS])
    kept = -(-int(lengths.max()) // stride)
    features = torch.randint(-127, 128, (len(SONGS), kept, DIM)).to(dtype)
    if dtype.is_floating_point:
        features /= 1000  # norms below one
    features[torch.arange(kept) * stride >= lengths[:, None]] = 0
    features[0, 1] = 0  # without a direction
    return SSLTarget(features, lengths, stride)


def loss_and_gradient(projection: Tensor, mask: Tensor, target: SSLTarget) -> tuple[Tensor, Tensor]:
    projection = projection.clone().requires_grad_()
    losses = projection_loss(projection, mask, target)
    (losses * torch.arange(1, len(SONGS) + 1)).sum().backward()
    return losses.detach(), projection.grad


def errors_of(stride: int, features: torch.dtype, dtype: torch.dtype) -> dict[str, float]:
    frames = torch.tensor([length for length, _ in SONGS])
    mask = torch.arange(FRAMES) < frames[:, None]
    projection = torch.randn(len(SONGS), FRAMES, DIM).to(dtype)
    if dtype != torch.float16:  # whose range such gradients leave
        projection[3, 4:7] = 0  # places between these have no direction
    target = target_of(stride, features)
    wanted, wanted_grad = loss_and_gradient(projection, mask, target)
    objective.runs_triton = lambda x: True  # as on a GPU
    try:
        # What lies past a song's end is not read.
        found, found_grad = loss_and_gradient(
            projection.masked_fill(~mask[..., None], float("nan")), mask, target
        )
    finally:
        objective.runs_triton = chosen
    assert found_grad.dtype == dtype
    # Where there is no direction, gradients are 1e8 times as large as elsewhere: each frame by itself.
    scale = wanted_grad.float().norm(dim=-1).clamp(min=1e-6)
    grad_errors = (found_grad.float() - wanted_grad.float()).norm(dim=-1) / scale
    return {
        "losses": ((found - wanted).norm() / wanted.norm()).item(),
        "gradients": grad_errors[mask].nan_to_num(torch.inf).max().item(),
        "gradient past the end": found_grad[~mask].abs().nan_to_num(torch.inf).max().item(),
    }


def long_song() -> float:
    """Whether every place is found by its frames, also far from the start."""
    frames, kept, stride = 96, 334, 2
    x = torch.randn(1, frames, DIM, requires_grad=True)
    features = torch.randint(-127, 128, (1, kept, DIM)).to(torch.int8)
    target = SSLTarget(features, torch.tensor([kept * stride - 1]), stride)
    places = torch.arange(kept) * stride
    sources = torch.tensor([frames])
    weights = torch.randn(1, kept)
    plain = objective.projection_cosines(x, sources, target, places)
    (wanted,) = torch.autograd.grad(plain, x, weights)
    (found,) = torch.autograd.grad(fused_objective.projection_cosines(x, sources, target), x, weights)
    return ((found - wanted).norm() / wanted.norm()).item()


chosen = objective.runs_triton


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # what a kernel does not write is then NaN
    errors = {}
    for stride in (1, 4):
        for features, dtype in (
            (torch.int8, torch.float32),
            (torch.float32, torch.float32),
            (torch.float16, torch.float16),
            (torch.int8, torch.bfloat16),
        ):
            for name, error in errors_of(stride, features, dtype).items():
                errors[f"{name}, stride {stride}, {str(features)[6:]} features, of {str(dtype)[6:]}"] = error
    errors["gradient of a long song, of float32"] = long_song()
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
