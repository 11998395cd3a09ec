from __future__ import annotations

import sys
import warnings

import pytest
import torch

from acestep_ray.models import kernels
from tests.interpreted import run_interpreted

BOUNDS = {"float32": 1e-6, "float16": 2e-3}


def test_every_triton_kernel_gives_the_numbers_of_plain_torch():
    errors = run_interpreted("tests.models.kernel_cases")
    assert len(errors) == 50
    wrong = {
        name: error
        for name, error in errors.items()
        if not error < next(bound for dtype, bound in BOUNDS.items() if dtype in name)
    }
    assert not wrong


def test_where_triton_cannot_compile_plain_torch_does_the_work_and_one_warning_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "acestep_ray.models.codec_kernels", None)  # its import fails
    kernels._compiles.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton compiles nothing here"):
            assert not kernels._compiles()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not kernels._compiles()
    finally:
        kernels._compiles.cache_clear()


def test_the_moments_of_a_filtered_wave_are_those_of_its_output():
    wave, taps = torch.randn(3, 4000) + 0.3, torch.randn(7, 10)
    patches = wave.unfold(1, 10, 5)
    output = patches @ taps.T
    mean, variance = kernels._filtered_moments(patches, taps)
    torch.testing.assert_close(mean, output.mean(dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variance, output.var(dim=1, correction=0), rtol=1e-4, atol=1e-5)
