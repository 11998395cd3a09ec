"""Found cases stay mended, and `make fuzz` looks for more: each reader in a process with limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.readers import READERS

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).with_name("corpus")
SECONDS = float(os.environ.get("FUZZ_SECONDS", "300"))
"""Of all readers together."""


def child(*arguments: object, seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz.child", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
    )


def test_every_found_case_is_read_or_refused_as_promised():
    ended = child("corpus", "all", CORPUS, seconds=120)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-1000:]
    assert ended.stdout.count(" 0 findings") == len(READERS)


@pytest.mark.fuzz
@pytest.mark.timeout(900)
@pytest.mark.parametrize("reader", READERS)
def test_no_changed_file_is_a_finding(reader, tmp_path):
    """What is found is in the test's folder; a case of it belongs into `corpus/READER/`."""
    share = SECONDS / len(READERS)
    ended = child("fuzz", reader, share, tmp_path, seconds=share + 120)
    print(ended.stdout)
    assert ended.returncode == 0, f"{ended.stdout[-3000:]}{ended.stderr[-500:]}\nfiles: {tmp_path}"
