from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from acestep_ray.doctor import gpu as gpu_module
from acestep_ray.doctor.gpu import Gpu, GpuFacts, check_fast_path, check_gpus, check_torch, look_at_gpus
from acestep_ray.models.fusing import why_not_fused

H100 = Gpu("NVIDIA H100 80GB HBM3", 85 * 10**9, (9, 0))
V100 = Gpu("Tesla V100", 16 * 10**9, (7, 0))
GOOD = GpuFacts("2.11.0", "12.8", ("sm_80", "sm_90", "compute_90"), (12, 8), (H100,), "")
CPU_BUILD = replace(GOOD, torch_cuda=None, gpus=(), architectures=())


def test_a_torch_that_the_driver_runs_is_right():
    assert check_torch(GOOD).level == "ok"
    assert check_torch(replace(GOOD, driver_cuda=(12, 2))).level == "ok"
    assert check_torch(replace(CPU_BUILD, driver_cuda=None)).level == "ok"


def test_a_driver_too_old_for_torch_is_a_problem():
    finding = check_torch(replace(GOOD, torch_cuda="13.0"))
    assert finding.level == "problem"
    assert "CUDA 13.0" in finding.found
    assert "the driver runs CUDA 12.8" in finding.found


def test_a_torch_for_cpus_beside_a_gpu_is_a_problem():
    finding = check_torch(CPU_BUILD)
    assert finding.level == "problem"
    assert "CUDA 12.8 or older" in finding.remedy


def test_each_gpu_is_a_line_with_its_memory_and_capability():
    (finding,) = check_gpus(GOOD)
    assert finding.level == "ok"
    assert finding.found == "0: NVIDIA H100 80GB HBM3, 85 GB, compute capability 9.0"


def test_a_gpu_that_torch_is_not_built_for_is_a_problem():
    first, second = check_gpus(replace(GOOD, gpus=(H100, V100)))
    assert (first.level, second.level) == ("ok", "problem")
    assert "sm_80, sm_90, compute_90" in second.found


@pytest.mark.parametrize(
    ("capability", "architectures", "level"),
    [
        ((8, 6), ("sm_80",), "ok"),
        ((8, 0), ("sm_86",), "problem"),
        ((9, 0), ("sm_80",), "problem"),
        ((12, 0), ("sm_80", "compute_90"), "ok"),
        ((9, 0), ("sm_90a",), "ok"),
        ((10, 0), ("sm_100",), "ok"),
    ],
)
def test_code_of_a_generation_runs_on_its_later_gpus_and_text_on_all(capability, architectures, level):
    (finding,) = check_gpus(
        replace(GOOD, gpus=(replace(H100, capability=capability),), architectures=architectures)
    )
    assert finding.level == level


def test_a_small_gpu_is_told_what_fits_it():
    (finding,) = check_gpus(replace(GOOD, gpus=(replace(H100, memory=8 * 10**9),)))
    assert finding.level == "warning"
    assert "--quantize_base nf4" in finding.remedy


def test_no_gpu_is_a_warning_and_one_that_torch_cannot_use_a_problem():
    (absent,) = check_gpus(replace(GOOD, gpus=(), driver_cuda=None))
    assert absent.level == "warning"
    (hidden,) = check_gpus(replace(GOOD, gpus=(), error="no CUDA-capable device is detected"))
    assert hidden.level == "problem"
    assert "no CUDA-capable device is detected" in hidden.found


def test_the_fast_path_is_told_once_for_each_kind_of_gpu_with_the_reason(monkeypatch):
    def why(head_size, device):
        if device.index == 1:
            warnings.warn("Triton compiles nothing here (no gcc)", stacklevel=2)
            return "Triton compiles nothing here"
        return None

    monkeypatch.setattr(gpu_module, "why_not_fused", why)
    taken, not_taken = check_fast_path(replace(GOOD, gpus=(H100, V100, H100)), 128)
    assert (taken.level, not_taken.level) == ("ok", "warning")
    assert "not taken on Tesla V100: Triton compiles nothing here (no gcc)" in not_taken.found


def test_the_reason_against_the_fast_path_is_the_first_that_holds(monkeypatch):
    assert "96 wide" in why_not_fused(96, torch.device("cpu"))
    assert "256 wide" in why_not_fused(256, torch.device("cpu"))
    assert why_not_fused(128, torch.device("cpu")) == "it runs on a CPU"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability is 7.5" in why_not_fused(128, torch.device("cuda", 0))


def test_what_torch_says_here_is_what_is_found():
    facts = look_at_gpus()
    assert facts.torch == torch.__version__
    assert len(facts.gpus) == torch.cuda.device_count()
