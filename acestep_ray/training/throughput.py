"""How fast a run is, and how much of the GPUs' arithmetic it uses."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator

import psutil
import torch
from torch import Tensor

from acestep_ray.models.codec import MEL_FRAMES_PER_LATENT
from acestep_ray.models.mel import HOP_LENGTH, MEL_SAMPLE_RATE

TIMES_REAL_TIME = "throughput/audio_seconds_per_second"
# Dense bfloat16 products with float32 sums, as NVIDIA's data sheets have them (float16 for V100 and T4, which have no
# bfloat16). A key's words are all in the name of the device; the key with the most words counts.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H800": 989.0,
    "H800 PCIe": 756.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 150.0,
    "A30": 165.0,
    "A10": 125.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "V100": 125.0,
    "V100 PCIe": 112.0,
    "T4": 65.0,
    "RTX A6000": 155.0,
    "RTX 6000 Ada": 364.0,
    "RTX 5090": 209.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
# Slices and variants of these chips, which have other figures: MIG, laptops, Max-Q, 4090 D, 3090 Ti.
_OTHERS = {"mig", "laptop", "max", "d", "ti"}


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that `device` can do at most; None for a CPU and for a chip that is not in the table."""
    return None if device.type != "cuda" else named_peak_flops(torch.cuda.get_device_name(device))


def named_peak_flops(name: str) -> float | None:
    """`peak_flops` of the device that CUDA calls `name`, such as "NVIDIA A100-SXM4-80GB"."""
    words = _words(name)
    keys = [key for key in PEAK_TFLOPS if _words(key) <= words]
    if not keys or words & _OTHERS:
        return None
    return PEAK_TFLOPS[max(keys, key=lambda key: len(_words(key)))] * 1e12


def _words(name: str) -> set[str]:
    return set(re.split(r"[\s-]+", name.lower()))


def seconds_of(frames: int) -> float:
    """Seconds of audio in latent `frames`."""
    return frames * MEL_FRAMES_PER_LATENT * HOP_LENGTH / MEL_SAMPLE_RATE


class Throughput:
    """Rates of a run between two calls of `metrics`; nothing but that call waits for the GPU.

    The clock starts when the first `data_wait` ends, with the first batch at hand: what comes before the first step,
    its wait for songs with it, is left out after every start or resume. Pauses are left out everywhere.
    """

    def __init__(
        self,
        device: torch.device,
        workers: int,
        *,
        peak: float | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`peak` is the most operations a second of one worker's device, as `peak_flops` gives it."""
        self.device = device
        self.peak = None if peak is None else peak * workers
        self.clock = clock
        self.running = False
        self.flops: float | Tensor = 0.0
        self._begin()

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Around the reading of a step's batches. The first starts the clock."""
        began = self.clock()
        yield
        if self.running:
            self.waited += self.clock() - began
        else:
            self.running = True
            self._begin()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around validation, samples and checkpoints, between steps. Call `metrics` first: the GPU may lag behind."""
        began = self.clock()
        try:
            yield
        finally:
            self.pauses += self.clock() - began

    def step(self, songs: int, audio_seconds: float, flops: float | Tensor) -> None:
        """Count one step of all workers; operations on a device, a sum over the workers, are read by `metrics`."""
        self.steps += 1
        self.songs += songs
        self.audio_seconds += audio_seconds
        self.flops = self.flops + flops

    def metrics(self, bytes_of_graphs: int = 0) -> dict[str, float]:
        """The figures by name since the last call; empty if there was no step.

        Call it where the steps are known to be done, after their losses were read from the device. Rates are those of
        all workers; audio seconds a second are "times real time"; MFU is the share of the peak of bfloat16, whatever
        the precision, and is left out where the peak is unknown. The share of time spent waiting for data, and memory
        (1e9 bytes), with `bytes_of_graphs` that are counted as nobody's, are this worker's.
        """
        if not self.steps:
            return {}
        elapsed = self.clock() - self.since - self.pauses
        flops = float(self.flops) / elapsed
        figures = {
            "throughput/steps_per_second": self.steps / elapsed,
            "throughput/songs_per_second": self.songs / elapsed,
            TIMES_REAL_TIME: self.audio_seconds / elapsed,
            "throughput/tflops": flops / 1e12,
            "throughput/data_wait": self.waited / elapsed,
            "memory/allocated_gb": (peak_memory(self.device) + bytes_of_graphs) / 1e9,
        }
        if self.peak is not None:
            figures["throughput/mfu"] = flops / self.peak
        self._begin()
        return figures

    def _begin(self) -> None:
        self.since = self.clock()
        self.steps = self.songs = 0
        self.audio_seconds = self.waited = self.pauses = 0.0
        self.flops = 0.0


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors took on a GPU since the last call; on a CPU, what the process holds now."""
    if device.type != "cuda":
        return psutil.Process().memory_info().rss
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return most
