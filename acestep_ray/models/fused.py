"""The transformer's blocks in fewer passes over memory, for a GPU: the same numbers as `transformer`, sooner.

`fuse` prepares a model; its blocks then run here wherever they are given 16-bit work. What is between two matrix
products is one pass, forward and backward; layers that read the same input are one product (`projection`). Streams are
(B, W, D); frames that are valid come first. `room` is what a projection needs at the end of the rows of its inputs, and
of the gradients of its outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from acestep_ray.models import block_kernels as kernels
from acestep_ray.models.cross_attention_kernels import cross_attention, cross_attention_backward
from acestep_ray.models.linear_attention_kernels import linear_attention, linear_attention_backward
from acestep_ray.models.projection import (
    Projection,
    Refresh,
    Separately,
    empty_with_room,
    project_together,
)
from acestep_ray.models.rotary_kernels import rotary
from acestep_ray.models.transformer import (
    NORM_EPS,
    ACEStepTransformer,
    Conditioning,
    DepthwiseConv,
    TransformerBlock,
)

# In 16 bits the stream would take a tenth of the time of these passes and more than double the gradients' error.
STREAM_DTYPE = torch.float32


# --- passes ------------------------------------------------------------------------------------------------------


class _AddNorm(torch.autograd.Function):
    """stream + gate · update (without an update the stream itself), and of that the modulated RMSNorm, or a copy."""

    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        update: Tensor | None,
        gate: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        update_room: int,
        room: int | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        """Without `room` nothing is normed or copied."""
        normed = None if room is None else empty_with_room(stream.shape, room, stream, dtype)
        added, factors = kernels.add_norm(stream, update, gate, shift, scale, NORM_EPS, normed)
        needs = ctx.needs_input_grad
        ctx.save_for_backward(
            added if factors is not None else None, factors, gate, scale, update if needs[2] else None
        )
        ctx.shape = stream.shape
        ctx.stream_dtype, ctx.update_dtype = stream.dtype, None if update is None else update.dtype
        ctx.update_room = update_room
        ctx.set_materialize_grads(False)
        return added, normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, added_grad: Tensor | None, normed_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        added, factors, gate, scale, update = ctx.saved_tensors
        needs = ctx.needs_input_grad
        given = added_grad if added_grad is not None else normed_grad
        if given is None:
            return (None,) * len(needs)
        if added_grad is not None:
            added_grad = added_grad.contiguous()
        is_stream_grad = normed_grad is None and given.dtype == ctx.stream_dtype
        update_grad = None
        if ctx.update_dtype is not None:
            update_grad = empty_with_room(ctx.shape, ctx.update_room, given, ctx.update_dtype)
        stream_grad = kernels.add_norm_backward(
            added,
            factors,
            gate,
            scale,
            added_grad,
            normed_grad,
            channels=ctx.shape[-1],
            stream_dtype=ctx.stream_dtype if (needs[0] or needs[2]) and not is_stream_grad else None,
            update_grad=update_grad,
        )
        if is_stream_grad:
            stream_grad = added_grad
        gate_grad = shift_grad = scale_grad = None
        if needs[2]:
            assert stream_grad is not None  # as it was asked for
            gate_grad = (stream_grad.float() * update).sum(dim=1, keepdim=True)
        if needs[3] and normed_grad is not None:
            of_normed = normed_grad.float()
            shift_grad = of_normed.sum(dim=1, keepdim=True)
            normalised = added.float() * factors.view(*added.shape[:-1], 1)
            scale_grad = (of_normed * normalised).sum(dim=1, keepdim=True)
        return (
            stream_grad if needs[0] else None,
            update_grad,
            gate_grad,
            shift_grad,
            scale_grad,
            None,
            None,
            None,
        )


class _LinearAttention(torch.autograd.Function):
    """Of the projected queries, keys and values (B, W, 3D), which it rotates in place."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, heads: int, qkv_room: int, room: int
    ) -> Tensor:
        rows = qkv.flatten(0, 1)
        rotary(rows, cos, sin, 2 * heads, relu=True)
        out = empty_with_room((*qkv.shape[:-1], qkv.shape[-1] // 3), room, qkv)
        state = linear_attention(qkv, lengths, heads, out)
        ctx.save_for_backward(qkv, cos, sin, lengths, *state)
        ctx.heads, ctx.room = heads, qkv_room
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin, lengths, *state = ctx.saved_tensors
        grad = empty_with_room(qkv.shape, ctx.room, qkv)
        linear_attention_backward(qkv, lengths, ctx.heads, state, out_grad, grad)
        rows = grad.flatten(0, 1)
        rotary(rows, cos, sin, 2 * ctx.heads, backward=True)
        return grad, None, None, None, None, None, None


class _CrossAttention(torch.autograd.Function):
    """Of the projected queries (B, W, D) and keys and values (B, N, 2D), of which it turns the first two in place."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys_values: Tensor,
        cos: Tensor,
        sin: Tensor,
        lengths: Tensor,
        condition: PackedConditioning,
        heads: int,
        query_room: int,
        keys_values_room: int,
        room: int,
    ) -> Tensor:
        counts, key_angles = condition.counts, condition.angles
        key_cos, key_sin = key_angles
        rotary(keys_values.flatten(0, 1), key_cos.flatten(0, 1), key_sin.flatten(0, 1), heads)
        out = empty_with_room(query.shape, room, query)
        sums = cross_attention(query, keys_values, cos, sin, lengths, counts, heads, out)
        # The next projection writes into what is behind the output's rows: an alias does not count that as a change.
        ctx.save_for_backward(query, keys_values, cos, sin, *key_angles, lengths, counts, out.data, sums)
        ctx.heads, ctx.query_room, ctx.keys_values_room = heads, query_room, keys_values_room
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        query, keys_values, cos, sin, key_cos, key_sin, lengths, counts, out, sums = ctx.saved_tensors
        query_grad = empty_with_room(query.shape, ctx.query_room, query)
        keys_values_grad = empty_with_room(keys_values.shape, ctx.keys_values_room, keys_values)
        cross_attention_backward(
            query,
            keys_values,
            (cos, sin),
            (key_cos, key_sin),
            lengths,
            counts,
            ctx.heads,
            out,
            sums,
            out_grad.contiguous(),
            query_grad,
            keys_values_grad,
        )
        return query_grad, keys_values_grad, *(None,) * 8


class _GatedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias, lengths)
        return kernels.gated_conv(x, weight, bias, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, lengths = ctx.saved_tensors
        x_grad, taps_grad = kernels.gated_conv_backward(
            x, weight, bias, lengths, out_grad.contiguous(), trains=ctx.needs_input_grad[1]
        )
        if taps_grad is None:
            return x_grad, None, None, None
        return x_grad, taps_grad[:3].to(weight.dtype), taps_grad[3].to(bias.dtype), None


# --- blocks ------------------------------------------------------------------------------------------------------


@dataclass
class PackedConditioning:
    """Each song's valid tokens of the conditioning before the others."""

    tokens: Tensor
    """(B, N, D)."""
    counts: Tensor
    """Valid tokens, (B,) int32."""
    angles: tuple[Tensor, Tensor]
    """Rotary cosine and sine, (B, N, head_dim) float32."""

    @classmethod
    def pack(cls, condition: Conditioning) -> PackedConditioning:
        """Without waiting for the device to count the tokens."""
        batch, longest = condition.mask.shape
        order = torch.argsort(~condition.mask, dim=1, stable=True)
        rows = order + longest * torch.arange(batch, device=order.device)[:, None]
        cos, sin = (
            angles.expand(batch, 1, longest, -1).reshape(batch * longest, -1)[rows]
            for angles in condition.angles
        )
        counts = condition.mask.sum(dim=1, dtype=torch.int32)
        return cls(condition.tokens.flatten(0, 1)[rows], counts, (cos, sin))


class FusedBlock:
    """A `TransformerBlock` in few passes."""

    def __init__(self, block: TransformerBlock, dtype: torch.dtype, *, join_frozen: bool, float8: bool):
        self.block = block
        self.dtype = dtype
        attention, cross, ff = block.attn, block.cross_attn, block.ff
        self.heads = attention.heads

        def together(*layers: nn.Module) -> Projection | Separately:
            if not join_frozen:
                return Separately(layers)
            return project_together(layers, dtype, float8=float8)

        self.qkv = together(attention.to_q, attention.to_k, attention.to_v)
        self.out = together(attention.to_out[0])
        self.query = together(cross.to_q)
        self.keys_values = together(cross.to_k, cross.to_v)
        self.cross_out = together(cross.to_out[0])
        self.expand = together(ff.inverted_conv.conv)
        self.contract = together(ff.point_conv.conv)
        self.projections = (
            self.qkv, self.out, self.query, self.keys_values, self.cross_out, self.expand, self.contract,
        )  # fmt: skip

    def __call__(
        self,
        x: Tensor,
        lengths: Tensor,
        time: Tensor,
        condition: PackedConditioning,
        angles: tuple[Tensor, Tensor],
    ) -> Tensor:
        """As `TransformerBlock.forward`, with the songs' `lengths` (B,) int32 for a mask."""
        modulation = self.block.scale_shift_table + time
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.chunk(6, dim=1)
        x, normed = _AddNorm.apply(x, None, None, shift_a, scale_a, 0, self.qkv.rank, self.dtype)
        attended = _LinearAttention.apply(
            self.qkv(normed), *angles, lengths, self.heads, self.qkv.rank, self.out.rank
        )
        update = self.out(attended)
        x, copied = _AddNorm.apply(x, update, gate_a, None, None, self.out.rank, self.query.rank, self.dtype)
        attended = _CrossAttention.apply(
            self.query(copied), self.keys_values(condition.tokens), *angles, lengths, condition, self.heads,
            self.query.rank, self.keys_values.rank, self.cross_out.rank,
        )  # fmt: skip
        update = self.cross_out(attended)
        x, normed = _AddNorm.apply(
            x, update, None, shift_f, scale_f, self.cross_out.rank, self.expand.rank, self.dtype
        )
        conv = cast(DepthwiseConv, self.block.ff.depth_conv.conv)
        taps = conv.weight.squeeze(1).t().contiguous()
        hidden = _GatedConv.apply(self.expand(normed), taps, conv.bias, lengths)
        update = self.contract(hidden)
        x, _ = _AddNorm.apply(x, update, gate_f, None, None, self.contract.rank, None, self.dtype)
        return x


def fuse(
    transformer: ACEStepTransformer,
    dtype: torch.dtype = torch.bfloat16,
    *,
    join_frozen: bool = True,
    float8: bool = False,
) -> None:
    """Let the blocks run here when they are given work in `dtype`.

    With `join_frozen` the frozen weights of the blocks' layers move to that dtype and into joint tensors; without it
    every layer stays as it is, as sharding and offloading need it. With `float8` the products with frozen weights are
    computed in float8, which changes the numbers.
    """
    projections: list[Projection | Separately] = []
    for block in cast(Iterable[TransformerBlock], transformer.transformer_blocks):
        block.fused = FusedBlock(block, dtype, join_frozen=join_frozen, float8=float8)
        projections += block.fused.projections
    refresh = Refresh(projections)

    def prepare(
        x: Tensor, frame_mask: Tensor, condition: Conditioning, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Conditioning | PackedConditioning, tuple[Tensor, Tensor]]:
        if _dtype_of(x) != dtype:
            return x, frame_mask, condition, angles
        refresh()
        lengths = frame_mask.sum(dim=1, dtype=torch.int32)
        return x.to(STREAM_DTYPE), lengths, PackedConditioning.pack(condition), angles

    transformer.prepare = prepare


def _dtype_of(x: Tensor) -> torch.dtype:
    """What products are computed in where x is."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
