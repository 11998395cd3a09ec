"""Whether a model takes the fused path; Triton is imported only where it does."""

from __future__ import annotations

import torch

from acestep_ray.models.kernels import runs_triton
from acestep_ray.models.transformer import ACEStepTransformer


def fuse_where_possible(
    transformer: ACEStepTransformer,
    device: torch.device,
    *,
    join_frozen: bool = True,
    float8: bool = False,
) -> bool:
    """Let a model compute its bfloat16 work in few passes on `device`; returns whether it does.

    It does on a GPU of the A100's generation or later for which Triton compiles, with heads of a size that the kernels
    take. See `fused.fuse`.
    """
    if why_not_fused(transformer.config.attention_head_dim, device) is not None:
        return False
    from acestep_ray.models.fused import fuse
    from acestep_ray.models.fused_lyrics import fuse_lyric_encoder

    fuse(transformer, join_frozen=join_frozen, float8=float8)
    fuse_lyric_encoder(transformer.lyric_encoder)
    return True


def why_not_fused(head_size: int, device: torch.device) -> str | None:
    """Why a transformer with heads of this size takes the plain path on `device`; None where it takes the fused one."""
    if not 16 <= head_size <= 128 or head_size & (head_size - 1):
        return f"its heads are {head_size} wide, the kernels take powers of two from 16 to 128"
    if device.type != "cuda":
        return "it runs on a CPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return (
            f"its compute capability is {capability[0]}.{capability[1]}, the kernels need 8.0 (A100) or later"
        )
    if not runs_triton(torch.empty(0, device=device)):
        return "Triton compiles nothing here"
    return None
