"""What the measurements of the frozen encoders note, check and time things with."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from acestep_ray.models import kernels

# Bounds of the relative (Frobenius) error against float32, by dtype of what is stored.
BOUNDS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


class Report:
    """What was found, printed as it comes and kept for the table and the JSON file."""

    def __init__(self, device: torch.device):
        self.device = device
        self.rows: list[dict] = []
        self.checks: list[dict] = []
        self.failures: list[str] = []
        self.started = time.perf_counter()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """One failure does not lose the rest."""
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                yield
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            print(f"FAILED {name}")
            traceback.print_exc(limit=-6)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"[{time.perf_counter() - self.started:5.1f} s] {name}: {time.perf_counter() - started:.1f} s")

    def check(self, name: str, error: float, bound: float) -> None:
        passed = error <= bound  # False for NaN
        self.checks.append({"name": name, "error": error, "bound": bound, "passed": passed})
        if not passed:
            self.failures.append(f"{name}: error {error:.2e} over {bound:.0e}")
        print(f"  {'ok  ' if passed else 'WRONG'} {name}: {error:.2e}")

    def time(self, name: str, function: Callable, *arguments, repeats: int = 7) -> float:
        """Median milliseconds of a call, the first and a second apart."""
        started = time.perf_counter()
        function(*arguments)
        self.synchronize()
        first = time.perf_counter() - started
        function(*arguments)
        self.synchronize()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            function(*arguments)
            self.synchronize()
            times.append((time.perf_counter() - started) * 1000)
        median = sorted(times)[len(times) // 2]
        row = {"name": name, "ms": round(median, 3), "first_s": round(first, 2)}
        if self.device.type == "cuda":
            row["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        self.rows.append(row)
        return median

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm()).item()


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Without Triton."""
    chosen = kernels.runs_triton
    kernels.runs_triton = lambda x: False
    try:
        yield
    finally:
        kernels.runs_triton = chosen
