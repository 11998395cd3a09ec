"""The music that a run makes as it goes: its files, for whatever keys songs have."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from acestep_ray.config import TrainConfig
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.training import samples
from tests.training.songs import cached_song


@pytest.fixture
def sampled(monkeypatch, tmp_path):
    """Writes a sample of a song that no model has made; returns the names of its files."""

    class Checkpoint:
        def load_codec(self, device):
            return None

    monkeypatch.setattr(samples, "sample", lambda *_, **__: None)
    monkeypatch.setattr(samples, "decode", lambda *_: torch.zeros(2, 48_000).numpy())
    monkeypatch.setattr(CheckpointDir, "open", lambda *_: Checkpoint())
    config = TrainConfig(dataset_path="cache", checkpoint_dir="checkpoint")

    def names(key):
        folder = tmp_path / "step=1"
        samples.write_sample(folder, None, replace(cached_song("song"), key=key), config, torch.device("cpu"))
        (noted,) = folder.glob("*.json")
        assert json.loads(noted.read_text("utf-8"))["key"] == key
        return sorted(path.name for path in folder.iterdir())

    return names


def test_a_sample_is_named_after_its_song(sampled):
    assert sampled("album/夜 01") == ["album_夜 01.json", "album_夜 01.png", "album_夜 01.wav"]


@pytest.mark.parametrize("key", ["夜" * 84, "a\0b\nc", "k" * 300], ids=["long", "control", "longer"])
def test_a_key_that_no_file_can_be_called_is_one_in_another_spelling(sampled, key):
    names = sampled(key)
    assert [name.rpartition(".")[2] for name in names] == ["json", "png", "wav"]
    assert len({name.rpartition(".")[0] for name in names}) == 1
    assert all(name.isprintable() for name in names)
