"""A tiny checkpoint, its models, LoRAs that fit it, and songs to make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from acestep_ray.config import GenerateConfig
from acestep_ray.export.formats import universal_bytes
from acestep_ray.export.reading import LoraUpdate
from acestep_ray.generation.models import MusicModels, choose_models
from acestep_ray.generation.song import Song
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> CheckpointDir:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def config(checkpoint, tmp_path) -> GenerateConfig:
    return GenerateConfig(
        checkpoint_dir=str(checkpoint.path),
        output_path=str(tmp_path / "song.wav"),
        prompt="pop, piano",
        lyrics="[verse]\nhello there",
        duration=2.0,
        infer_steps=3,
        device="cpu",
    )


@pytest.fixture(scope="session")
def models(checkpoint) -> MusicModels:
    config = GenerateConfig(checkpoint_dir=str(checkpoint.path), device="cpu")
    return MusicModels.load(choose_models(config, checkpoint))


@pytest.fixture(scope="session")
def loras(tmp_path_factory) -> list[Path]:
    """Two LoRA files for the tiny model."""
    folder = tmp_path_factory.mktemp("loras")
    torch.manual_seed(0)
    paths = []
    for name in ("first", "second"):
        update = LoraUpdate(torch.randn(2, 64), torch.randn(64, 2), None)
        paths.append(folder / f"{name}.safetensors")
        paths[-1].write_bytes(universal_bytes({"transformer_blocks.0.attn.to_q": update}))
    return paths


SONG = Song(
    name="song",
    line=1,
    prompt="pop",
    lyrics="",
    language=None,
    frames=21,
    seed=0,
    infer_steps=3,
    guidance_scale=15.0,
    scheduler="euler",
    omega=10.0,
    shift=3.0,
    speaker=None,
)


def song(**settings) -> Song:
    return replace(SONG, **settings)
