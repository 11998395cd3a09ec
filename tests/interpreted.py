"""Triton kernels without a GPU: in Triton's interpreter, which has to have a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run_interpreted(module: str) -> Any:
    """What `module` prints as its last line, in JSON."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", module],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])
