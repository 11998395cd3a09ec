"""Rates of a run, by a clock that the tests set."""

from __future__ import annotations

import pytest
import torch

from acestep_ray.training import throughput
from acestep_ray.training.throughput import Throughput, named_peak_flops, peak_flops, seconds_of

CPU = torch.device("cpu")


class Clock:
    """Stands still until it is told otherwise."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def measured(clock: Clock, workers: int = 1, peak: float | None = None) -> Throughput:
    return Throughput(CPU, workers, peak=peak, clock=clock)


def run_step(run: Throughput, clock: Clock, *, wait: float = 0.5, compute: float = 1.5, flops=4e12) -> None:
    with run.data_wait():
        clock.tick(wait)
    clock.tick(compute)
    run.step(songs=3, audio_seconds=240.0, flops=flops)


def test_rates_are_those_of_the_steps_since_the_last_call(clock):
    run = measured(clock)
    run_step(run, clock)
    run.metrics()
    for _ in range(10):
        run_step(run, clock)
    metrics = run.metrics()
    assert metrics.pop("memory/allocated_gb") > 0
    assert metrics == pytest.approx(
        {
            "throughput/steps_per_second": 0.5,
            "throughput/songs_per_second": 1.5,
            "throughput/audio_seconds_per_second": 120.0,
            "throughput/tflops": 2.0,
            "throughput/data_wait": 0.25,
        }
    )


def test_what_comes_before_the_first_step_does_not_count(clock):
    run = measured(clock)
    clock.tick(60)
    with run.paused():
        clock.tick(600)
    run_step(run, clock, wait=30.0, compute=1.0)
    run_step(run, clock, wait=1.0, compute=2.0)
    metrics = run.metrics()
    assert metrics["throughput/steps_per_second"] == pytest.approx(2 / 4)
    assert metrics["throughput/data_wait"] == pytest.approx(1 / 4)


def fail_in_a_pause(run: Throughput, clock: Clock) -> None:
    with run.paused():
        clock.tick(50)
        raise RuntimeError


def test_pauses_do_not_count_even_when_they_end_in_an_error(clock):
    run = measured(clock)
    run_step(run, clock, compute=2.0)
    with run.paused():
        clock.tick(100)
    with pytest.raises(RuntimeError):
        fail_in_a_pause(run, clock)
    assert run.metrics()["throughput/steps_per_second"] == pytest.approx(0.5)
    run_step(run, clock, wait=0.0, compute=4.0)
    assert run.metrics()["throughput/steps_per_second"] == pytest.approx(0.25)


def test_utilisation_is_a_share_of_the_peak_of_all_workers(clock):
    run = measured(clock, workers=4, peak=10e12)
    run_step(run, clock, wait=0.0, compute=2.0, flops=16e12)
    metrics = run.metrics()
    assert metrics["throughput/tflops"] == pytest.approx(8.0)
    assert metrics["throughput/mfu"] == pytest.approx(0.2)


def test_operations_may_be_a_tensor_that_is_read_with_the_metrics(clock):
    run = measured(clock)
    flops = torch.tensor(1e12)
    with run.data_wait():
        pass
    for _ in range(2):
        clock.tick(1)
        run.step(songs=1, audio_seconds=1.0, flops=flops)
    assert run.metrics()["throughput/tflops"] == pytest.approx(1.0)
    assert flops == torch.tensor(1e12)


def test_without_a_step_there_are_no_figures(clock):
    run = measured(clock)
    assert run.metrics() == {}
    run_step(run, clock)
    run.metrics()
    clock.tick(10)
    assert run.metrics() == {}


def test_the_time_since_the_last_figures_counts_though_there_was_no_step(clock):
    run = measured(clock)
    run_step(run, clock, compute=1.0)
    run.metrics()
    clock.tick(6)
    run.metrics()
    run_step(run, clock, wait=1.0, compute=3.0)
    assert run.metrics()["throughput/steps_per_second"] == pytest.approx(0.1)


def test_memory_of_a_gpu_is_the_most_since_the_last_figures(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: calls.append("read") or 5 * 10**9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    assert throughput.peak_memory(torch.device("cuda")) == 5 * 10**9
    assert calls == ["read", "reset"]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
    ],
)
def test_a_known_chip_has_the_peak_of_its_data_sheet(name, tflops):
    assert named_peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "Quadro RTX 6000",
        "NVIDIA GeForce GTX 1080",
        "",
    ],
)
def test_a_chip_that_is_not_in_the_table_has_no_peak(name):
    assert named_peak_flops(name) is None


def test_the_peak_of_a_device_goes_by_its_name_and_a_cpu_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert peak_flops(torch.device("cuda")) == 121e12
    assert peak_flops(CPU) is None


def test_2584_latent_frames_are_240_seconds():
    assert seconds_of(2584) == pytest.approx(240.0, abs=0.05)
