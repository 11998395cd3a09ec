"""The SSL loss in one pass over the features gives the numbers of the plain function."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Rows of a gradient that end in the same bits or the next ones.
BOUNDS = {"of float32": 1e-6, "of float16": 2e-3, "of bfloat16": 1e-2}


def test_the_fused_ssl_loss_and_its_gradient_are_those_of_the_plain_one():
    """In Triton's interpreter, which needs no GPU but its own process."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "tests.diffusion.fused_objective_cases"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    errors = json.loads(run.stdout.splitlines()[-1])
    assert len(errors) == 25
    past_the_end = {name for name, error in errors.items() if "past the end" in name and error != 0}
    assert not past_the_end
    wrong = {
        name: error
        for name, error in errors.items()
        if not error < next(bound for dtype, bound in BOUNDS.items() if name.endswith(dtype))
    }
    assert not wrong
