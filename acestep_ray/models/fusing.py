"""Whether a model takes the fused path; Triton is imported only where it does."""

from __future__ import annotations

import torch

from acestep_ray.models.kernels import triton_kernels
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
    size = transformer.config.attention_head_dim
    if not 16 <= size <= 128 or size & (size - 1):
        return False
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if triton_kernels(torch.empty(0, device=device)) is None:
        return False
    from acestep_ray.models.fused import fuse
    from acestep_ray.models.fused_lyrics import fuse_lyric_encoder

    fuse(transformer, join_frozen=join_frozen, float8=float8)
    fuse_lyric_encoder(transformer.lyric_encoder)
    return True
