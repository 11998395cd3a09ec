"""A tiny checkpoint and a feature cache of three short songs, made without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from acestep_ray.cache.encoding import Encoder
from acestep_ray.cache.parts import store_rows
from acestep_ray.cache.songs import DecodedSong, Recipe, Settings, Song
from acestep_ray.cache.stored import claim_output_dir
from acestep_ray.config import TrainConfig
from acestep_ray.data.audio import to_training_audio
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.storage import Store
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
from acestep_ray.training.lora_config import DEFAULT_LORA
from acestep_ray.training.samples import SAMPLER
from acestep_ray.training.settings import WorkerPlace, WorkerSettings
from acestep_ray.training.state import WEIGHTS_FILE, Checkpoints
from acestep_ray.training.worker import train_worker
from tests.cache.rows import finish
from tests.cache.runs import encoded_row

SECONDS = {"alpha": 4.0, "beta": 3.0, "gamma": 6.5}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> CheckpointDir:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def write_tiny_cache(checkpoint, tmp_path_factory):
    """Writes a cache of some of the songs of `SECONDS`; returns its directory. Latents of those `broken` have a NaN."""
    settings = Settings(
        tag_shuffles=2,
        ssl_frame_stride=1,
        seed=0,
        speaker_dim=checkpoint.transformer_config.speaker_embedding_dim,
    )
    encoder = Encoder.load(checkpoint, Recipe(settings, {}), "cpu")

    def write(*keys: str, broken: Sequence[str] = ()) -> Path:
        cache = Store.at(tmp_path_factory.mktemp("cache") / "cache")
        claim_output_dir(cache)
        rows = {key: encoded_row(encoder, melody(key)) for key in keys}
        store_rows(cache, [with_nan(row) if key in broken else row for key, row in rows.items()])
        finish(cache, settings=asdict(settings))
        return cache.path

    return write


@pytest.fixture(scope="session")
def tiny_cache(write_tiny_cache) -> Path:
    """All three songs."""
    return write_tiny_cache(*SECONDS)


@pytest.fixture(autouse=True)
def quick_samples(monkeypatch):
    """Samples of few steps: most runs of these tests end with one."""
    monkeypatch.setitem(SAMPLER, "steps", 2)


@pytest.fixture
def no_work(monkeypatch):
    """A test in which no work may begin."""
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("work began"))


class Killed(Exception):
    """Stands for the end of the worker's process."""


def kill_at(step: int) -> Callable[[dict[str, float], Store | None], None]:
    """A report of checkpoints at which the worker's process ends, when it has saved this step."""

    def kill(metrics: dict[str, float], place: Store | None) -> None:
        if metrics["step"] == step:
            raise Killed

    return kill


def short_run(checkpoint: CheckpointDir, dataset: Path | str, **changes) -> TrainConfig:
    """Settings of a run on the CPU that makes no more than a short sample beside training."""
    values = {
        "learning_rate": 3e-3,
        "precision": "32",
        "device": "cpu",
        "num_workers": 1,
        "every_n_train_steps": 100,
        "every_plot_step": 1000,
        "plot_seconds": 2.0,
    }
    return TrainConfig(
        dataset_path=str(dataset), checkpoint_dir=str(checkpoint.path), **{**values, **changes}
    )


def places_in(directory: Path, **lora) -> dict[str, str]:
    """Settings of a run whose files are under `directory`, and the file of its LoRA with these fields."""
    lora_config = directory / "lora_config.json"
    lora_config.write_text(json.dumps({"r": 4, "target_modules": ["to_q", "to_v"], **lora}), encoding="utf-8")
    return {
        "lora_config_path": str(lora_config),
        "exp_dir": str(directory / "exps"),
        "logger_dir": str(directory / "exps" / "logs"),
    }


def settings_in(directory: Path, config: TrainConfig, **changes) -> WorkerSettings:
    """Settings of a run whose files are under `directory`, without MLflow."""
    values = {
        "lora": {**DEFAULT_LORA, "r": 4, "lora_alpha": 8},
        "checkpoints": Store.at(directory / "checkpoints"),
        "samples": Store.at(directory / "samples"),
        "log_dir": Store.at(directory / "logs"),
        "mlflow_run": None,
        "total_steps": config.max_steps,
    }
    return WorkerSettings(config=config, **{**values, **changes})


def train_alone(settings: WorkerSettings, report=lambda metrics, place: None, say=lambda line: None) -> dict:
    """The loop as the only worker, in this process and without Ray."""
    alone = WorkerPlace(rank=0, workers=1, device=torch.device("cpu"))
    return train_worker(settings, alone, report, say)


def latest_weights(settings: WorkerSettings) -> dict[str, torch.Tensor]:
    """What the last checkpoint of a run holds."""
    checkpoints = Checkpoints(settings.checkpoints)
    return load_file(checkpoints.folder(checkpoints.steps()[-1]).path / WEIGHTS_FILE)


def with_nan(row: pa.Table) -> pa.Table:
    """The row of a song with one latent that is no number."""
    latents = np.frombuffer(row["latents"][0].as_py(), np.float16).copy()
    latents[latents.size // 2] = np.nan
    column = row.schema.get_field_index("latents")
    field = row.schema.field(column)
    return row.set_column(column, field, pa.array([latents.tobytes()], field.type))


def assert_same_weights(found: WorkerSettings, expected: WorkerSettings) -> None:
    """The last checkpoints of two runs hold the same, bit for bit."""
    weights = latest_weights(expected)
    others = latest_weights(found)
    assert others.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(others[name], value), name


def assert_close_weights(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Equal weights, as far as sums in another order allow."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5, msg=name)


def scalars(settings: WorkerSettings, name: str) -> dict[int, float]:
    """What TensorBoard shows of a run's metric, by step; each step is there once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(settings.log_dir.url).Reload().Scalars(name)
    values = {event.step: event.value for event in events}
    assert len(values) == len(events)
    return values


def melody(key: str) -> DecodedSong:
    """A song of a few sine tones."""
    seconds = SECONDS[key]
    time = torch.arange(int(seconds * 48_000)) / 48_000
    pitch = 200.0 + 50.0 * len(key) + 80.0 * (2 * time).floor()
    wave = 0.4 * torch.sin(2 * torch.pi * pitch * time) * torch.exp(-3 * (2 * time).frac())
    audio = to_training_audio(wave[None].numpy(), 48_000)
    lyrics = "" if key == "beta" else f"[verse]\nHello {key}\nla la la"
    song = Song(key, f"{key}.wav", ["calm", key], {"simplified": f"the song {key}"}, lyrics, "", "")
    return DecodedSong(
        song=song,
        key=key,
        window=0,
        is_last_window=True,
        start_seconds=0.0,
        audio_sha256="0" * 64,
        audio_version="1-1",
        speaker_sha256=None,
        speaker_version=None,
        duration_seconds=seconds,
        wave=audio,
        speaker=None,
    )
