"""The lyric encoder in few passes gives the numbers of the plain one, and drops the same elements."""

from __future__ import annotations

import pytest
import torch

from acestep_ray.models.lyric_encoder import LyricEncoder, LyricEncoderConfig
from tests.interpreted import run_interpreted

# Roundings of one pass, and of the whole encoder there and back.
BOUNDS = {"float32": 1e-6, "float16": 2e-3}
ENCODER_BOUND = 1e-5


@pytest.fixture(scope="module")
def found() -> dict:
    return run_interpreted("tests.models.fused_lyric_cases")


def test_every_pass_drops_the_elements_that_the_plain_encoder_drops(found):
    masks = found["differing masks"]
    assert masks == {"rows in order": 0, "positions": 0, "residual": 0, "attention": 0}


def test_values_and_gradients_are_those_of_the_plain_encoder_at_valid_tokens(found):
    errors = found["errors"]

    def bound(name: str) -> float:
        return ENCODER_BOUND if name.startswith("encoder") else BOUNDS[name.split(", ")[-1]]

    assert not {name: error for name, error in errors.items() if not error < bound(name)}
    for part in ("position's gradient", "dropped, 1 tokens", "pos_bias_u", "linear_pos", "norm_ff", "w_1"):
        assert any(part in name for name in errors), part


def test_in_autocast_it_is_no_worse_than_the_plain_encoder(found):
    fused, plain = (torch.tensor(errors) for errors in zip(*found["in 16 bits"].values(), strict=True))
    assert (fused < 3 * plain).all()
    assert fused.mean() < 1.2 * plain.mean()


def test_only_16_bit_work_on_a_gpu_leaves_the_plain_path():
    encoder = LyricEncoder(8, LyricEncoderConfig(attention_heads=2, linear_units=8, num_blocks=1))
    x, mask = torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool)
    wanted = encoder(x, mask)
    pytest.importorskip("triton")
    from acestep_ray.models.fused_lyrics import fuse_lyric_encoder

    fuse_lyric_encoder(encoder)
    assert torch.equal(encoder(x, mask), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert not encoder.fused.takes(x)
    assert not encoder.fused.takes(x.to(torch.float16))
