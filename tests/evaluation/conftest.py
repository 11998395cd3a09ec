"""A tiny checkpoint, a cache of three songs, and folders of audio."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from acestep_ray.config import EvaluateConfig
from tests.export.conftest import trained, write_run  # noqa: F401 (fixtures)
from tests.training.conftest import checkpoint, tiny_cache, write_tiny_cache  # noqa: F401 (fixtures)

RATE = 48_000


def tone(frequency: float, seconds: float, amplitude: float = 0.5) -> np.ndarray:
    """A sine on both channels, (2, n) at 48 kHz."""
    time = np.arange(round(seconds * RATE)) / RATE
    return np.tile(amplitude * np.sin(2 * np.pi * frequency * time), (2, 1)).astype(np.float32)


def noise(seconds: float, seed: int) -> np.ndarray:
    """Noise of a colour and a rhythm that are the seed's own, (2, n) at 48 kHz."""
    random = np.random.default_rng(seed)
    width = int(random.integers(2, 40))
    samples = np.convolve(random.standard_normal(round(seconds * RATE)), np.ones(width) / width, mode="same")
    time = np.arange(len(samples)) / RATE
    samples *= 0.3 * (1 + np.sin(2 * np.pi * random.uniform(0.5, 6) * time))
    return np.tile(samples.clip(-0.9, 0.9), (2, 1)).astype(np.float32)


@pytest.fixture
def write_songs(tmp_path) -> Callable[..., Path]:
    """Writes waves (2, n) by name as WAV files of a folder; returns it."""

    def write(folder: str, **songs: np.ndarray) -> Path:
        for name, wave in songs.items():
            path = tmp_path / folder / f"{name}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, wave.T, RATE)
        return tmp_path / folder

    return write


@pytest.fixture
def settings(tmp_path, checkpoint) -> Callable[..., EvaluateConfig]:  # noqa: F811
    """Settings of an evaluation on the CPU that is soon done, without MLflow."""

    def make(**changes) -> EvaluateConfig:
        values = {
            "checkpoint_dir": str(checkpoint.path),
            "output_dir": str(tmp_path / "out"),
            "logger_dir": str(tmp_path / "logs"),
            "tracking_uri": "none",
            "device": "cpu",
            "duration": 4.0,
            "infer_steps": 2,
        }
        return EvaluateConfig(
            **{**values, **{name: str(v) if isinstance(v, Path) else v for name, v in changes.items()}}
        )

    return make
