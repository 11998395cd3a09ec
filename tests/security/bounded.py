"""Child processes under limits of memory and time: what eats a machine ends the child, and the test fails."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


def run_bounded(
    arguments: list[str], *, memory: int = 6 * GIB, seconds: int = 100, **options
) -> subprocess.CompletedProcess[str]:
    """Run a Python program with these arguments under limits of its address space and its time."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        preexec_fn=limit,
        timeout=2 * seconds,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
        **options,
    )


def acestep(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """Run a command of the program under limits."""
    return run_bounded(["-m", "acestep_ray", *map(str, arguments)], **options)


_LIMITED = """
import resource, sys
import torch  # its libraries are mapped before the limit
{imports}
with open("/proc/self/status") as status:
    taken = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (taken + {memory}, taken + {memory}))
{code}
"""


def run(code: str, *arguments: object, imports: str = "", seconds: int = 30, memory: int = 1 << 30) -> str:
    """What `code` prints within this time and, besides its imports, memory; fails where it ends otherwise."""
    text = _LIMITED.format(imports=textwrap.dedent(imports), code=textwrap.dedent(code), memory=memory)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))

    ended = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=2 * seconds,
    )
    assert ended.returncode == 0, (ended.returncode, ended.stderr[-1500:])
    return ended.stdout
