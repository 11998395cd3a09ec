"""Sound, pictures, the folder of a run, and a browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from matplotlib.figure import Figure
from safetensors.torch import save

from acestep_ray.config import TrainConfig
from acestep_ray.storage import Store
from acestep_ray.tracking import Tracker
from acestep_ray.training.experiment import note_identity, run_identity
from acestep_ray.training.lora_config import DEFAULT_LORA
from acestep_ray.training.state import Checkpoints, Snapshot, TrainingState
from tests.browser import open_browser
from tests.cache.rows import reject, song_row, write_rows


@pytest.fixture(scope="module")
def browser():
    with open_browser() as found:
        yield found


@pytest.fixture(scope="session")
def write_sound() -> Callable[..., Path]:
    """Writes a tone as a sound file; returns its path."""

    def write(path: Path, seconds: float = 1.0, *, rate: int = 48000, channels: int = 2) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
        soundfile.write(path, np.tile(tone[:, None], channels), rate)
        return path

    return write


@pytest.fixture(scope="session")
def draw() -> Callable[..., Figure]:
    """Draws noise as a curve of so many points."""

    def drawn(points: int = 100) -> Figure:
        figure = Figure(figsize=(4, 2))
        axes = figure.subplots()
        axes.plot(np.random.default_rng(0).normal(size=points), label="a <b>curve</b>")
        axes.legend()
        return figure

    return drawn


def lora_bytes() -> bytes:
    """A LoRA of two blocks."""
    tensors = {}
    for block in (0, 1):
        name = f"transformer_blocks.{block}.attn.to_q"
        tensors[f"{name}.lora_A.weight"] = torch.full((2, 8), 0.5)
        tensors[f"{name}.lora_B.weight"] = torch.full((8, 2), 0.5)
    return save(tensors)


@pytest.fixture
def write_run(tmp_path, write_sound) -> Callable[..., Path]:
    """Writes the folder of a run with logs, checkpoints, a sample and a cache; returns it."""

    def write(root: Path = tmp_path, *, steps: int = 40, **settings: Any) -> Path:
        experiment, logs = root / "exps" / "my_run", root / "exps" / "logs"
        rows = [song_row("a", frames=3600), song_row("b", frames=1200)]
        cache = write_rows(Store.at(root / "cache"), rows, [reject("broken <song>")])
        config = TrainConfig(
            **{
                "dataset_path": cache.url,
                "checkpoint_dir": str(root / "nowhere"),
                "lora_config_path": "lora_config.json",
                "exp_name": "my_run",
                "logger_dir": str(logs),
                "max_steps": 40,
                "learning_rate": 3e-4,
                **settings,
            }
        )
        write_log(logs / "my_run", steps)
        checkpoints = Checkpoints(Store.at(experiment / "checkpoints"))
        losses: dict[str, Any] = {"fixed_noise": {}, "validation": {}}
        for step in range(0, steps + 1, 20):
            losses["fixed_noise"][str(step)] = 2.0 - step / 100
            losses["validation"][str(step)] = 2.1 - step / 200
            losses["measured"] = {str(step): {"loss/fixed_noise/q1": 3.0 - step / 100}}
            if step:
                snapshot = Snapshot({}, {}, {"pytorch_lora_weights.safetensors": lora_bytes()})
                checkpoints.save(snapshot, TrainingState(step, losses))
        checkpoints.finish()
        (experiment / "train.yaml").write_text(yaml.safe_dump(asdict(config)), encoding="utf-8")
        note_identity(experiment, run_identity(config, DEFAULT_LORA, songs="s", transformer="t"))
        sound = write_sound(experiment / "samples" / "step=40" / "a.wav")
        picture = Figure(figsize=(3, 1))
        picture.subplots().plot([0, 1])
        picture.savefig(sound.with_suffix(".png"))
        made_from = {"key": "a", "prompt": "<script>soft</script> piano", "lyrics": [5, 6, 7], "seed": 11}
        sound.with_suffix(".json").write_text(json.dumps(made_from), encoding="utf-8")
        return experiment

    return write


def write_log(folder: Path, steps: int) -> None:
    """What training tells TensorBoard."""
    tracker = Tracker(folder, None)
    metrics = {
        step: {
            "loss": 3.0 - step / 50,
            "loss/denoising": 2.0 - step / 50,
            "learning_rate": 1e-4,
            "grad_norm": 1.0 + step % 3,
        }
        for step in range(steps)
    }
    metrics[steps - 1] |= {"throughput/audio_seconds_per_second": 4158.0, "throughput/data_wait": 0.02}
    tracker.log(metrics)
    for step in range(0, steps + 1, 20):
        quarters = {f"loss/fixed_noise/q{quarter}": 4.0 - quarter - step / 100 for quarter in range(1, 5)}
        tracker.log({step: {"loss/fixed_noise": 2.0 - step / 100, **quarters}})
        tracker.log({step: {"loss/validation": 2.1 - step / 200}})
    tracker.close()
