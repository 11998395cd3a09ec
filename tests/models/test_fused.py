"""The blocks in few passes give the losses and gradients of the plain ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from acestep_ray.models.projection import empty_with_room, with_room


def test_every_fused_block_has_the_losses_and_gradients_of_the_plain_one():
    """In Triton's interpreter, which needs no GPU but its own process."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "tests.models.fused_cases"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    errors = json.loads(run.stdout.splitlines()[-1])
    assert len(errors) == 10
    # Float32 sums in another order.
    assert not {name: error for name, error in errors.items() if not error < 1e-4}


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
