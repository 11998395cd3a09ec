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
ATTENTION = {
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


@pytest.mark.parametrize("name", ATTENTION)
def test_linear_attention_fits_the_shared_memory_of_a_consumer_gpu(name):
    """Compiled for one with 99 KB a block, as those with 24 GB have; the A100 and the H100 have more."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from acestep_ray.models import linear_attention_kernels

    kernel = getattr(linear_attention_kernels, name)
    constants = {
        "HEADS": 20,
        "D": 128,
        "CHUNK": 512,
        "ROWS": linear_attention_kernels._ROWS,
        "PRECISION": "tf32",
    }
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = (
        dict.fromkeys(kernel.arg_names, "i32") | ATTENTION[name] | dict.fromkeys(constants, "constexpr")
    )
    places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 86, 32), options={"num_warps": linear_attention_kernels._WARPS}
    )
    assert compiled.metadata.shared <= 99 * 1024


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
