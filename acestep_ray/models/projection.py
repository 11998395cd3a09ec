"""Frozen linear layers that read one input, as one matrix product, forward and backward, in 16 bits or in float8.

Their LoRAs cost next to nothing there: a LoRA is R more columns of the product. The input (…, K) lies in a tensor whose
rows have room for K + R, the last R for x·aᵀ; the weights are one tensor (N + R, K + R)

    W  s·b
    a   0

of which the forward pass reads the first N rows, and the backward pass the first K columns, with gradients (…, N) in
rows that have room for N + R. Nothing of a frozen layer is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from acestep_ray.models import projection_kernels as kernels
from acestep_ray.models.transformer import PointwiseConv

# Ranks are filled up to a multiple of this, for products that the tensor cores take in whole.
RANK_STEP = 16
FLOAT8_RANK_STEP = 128
# Layers that are a product and nothing else: not those that hold quantised weights, say.
_PLAIN = (nn.Linear.forward, PointwiseConv.forward)


def empty_with_room(
    shape: Sequence[int], room: int, like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """An empty tensor of `shape` whose rows have room for `room` more elements."""
    wide = like.new_empty(*shape[:-1], shape[-1] + room, dtype=dtype)
    return wide[..., : shape[-1]]


def with_room(x: Tensor, room: int) -> Tensor:
    """x (…, C) as rows (M, C + room): where x lies, if it was made by `empty_with_room`, else a copy."""
    rows = x.flatten(0, -2)
    width = rows.shape[1] + room
    if rows.stride() == (width, 1):
        return rows.as_strided((len(rows), width), (width, 1))
    wide = rows.new_empty(len(rows), width)
    wide[:, : rows.shape[1]] = rows
    return wide


@dataclass(frozen=True)
class LowRank:
    """One LoRA of one layer: weight + scale · b · a."""

    a: nn.Parameter
    """(rank, in)."""
    b: nn.Parameter
    """(out, rank)."""
    scale: float
    rows: slice
    """Where the layer's outputs lie among the projection's."""
    ranks: slice
    """Where its rank lies among the projection's."""


Copy = tuple[Tensor, Tensor, float, Tensor | None]
"""A LoRA's parameter, its place among weights, the factor and the scales to multiply it with and divide it by."""


class Projection:
    """The layers' weights, which move into one 16-bit tensor of which the layers' own become views."""

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype, *, float8: bool = False):
        bases = [base_layer(layer) for layer in layers]
        self.inputs = bases[0].in_features
        self.outputs = sum(base.out_features for base in bases)
        self.low_rank = list(_low_rank(layers))
        rank = self.low_rank[-1].ranks.stop if self.low_rank else 0
        step = FLOAT8_RANK_STEP if float8 else RANK_STEP
        self.rank = -(-rank // step) * step
        device = bases[0].weight.device
        self.weight = torch.zeros(
            self.outputs + self.rank, self.inputs + self.rank, dtype=dtype, device=device
        )
        self.bias = (
            torch.zeros(self.outputs, dtype=dtype, device=device) if bases[0].bias is not None else None
        )
        start = 0
        for base in bases:
            stop = start + base.out_features
            own = self.weight[start:stop, : self.inputs]
            own.copy_(base.weight.detach().view_as(own))
            base.weight.data = own.view(*own.shape, *base.weight.shape[2:])
            if base.bias is not None:
                assert self.bias is not None  # layers that read one input all have a bias, or none
                self.bias[start:stop] = base.bias.detach()
                base.bias.data = self.bias[start:stop]
            start = stop
        self.float8 = Float8Weights(self.weight, self.outputs, self.inputs) if float8 else None

    @property
    def down(self) -> Tensor:
        """The LoRAs' first matrices, (R, K)."""
        return self.weight[self.outputs :, : self.inputs]

    @property
    def up(self) -> Tensor:
        """Their second ones with their scales, (N, R)."""
        return self.weight[: self.outputs, self.inputs :]

    def copies(self) -> Iterable[Copy]:
        """What a step begins with."""
        for lora in self.low_rank:
            yield lora.a, self.down[lora.ranks], 1.0, None
            yield lora.b, self.up[lora.rows, lora.ranks], lora.scale, None
            if self.float8 is not None:
                yield self.float8.copy_of_first(lora)
                yield self.float8.copy_of_second(lora)

    def __call__(self, x: Tensor) -> Tensor:
        """(…, K) → (…, N)."""
        return _Project.apply(x, self, *(p for lora in self.low_rank for p in (lora.a, lora.b)))

    def product(self, x: Tensor) -> Tensor:
        """Rows (M, K + R) → (M, N)."""
        if self.float8 is not None:
            return self.float8.product(x, self.bias)
        weight = self.weight[: self.outputs].t()
        return x @ weight if self.bias is None else torch.addmm(self.bias, x, weight)

    def transposed_product(self, grad: Tensor, out: Tensor) -> None:
        """Gradients (M, N + R) → (M, K), into `out`."""
        if self.float8 is not None:
            self.float8.transposed_product(grad, out)
        else:
            torch.mm(grad, self.weight[:, : self.inputs], out=out)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, projection: Projection, *parameters: Tensor) -> Tensor:
        ctx.projection = projection
        ctx.shape, ctx.dtype = x.shape, x.dtype
        x = x.to(projection.weight.dtype)
        rows = with_room(x, projection.rank)
        if projection.rank:
            k = projection.inputs
            torch.mm(rows[:, :k], projection.down.t(), out=rows[:, k:])
            ctx.save_for_backward(rows)
        return projection.product(rows).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        projection, k, n = ctx.projection, ctx.projection.inputs, ctx.projection.outputs
        grads = with_room(out_grad, projection.rank)
        parameter_grads = []
        if projection.rank:
            (rows,) = ctx.saved_tensors
            torch.mm(grads[:, :n], projection.up, out=grads[:, n:])
            down_grad = _sum_of_products(grads[:, n:], rows[:, :k])
            up_grad = _sum_of_products(grads[:, :n], rows[:, k:])
            for lora in projection.low_rank:
                parameter_grads.append(down_grad[lora.ranks].to(lora.a.dtype))
                parameter_grads.append((up_grad[lora.rows, lora.ranks] * lora.scale).to(lora.b.dtype))
        if not ctx.needs_input_grad[0]:
            return None, None, *parameter_grads
        x_grad = grads.new_empty(len(grads), k)
        projection.transposed_product(grads, x_grad)
        return x_grad.view(ctx.shape).to(ctx.dtype), None, *parameter_grads


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ · right, summed over the rows and kept in float32."""
    if left.is_cuda:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return left.t().float() @ right.float()


class Float8Weights:
    """A projection's weights in float8 (e4m3; Micikevicius et al., 2022), twice: scaled by output, and by input.

    A row of what is multiplied with them has a scale of its own, its largest element's. The LoRAs' part, which changes
    with every step, is quantised with the frozen rows' scales: float8 is as fine for small numbers as for large ones.
    """

    def __init__(self, weight: Tensor, outputs: int, inputs: int):
        """Of weights (N + R, K + R)."""
        self.outputs, self.inputs = outputs, inputs
        self.by_output, self.output_scales = kernels.quantise_rows(weight[:outputs])
        self.by_input, self.input_scales = kernels.quantise_rows(weight[:, :inputs].t().contiguous())

    def copy_of_first(self, lora: LowRank) -> Copy:
        """Where a LoRA's first matrix goes."""
        ranks = slice(self.outputs + lora.ranks.start, self.outputs + lora.ranks.stop)
        return lora.a, self.by_input[:, ranks].t(), 1.0, self.input_scales.t()

    def copy_of_second(self, lora: LowRank) -> Copy:
        """Where its second one goes."""
        ranks = slice(self.inputs + lora.ranks.start, self.inputs + lora.ranks.stop)
        return lora.b, self.by_output[lora.rows, ranks], lora.scale, self.output_scales[lora.rows]

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (M, K + R) → (M, N)."""
        return _float8_product(x, self.by_output, self.output_scales, bias, None)

    def transposed_product(self, grad: Tensor, out: Tensor) -> None:
        """Gradients (M, N + R) → (M, K), into `out`."""
        _float8_product(grad, self.by_input, self.input_scales, None, out)


def _float8_product(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor | None
) -> Tensor:
    rows, row_scales = kernels.quantise_rows(x)
    return torch._scaled_mm(
        rows,
        weight.t(),
        scale_a=row_scales,
        scale_b=scales.t(),
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=True,
        out=out,
    )


class Separately:
    """Layers that are trained themselves, or whose LoRA is more than a product: each as it is."""

    rank = 0

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = layers

    def copies(self) -> Iterable[Copy]:
        """Nothing."""
        return ()

    def __call__(self, x: Tensor) -> Tensor:
        """(…, K) → (…, N)."""
        if len(self.layers) == 1:
            return self.layers[0](x)
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


def project_together(
    layers: Sequence[nn.Module], dtype: torch.dtype, *, float8: bool
) -> Projection | Separately:
    """One product where all layers are frozen, and their LoRAs, if any, are plain ones without dropout."""
    if all(_is_product(layer) for layer in layers):
        return Projection(layers, dtype, float8=float8)
    return Separately(layers)


def base_layer(layer: Any) -> nn.Linear:
    """The linear layer below a LoRA, or the layer itself."""
    return getattr(layer, "base_layer", layer)


def _is_product(layer: Any) -> bool:
    base = base_layer(layer)
    if any(p.requires_grad for p in base.parameters()) or type(base).forward not in _PLAIN:
        return False
    return all(
        not layer.use_dora.get(name)
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
        for name in _adapters(layer)
    )


def _adapters(layer: Any) -> list[str]:
    """Names of peft's LoRAs that are active on the layer."""
    return [name for name in getattr(layer, "active_adapters", ()) if name in layer.lora_A]


def _low_rank(layers: Sequence[Any]) -> Iterable[LowRank]:
    row = rank = 0
    for layer in layers:
        outputs = slice(row, row + base_layer(layer).out_features)
        for name in _adapters(layer):
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            ranks = slice(rank, rank + a.shape[0])
            yield LowRank(a, b, layer.scaling[name], outputs, ranks)
            rank = ranks.stop
        row = outputs.stop


class Refresh:
    """Brings what the optimizer has made of the LoRAs into the weights, in one launch for each dtype."""

    def __init__(self, projections: Iterable[Projection | Separately]):
        self.copies = [copy for projection in projections for copy in projection.copies()]
        self.addresses: list[int] = []
        self.tables: list[kernels.CopyTable] = []

    @torch.no_grad()
    def __call__(self) -> None:
        """Before every forward pass."""
        if self.copies and self.copies[0][0].is_cuda:
            addresses = [parameter.data_ptr() for parameter, *_ in self.copies]
            if addresses != self.addresses:
                self.tables, self.addresses = self._tables(), addresses
            for table in self.tables:
                table.run()
        else:
            for parameter, place, factor, scales in self.copies:
                value = parameter * factor
                place.copy_(value if scales is None else value / scales)

    def _tables(self) -> list[kernels.CopyTable]:
        by_dtype: dict[torch.dtype, list[Copy]] = {}
        for copy in self.copies:
            by_dtype.setdefault(copy[1].dtype, []).append(copy)
        return [kernels.CopyTable(copies) for copies in by_dtype.values()]
