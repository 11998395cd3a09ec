"""The ACE-Step v1 diffusion transformer, exact under padding.

Parameter names and shapes are those of the released 3.5B checkpoint. The stream is (B, W, D), channels last, from the
patch embedding to the last layer: the checkpoint's 1 × 1 convolutions are applied as matrix products.

Unlike the original, every frame outside the mask is invisible: group norm, depthwise convolution, attention and the
lyric encoder see valid frames and tokens only, so a song's result does not depend on its batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from acestep_ray.models.attention import CrossAttention, LinearSelfAttention, rotary_angles
from acestep_ray.models.lyric_encoder import LyricEncoder
from acestep_ray.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from acestep_ray.models.fused import FusedBlock, PackedConditioning

NORM_EPS = 1e-6
TIMESTEP_CHANNELS = 256
PATCH_CHANNELS_PER_INPUT = 256
PATCH_GROUPS = 32

# Projections for a joint attention that the released forward pass never runs: 0.63 of 3.31 billion parameters.
UNUSED_PARAMETERS = re.compile(
    r"transformer_blocks\.\d+\.cross_attn\.(add_[qkv]_proj|to_add_out)\.(weight|bias)"
)


def is_unused_parameter(name: str) -> bool:
    """Whether the released checkpoint holds `name` without its forward pass ever reading it."""
    return UNUSED_PARAMETERS.fullmatch(name) is not None


class PointwiseConv(nn.Linear):
    """A 1 × 1 convolution over time as a linear layer; its weight keeps the checkpoint's shape (out, in, 1)."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features, bias=bias)
        self.weight = nn.Parameter(self.weight.detach().unsqueeze(-1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, in) → (B, W, out)."""
        return F.linear(x, self.weight.squeeze(-1), self.bias)


class DepthwiseConv(nn.Module):
    """Depthwise convolution of width 3 over time, channels last."""

    def __init__(self, channels: int):
        super().__init__()
        convolution = nn.Conv1d(channels, channels, kernel_size=3, groups=channels)
        assert convolution.bias is not None  # by default it has one
        self.weight = convolution.weight
        self.bias = convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, C) → (B, W, C), zeros beyond both ends."""
        before, here, after = self.weight.to(x.dtype).squeeze(1).unbind(dim=-1)
        padded = F.pad(x, (0, 0, 1, 1))
        return padded[:, :-2] * before + x * here + padded[:, 2:] * after + self.bias.to(x.dtype)


class ConvHolder(nn.Module):
    """Gives a convolution the checkpoint's name, `<name>.conv`."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, C) → (B, W, C')."""
        return self.conv(x)


class GatedConvFeedForward(nn.Module):
    """The Mix-FFN of SANA in one dimension: expand, depthwise convolution over time, gate, project."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.inverted_conv = ConvHolder(PointwiseConv(dim, 2 * hidden, bias=True))
        self.depth_conv = ConvHolder(DepthwiseConv(2 * hidden))
        self.point_conv = ConvHolder(PointwiseConv(hidden, dim, bias=False))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, W, D) → (B, W, D); `mask` (B, W) is true on valid frames."""
        x = F.silu(self.inverted_conv(x))
        # The bias makes padded frames non-zero, and the convolution would carry them over the end of the song.
        x = self.depth_conv(x * mask[..., None])
        value, gate = x.chunk(2, dim=-1)
        return self.point_conv(value * F.silu(gate))


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm without weight over the last dimension, in float32."""
    return F.rms_norm(x.to(torch.float32), (x.shape[-1],), eps=NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive norm (Peebles and Xie, 2022): x · (1 + scale) + shift."""
    return x * (1 + scale) + shift


class TransformerBlock(nn.Module):
    """Linear self-attention, cross-attention to the conditioning, gated convolutional feed-forward."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        dim = config.inner_dim
        self.attn = LinearSelfAttention(dim, config.num_attention_heads, config.attention_head_dim)
        self.cross_attn = CrossAttention(dim, config.num_attention_heads, config.attention_head_dim)
        self.ff = GatedConvFeedForward(dim, int(dim * config.mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / math.sqrt(dim))
        self.fused: FusedBlock | None = None
        """The same in fewer passes, from `fused.fuse`; used for what `fused.prepare` made."""

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        time: Tensor,
        condition: Conditioning | PackedConditioning,
        angles: tuple[Tensor, Tensor],
    ) -> Tensor:
        """(B, W, D) → (B, W, D); `time` (B, 6, D) is the timestep's part of the six modulation vectors."""
        if not isinstance(condition, Conditioning):
            assert self.fused is not None  # `fused.fuse` brought both
            return self.fused(x, mask, time, condition, angles)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.scale_shift_table + time).chunk(6, dim=1)
        x = x + gate_a * self.attn(modulate(rms_norm(x), shift_a, scale_a), mask, angles)
        x = x + self.cross_attn(x, condition.tokens, condition.mask, angles, condition.angles)
        return x + gate_f * self.ff(modulate(rms_norm(x), shift_f, scale_f), mask)


class PatchEmbedding(nn.Module):
    """Latents to tokens: one frame of full height becomes one token."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        channels = config.in_channels * PATCH_CHANNELS_PER_INPUT
        self.early_conv_layers = nn.Sequential(
            nn.Conv2d(config.in_channels, channels, kernel_size=config.patch_size, stride=config.patch_size),
            nn.GroupNorm(PATCH_GROUPS, channels, eps=NORM_EPS),
            nn.Conv2d(channels, config.inner_dim, kernel_size=1),
        )

    def forward(self, latents: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H, W) → (B, W, D); the norm's statistics are over frames where `mask` (B, W) is true."""
        patch, norm, project = cast(tuple[nn.Conv2d, nn.GroupNorm, nn.Conv2d], self.early_conv_layers)
        frames = latents.permute(0, 3, 1, 2).flatten(2)
        x = F.linear(frames, patch.weight.flatten(1), patch.bias)
        x = masked_group_norm(x, mask, norm)
        return F.linear(x, project.weight.flatten(1), project.bias)


def masked_group_norm(x: Tensor, mask: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group norm of x (B, W, C) with statistics over valid frames only; in float32."""
    grouped = x.to(torch.float32).unflatten(-1, (norm.num_groups, -1))
    valid = mask[:, :, None, None].to(torch.float32)
    count = valid.sum(dim=1, keepdim=True) * grouped.shape[-1]
    mean = (grouped * valid).sum(dim=(1, 3), keepdim=True) / count
    variance = ((grouped - mean).square() * valid).sum(dim=(1, 3), keepdim=True) / count
    normalised = ((grouped - mean) * torch.rsqrt(variance + norm.eps)).flatten(2)
    return normalised * norm.weight + norm.bias


class FinalLayer(nn.Module):
    """Modulated norm and projection back to latents."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.height = config.patch_size[0]
        self.scale_shift_table = nn.Parameter(torch.randn(2, config.inner_dim) / math.sqrt(config.inner_dim))
        self.linear = nn.Linear(config.inner_dim, self.height * config.out_channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, W, D) with time embedding (B, D) → (B, C, H, W)."""
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, dim=1)
        x = self.linear(modulate(rms_norm(x), shift, scale))
        # Not a view: FSDP warns of those.
        return x.unflatten(-1, (self.height, -1)).permute(0, 3, 2, 1).contiguous()


class TimestepEmbedder(nn.Module):
    """Two linear layers over the sinusoid of the timestep."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(TIMESTEP_CHANNELS, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Timesteps (B,) in 0 … 1000 → (B, D)."""
        half = TIMESTEP_CHANNELS // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps.to(torch.float32)[:, None] * torch.exp(steps * (-math.log(10000.0) / half))
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear_2(F.silu(self.linear_1(sinusoid.to(self.linear_1.weight.dtype))))


@dataclass
class Conditioning:
    """The sequence that cross-attention reads: speaker, prompt and lyrics."""

    tokens: Tensor
    """(B, N, D)."""
    mask: Tensor
    """(B, N), true on valid tokens."""
    angles: tuple[Tensor, Tensor]
    """Rotary cosine and sine, (B, 1, N, head_dim)."""


@dataclass
class TransformerOutput:
    """What one forward pass gives."""

    velocity: Tensor
    """(B, 8, 16, W)."""
    ssl_projections: dict[str, Tensor]
    """By SSL model, (B, W, width of its features): empty where they were not asked for."""


class ACEStepTransformer(nn.Module):
    """The diffusion transformer with its conditioning embedders and SSL projectors."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = 0.0
        """Share of the blocks, evenly spread, whose activations are computed again in the backward pass."""
        self.draws_in_blocks = True
        """Whether blocks may draw from torch's random numbers, as LoRA's dropout does: where they are computed again,
        the generator is then read and set, which waits for the device."""
        self.prepare: Callable[..., tuple[Any, ...]] | None = None
        """What `fused.fuse` brings before its blocks."""
        dim = config.inner_dim
        self.proj_in = PatchEmbedding(config)
        self.timestep_embedder = TimestepEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.speaker_embedder = nn.Linear(config.speaker_embedding_dim, dim)
        self.genre_embedder = nn.Linear(config.text_embedding_dim, dim)
        self.lyric_embs = nn.Embedding(config.lyric_encoder_vocab_size, config.lyric_hidden_size)
        self.lyric_encoder = LyricEncoder(config.lyric_hidden_size, config.lyric_encoder)
        self.lyric_proj = nn.Linear(config.lyric_hidden_size, dim)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(config) for _ in range(config.num_layers)])
        self.projectors = nn.ModuleList(
            nn.Sequential(
                nn.Linear(dim, 2 * dim),
                nn.SiLU(),
                nn.Linear(2 * dim, 2 * dim),
                nn.SiLU(),
                nn.Linear(2 * dim, width),
            )
            for width in config.ssl_latent_dims
        )
        self.final_layer = FinalLayer(config)

    def encode_lyrics(self, ids: Tensor, mask: Tensor, dropout_seeds: Tensor | None = None) -> Tensor:
        """Lyric ids (B, L) int64 with `mask` (B, L) → (B, L, D)."""
        encoded = self.lyric_encoder(self.lyric_embs(ids), mask.bool(), dropout_seeds)
        return self.lyric_proj(encoded)

    def encode_condition(
        self,
        *,
        text: Tensor,
        text_mask: Tensor,
        speaker: Tensor,
        lyric_ids: Tensor,
        lyric_mask: Tensor,
        lyric_start: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Conditioning:
        """Embed and join speaker (B, 512), text (B, T, 768) and lyric ids (B, L); masks (B, T) and (B, L).

        `lyric_start` (B,) is the position of the first lyric token. In a batch with prompts of several lengths it is
        1 + each prompt's own length, so that a song's positions are those it has alone; by default 1 + T.
        """
        batch, text_length = text_mask.shape
        device = text.device
        if lyric_start is None:
            lyric_start = torch.full((batch,), 1 + text_length, device=device)
        tokens = torch.cat(
            [
                self.speaker_embedder(speaker)[:, None],
                self.genre_embedder(text),
                self.encode_lyrics(lyric_ids, lyric_mask, dropout_seeds),
            ],
            dim=1,
        )
        always = torch.ones(batch, 1, dtype=torch.bool, device=device)
        mask = torch.cat([always, text_mask.bool(), lyric_mask.bool()], dim=1)
        before_lyrics = torch.arange(1 + text_length, device=device).expand(batch, -1)
        lyric_positions = lyric_start[:, None] + torch.arange(lyric_ids.shape[1], device=device)
        positions = torch.cat([before_lyrics, lyric_positions], dim=1)
        cos, sin = self._rotary_angles(positions)
        return Conditioning(tokens, mask, (cos[:, None], sin[:, None]))

    def decode(
        self,
        latents: Tensor,
        timesteps: Tensor,
        condition: Conditioning,
        frame_mask: Tensor | None = None,
        with_ssl: bool = False,
    ) -> TransformerOutput:
        """Velocity of noisy latents (B, 8, 16, W) at `timesteps` (B,) in 0 … 1000.

        `frame_mask` (B, W) is true on valid frames; by default all are. With `with_ssl` also the projections that the
        SSL losses read.
        """
        batch, _, _, width = latents.shape
        if frame_mask is None:
            frame_mask = torch.ones(batch, width, dtype=torch.bool, device=latents.device)
        time = self.timestep_embedder(timesteps)
        block_time = self.t_block(time).unflatten(-1, (6, -1))
        angles = self._rotary_angles(torch.arange(width, device=latents.device))
        x = self.proj_in(latents, frame_mask)
        if self.prepare is not None:
            x, frame_mask, condition, angles = self.prepare(x, frame_mask, condition, angles)
        taps: dict[int, Tensor] = {}
        for depth, block in enumerate(self.transformer_blocks):
            if self._recomputes(depth) and torch.is_grad_enabled():
                x = recompute(
                    block, x, frame_mask, block_time, condition, angles,
                    use_reentrant=False, preserve_rng_state=self.draws_in_blocks,
                )  # fmt: skip
            else:
                x = block(x, frame_mask, block_time, condition, angles)
            if with_ssl and depth in self.config.ssl_encoder_depths:
                taps[depth] = x
        projections = {}
        if with_ssl:
            heads = zip(self.config.ssl_names, self.config.ssl_encoder_depths, self.projectors, strict=True)
            projections = {name: projector(taps[depth]) for name, depth, projector in heads}
        return TransformerOutput(self.final_layer(x, time), projections)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        *,
        frame_mask: Tensor | None = None,
        with_ssl: bool = False,
        **condition: Any,
    ) -> TransformerOutput:
        """`decode` with what `encode_condition` makes of `condition`, in one call, as training needs it."""
        # Past what sharding wraps around these two for calls from outside: inside of each other its hooks would free
        # parameters that the backward pass reads.
        kind = type(self)
        encoded = kind.encode_condition(self, **condition)
        return kind.decode(self, latents, timesteps, encoded, frame_mask, with_ssl)

    def _recomputes(self, depth: int) -> bool:
        share = self.activation_checkpointing
        return math.floor((depth + 1) * share) > math.floor(depth * share)

    def _rotary_angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_angles(positions, self.config.attention_head_dim, self.config.rope_theta)
