"""The fused lyric encoder in Triton's interpreter against the plain one; run with TRITON_INTERPRET=1, prints JSON.

TRITON_INTERPRET=1 python -m tests.models.fused_lyric_cases
"""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor

from acestep_ray.models import lyric_kernels as kernels
from acestep_ray.models.dropout import counter_dropout
from acestep_ray.models.fused_lyrics import FusedLyricEncoder, fuse_lyric_encoder
from acestep_ray.models.lyric_encoder import (
    DROPOUT,
    POSITION_OFFSET,
    LyricEncoder,
    LyricEncoderConfig,
    relative_shift,
)
from acestep_ray.models.lyric_kernels import Draw

WIDTH, HEADS = 24, 2
# Valid tokens of each sample: none are dropped lyrics.
LENGTHS = [19, 0, 1, 7]
SEEDS = torch.tensor([3, -(1 << 62), 1 << 40, 0])


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def differing_masks() -> dict[str, int]:
    """Name → elements dropped by one of kernel and definition and kept by the other."""
    x = torch.ones(4, 11, 530)
    draw = Draw(SEEDS, 5)
    places = torch.arange(10, -1, -1) - 5 + POSITION_OFFSET
    found = {
        "rows in order": kernels.dropout_pass(x, None, torch.empty_like(x), draw),
        "positions": kernels.dropout_pass(
            x[0], None, torch.empty_like(x), draw, first_number=places[0].item(), number_step=-1
        ),
    }
    wanted = {
        "rows in order": counter_dropout(x, DROPOUT, SEEDS, 5, torch.arange(11)),
        "positions": counter_dropout(x, DROPOUT, SEEDS, 5, places),
    }
    added, _, _ = kernels.add_norm(torch.zeros(x.shape), x, draw, x[0, 0], x[0, 0], 1e-5, torch.float32)
    found["residual"], wanted["residual"] = added, wanted["rows in order"]
    uniform = torch.zeros(4 * 3, 11, 22)
    every_key = torch.ones(4, 11, dtype=torch.bool)
    _, found["attention"] = kernels.relative_softmax(
        uniform[..., :11].contiguous(), uniform, every_key, 3, 1.0, draw
    )
    wanted["attention"] = counter_dropout(
        torch.ones(4, 3, 11, 11), DROPOUT, SEEDS, 5, torch.arange(11)
    ).flatten(0, 1)
    return {name: ((found[name] == 0) != (wanted[name] == 0)).sum().item() for name in found}


def softmax_errors(length: int, positions: int, draw: Draw | None, dtype: torch.dtype) -> dict[str, float]:
    mask = torch.arange(length) < torch.tensor(LENGTHS)[:, None]
    shape = (len(LENGTHS), HEADS, length)
    content = torch.randn(*shape, length).to(dtype).requires_grad_()
    position = torch.randn(*shape, positions).to(dtype).requires_grad_()
    scale = 0.3
    scores = (content.float() + relative_shift(position[..., : 2 * length - 1].float())) * scale
    keys = mask[:, None, None]
    weights = scores.masked_fill(~keys, torch.finfo(torch.float32).min).softmax(dim=-1) * keys
    dropped = weights
    if draw is not None:
        dropped = counter_dropout(weights, DROPOUT, draw.seeds, draw.layer, torch.arange(length))
    out_grad = torch.randn_like(dropped).to(dtype)
    wanted = [weights, dropped, *torch.autograd.grad(dropped, (content, position), out_grad.float())]
    found = kernels.relative_softmax(
        content.detach().flatten(0, 1), position.detach().flatten(0, 1), mask, HEADS, scale, draw
    )
    found += kernels.relative_softmax_backward(
        found[0], out_grad.flatten(0, 1), positions, HEADS, scale, draw
    )
    names = ["weights", "dropped", "content's gradient", "position's gradient"]
    return {name: relative_error(f, w.flatten(0, 1)) for name, f, w in zip(names, found, wanted, strict=True)}


def random_encoder() -> LyricEncoder:
    encoder = LyricEncoder(WIDTH, LyricEncoderConfig(attention_heads=HEADS, linear_units=40, num_blocks=2))
    for name, parameter in encoder.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return encoder


def encoder_errors(length: int, seeds: Tensor | None, *, trained: str = "") -> dict[str, float]:
    """Of the output at valid tokens, and of every gradient; parameters whose names hold `trained` have one."""
    encoder = random_encoder()
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(trained in name)
    mask = torch.arange(length) < torch.tensor(LENGTHS)[:, None]
    x = torch.randn(len(LENGTHS), length, WIDTH)
    wanted = run(encoder, encoder, x, mask, seeds)
    fuse_lyric_encoder(encoder)
    assert isinstance(encoder.fused, FusedLyricEncoder)
    found = run(encoder.fused, encoder, x, mask, seeds)
    assert found.keys() == wanted.keys()
    return {
        name: relative_error(found[name], wanted[name])
        if wanted[name].norm() > 1e-3
        else (found[name] - wanted[name]).norm().item()  # a bias of keys changes nothing
        for name in found
    }


def run(encode, encoder: LyricEncoder, x: Tensor, mask: Tensor, seeds: Tensor | None) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    encoder.zero_grad()
    out = encode(x, mask, seeds)
    assert out.isfinite().all()
    valid = mask[..., None] * torch.linspace(-1, 1, WIDTH)
    (out * valid).square().sum().add((out * valid).sum()).backward()
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    return {"output": out.detach() * mask[..., None], "input": x.grad, **gradients}


def half_errors(length: int) -> dict[str, tuple[float, float]]:
    """Name → errors of the fused and of the plain encoder in float16 autocast."""
    encoder = random_encoder()
    mask = torch.arange(length) < torch.tensor(LENGTHS)[:, None]
    x = torch.randn(len(LENGTHS), length, WIDTH)
    exact = run(encoder, encoder, x, mask, SEEDS)
    with torch.autocast("cpu", torch.float16):
        plain = run(encoder, encoder, x, mask, SEEDS)
        fused = run(FusedLyricEncoder(encoder), encoder, x, mask, SEEDS)
    return {
        name: (relative_error(fused[name], exact[name]), relative_error(plain[name], exact[name]))
        for name in exact
        if exact[name].norm() > 1e-3  # a bias of keys changes nothing
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # what a kernel does not write is then NaN
    errors = {}
    for draw in (None, Draw(SEEDS, 9)):
        dropout = "no dropout" if draw is None else "dropout"
        for length, positions in ((1, 1), (1, 2), (19, 37), (19, 38), (70, 140)):
            # Longer than a block of rows once is enough.
            for dtype in (torch.float32,) if length > 32 else (torch.float32, torch.float16):
                for name, error in softmax_errors(length, positions, draw, dtype).items():
                    if not math.isnan(error):  # nothing but zeros, and zeros wanted
                        case = f"{name}, {length} tokens, {positions} positions, {dropout}, {str(dtype)[6:]}"
                        errors[case] = error
        for length in (1, 19):
            for name, error in encoder_errors(length, draw and SEEDS).items():
                errors[f"encoder, {name}, {length} tokens, {dropout}, float32"] = error
    for name, error in encoder_errors(19, SEEDS, trained="linear_q").items():
        errors[f"encoder with a few trained layers, {name}, float32"] = error
    print(json.dumps({"errors": errors, "differing masks": differing_masks(), "in 16 bits": half_errors(19)}))


if __name__ == "__main__":
    main()
