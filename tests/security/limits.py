"""A command in a process of its own, with limits of its memory and its time."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_CHILD = """
import resource, sys
memory, seconds = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
from acestep_ray.cli import main
import acestep_ray.reporting.samples, acestep_ray.reporting.job, PIL.Image, matplotlib.figure, soundfile, soxr, torch
acestep_ray.reporting.samples.CLIPS = int(sys.argv[3])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = main(sys.argv[4:])
print("took MB:", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
sys.exit(code)
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    """What it wrote, errors too."""
    megabytes: int | None
    """Memory that it took beyond its imports; None where it was ended."""


def run_limited(*arguments: object, megabytes: int = 1024, seconds: int = 60, clips: int = 12) -> Ended:
    """Run `acestep-ray` with limits of its memory, its imports left out, and of its CPU's time; a page has `clips`."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(megabytes << 20), str(seconds), str(clips), *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=2 * seconds + 60,
        check=False,
    )
    taken = [line for line in done.stdout.splitlines() if line.startswith("took MB: ")]
    return Ended(done.returncode, done.stdout, int(taken[-1].split()[-1]) if taken else None)
