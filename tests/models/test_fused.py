"""The blocks in few passes give the losses and gradients of the plain ones."""

from __future__ import annotations

import pytest
import torch

from acestep_ray.models.projection import empty_with_room, with_room
from tests.interpreted import run_interpreted


def test_every_fused_block_has_the_losses_and_gradients_of_the_plain_one():
    errors = run_interpreted("tests.models.fused_cases")
    assert len(errors) == 10
    # Float32 sums in another order.
    assert not {name: error for name, error in errors.items() if not error < 1e-4}


BF16, F32, I32 = "*bf16", "*fp32", "*i32"
LINEAR_ATTENTION = {
    "_state_kernel": {"qkv": BF16, "lengths": I32, "state": F32},
    "_apply_kernel": {"qkv": BF16, "sums": BF16, "norms": F32, "out": BF16},
    "_query_backward_kernel": {
        "qkv": BF16, "sums": BF16, "norms": F32, "out_grad": BF16, "qkv_grad": BF16, "factors": F32,
    },
    "_state_backward_kernel": {"qkv": BF16, "out_grad": BF16, "factors": F32, "state_grad": F32},
    "_key_backward_kernel": {
        "qkv": BF16, "lengths": I32, "sums_grad": BF16, "norms_grad": F32, "qkv_grad": BF16,
    },
}  # fmt: skip
CROSS_ATTENTION_INPUTS = {
    "query": BF16, "keys_values": BF16, "cos": F32, "sin": F32, "lengths": I32, "counts": I32, "sums": F32,
    "factor": "fp32",
}  # fmt: skip
CROSS_ATTENTION_GRADIENTS = {"out_grad": BF16, "products": F32, "scale": "fp32"}
CROSS_ATTENTION = {
    "_forward_kernel": ("forward", {"out": BF16}),
    "_query_gradient_kernel": ("queries", {"out": BF16, "query_grad": BF16} | CROSS_ATTENTION_GRADIENTS),
    "_key_gradient_kernel": ("keys", {"grads": BF16} | CROSS_ATTENTION_GRADIENTS),
}


def shared_memory(kernel, types: dict[str, str], constants: dict[str, object], **options: int) -> int:
    """Bytes of a block, compiled for a GPU with 99 KB, as those with 24 GB have; A100 and H100 have more."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    return triton.compile(source, target=GPUTarget("cuda", 86, 32), options=options).metadata.shared


@pytest.mark.parametrize("name", LINEAR_ATTENTION)
def test_linear_attention_fits_the_shared_memory_of_a_consumer_gpu(name):
    pytest.importorskip("triton")
    from acestep_ray.models import linear_attention_kernels as kernels

    constants = {"HEADS": 20, "D": 128, "CHUNK": 512, "ROWS": kernels._ROWS, "PRECISION": "tf32"}
    used = shared_memory(getattr(kernels, name), LINEAR_ATTENTION[name], constants, num_warps=kernels._WARPS)
    assert used <= 99 * 1024


@pytest.mark.parametrize("name", CROSS_ATTENTION)
def test_cross_attention_fits_the_shared_memory_of_a_consumer_gpu(name):
    pytest.importorskip("triton")
    from acestep_ray.models import cross_attention_kernels as kernels

    part, types = CROSS_ATTENTION[name]
    kernel, tile = getattr(kernels, name), getattr(kernels._TILES_16_BITS, part)
    types = {key: value for key, value in (CROSS_ATTENTION_INPUTS | types).items() if key in kernel.arg_names}
    constants = {"HEADS": 20, "D": 128, "FRAMES": tile.frames, "TOKENS": tile.tokens, "PRECISION": "tf32"}
    used = shared_memory(kernel, types, constants, num_warps=tile.warps, num_stages=tile.stages)
    assert used <= 99 * 1024


def test_rows_with_room_are_found_again_and_others_are_copied():
    x = empty_with_room((2, 3, 5), 4, torch.zeros(0))
    x.copy_(torch.randn(2, 3, 5))
    wide = with_room(x, 4)
    assert wide.shape == (6, 9)
    assert wide.data_ptr() == x.data_ptr()
    torch.testing.assert_close(wide[:, :5], x.flatten(0, 1))

    plain = torch.randn(2, 3, 5)
    wide = with_room(plain, 4)
    assert wide.shape == (6, 9)
    assert wide.data_ptr() != plain.data_ptr()
    torch.testing.assert_close(wide[:, :5], plain.flatten(0, 1))
