"""The training objective: flow matching on the denoised sample, and the SSL projection losses.

Every loss is given per sample, and a sample's loss is the same alone and in any padded batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from acestep_ray.diffusion.schedule import TRAINING_STEPS
from acestep_ray.models.kernels import runs_triton
from acestep_ray.models.transformer import TransformerOutput


@dataclass
class SSLTarget:
    """Features of one SSL model; only their direction matters."""

    features: Tensor
    """(B, F, dim), zero-padded; every `stride`-th frame of the song, from the first."""
    lengths: Tensor
    """(B,) int64, frames of the song before the stride."""
    stride: int = 1


@dataclass
class TrainingBatch:
    """Songs padded to one length, with every random draw already made."""

    latents: Tensor
    """(B, 8, 16, W)."""
    noise: Tensor
    """(B, 8, 16, W)."""
    sigmas: Tensor
    """(B,) noise levels."""
    frame_mask: Tensor
    """(B, W) bool, true on valid frames."""
    text: Tensor
    """(B, T, text width)."""
    text_mask: Tensor
    """(B, T) bool."""
    speaker: Tensor
    """(B, speaker width)."""
    lyric_ids: Tensor
    """(B, L) int64."""
    lyric_mask: Tensor
    """(B, L) bool."""
    lyric_start: Tensor | None = None
    """(B,) int64: see `ACEStepTransformer.encode_condition`."""
    dropout_seeds: Tensor | None = None
    """(B,) int64; None turns the lyric encoder's dropout off."""
    ssl: dict[str, SSLTarget] = field(default_factory=dict)
    """By SSL model."""
    keys: list[str] = field(default_factory=list)
    """The songs."""

    def to(self, device: torch.device | str) -> TrainingBatch:
        """The same batch on `device`; copies from pinned memory do not block."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> TrainingBatch:
        """The same batch in pinned memory."""
        return self.map(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """All of them, in the order in which `map` comes to them."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(note)
        return found

    def map(self, change: Callable[[Tensor], Tensor]) -> TrainingBatch:
        """The same batch with every tensor changed."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        ssl = {
            name: SSLTarget(change(target.features), change(target.lengths), target.stride)
            for name, target in self.ssl.items()
        }
        return TrainingBatch(**{**values, **tensors, "ssl": ssl})


@dataclass
class SampleLosses:
    """Losses of each sample, (B,) float32."""

    denoising: Tensor
    ssl: dict[str, Tensor]

    def total(self, ssl_coeff: float) -> Tensor:
        """Denoising loss plus `ssl_coeff` times the mean of the SSL losses, (B,)."""
        if not self.ssl:
            return self.denoising
        return self.denoising + ssl_coeff * torch.stack(list(self.ssl.values())).mean(dim=0)


def flow_matching_losses(transformer: Callable[..., TransformerOutput], batch: TrainingBatch) -> SampleLosses:
    """The losses of one forward pass of an `ACEStepTransformer`, or of what calls it for several workers.

    x = σ · noise + (1 − σ) · latents; the network's velocity v gives the denoised sample x − σ · v, compared with the
    latents. SSL losses are those of `batch.ssl`; without any, the projectors do not run.
    """
    sigma = batch.sigmas.view(-1, 1, 1, 1)
    x = sigma * batch.noise + (1 - sigma) * batch.latents
    output = transformer(
        x,
        batch.sigmas * TRAINING_STEPS,
        text=batch.text,
        text_mask=batch.text_mask,
        speaker=batch.speaker,
        lyric_ids=batch.lyric_ids,
        lyric_mask=batch.lyric_mask,
        lyric_start=batch.lyric_start,
        dropout_seeds=batch.dropout_seeds,
        frame_mask=batch.frame_mask,
        with_ssl=bool(batch.ssl),
    )
    denoised = x - sigma * output.velocity.to(torch.float32)
    squared_error = (denoised - batch.latents).square().mean(dim=(1, 2))
    return SampleLosses(
        denoising=masked_mean(squared_error, batch.frame_mask),
        ssl={
            name: projection_loss(output.ssl_projections[name], batch.frame_mask, target)
            for name, target in batch.ssl.items()
        },
    )


def denoising_losses(transformer: Callable[..., TransformerOutput], batch: TrainingBatch) -> Tensor:
    """`flow_matching_losses` without those of SSL models, (B,) float32."""
    return flow_matching_losses(transformer, batch).denoising


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` (B, N) where `mask` is true, (B,). What lies outside cannot reach the result, even as NaN."""
    return values.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1)


def projection_loss(projection: Tensor, frame_mask: Tensor, target: SSLTarget) -> Tensor:
    """1 − cosine between the projected stream (B, W, dim) and the SSL features, mean over a song's frames, (B,).

    The projection is interpolated in time to the features' length (linear, corners not aligned).
    """
    kept = torch.arange(target.features.shape[1], device=projection.device)
    cosine = projection_cosines(projection, frame_mask.sum(dim=1), target, kept * target.stride)
    mask = kept[None] * target.stride < target.lengths[:, None]
    return masked_mean(1 - cosine, mask)


def projection_cosines(
    projection: Tensor, source_lengths: Tensor, target: SSLTarget, places: Tensor
) -> Tensor:
    """Cosine (B, P) of the projected stream (B, W, dim), interpolated at `places`, and the features."""
    if runs_triton(projection):
        from acestep_ray.diffusion import fused_objective

        return fused_objective.projection_cosines(projection, source_lengths, target)
    at_features = interpolate_time(projection.to(torch.float32), source_lengths, target.lengths, places)
    return F.cosine_similarity(at_features, target.features.to(torch.float32), dim=-1)


def interpolate_time(x: Tensor, source_lengths: Tensor, target_lengths: Tensor, places: Tensor) -> Tensor:
    """Values of x (B, W, C) at `places` (P,) of each sample's sequence stretched to its `target_lengths` (B,).

    The same as `F.interpolate(mode="linear", align_corners=False)` on each sample's first `source_lengths` frames.
    """
    ratio = source_lengths.to(torch.float32) / target_lengths.to(torch.float32)
    position = ((places.to(torch.float32) + 0.5) * ratio[:, None] - 0.5).clamp(min=0.0)
    last = (source_lengths - 1)[:, None]
    left = position.long().minimum(last)
    right = (left + 1).minimum(last)
    weight = (position - left).clamp(0.0, 1.0)[..., None]

    def at(index: Tensor) -> Tensor:
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

    return torch.lerp(at(left), at(right), weight)
