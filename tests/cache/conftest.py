from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch

from acestep_ray.cache.encoding import Encoder
from acestep_ray.cache.parts import store_rows
from acestep_ray.cache.songs import DecodedSong, Recipe, Settings, Song
from acestep_ray.data.lyrics import LyricTokenizer, build_tiny_vocabulary
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.storage import Store
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
from tests.cache.rows import reject, song_row, write_rows

TEXT_DIM = 6
SPEAKER_DIM = 5
SSL_DIMS = {"mert": 7, "m-hubert": 4}
SETTINGS = Settings(tag_shuffles=3, ssl_frame_stride=1, seed=0, speaker_dim=SPEAKER_DIM)
RECIPE = Recipe(SETTINGS, {"codec": "c0", "text_encoder": "t0"})


class StandInCodec:
    """One latent frame for 4800 samples, made of the wave itself."""

    def encode(self, waves: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frames = waves[:, 0].unfold(1, 128, 4800).transpose(1, 2).unflatten(1, (8, 16))
        return frames, lengths // 4800


class StandInTextEncoder:
    """A letter for a token, and its embedding made of the letter."""

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, texts))
        letters = torch.tensor([[ord(c) for c in text.ljust(longest, "\0")] for text in texts])
        embeddings = torch.sin(letters[..., None] * torch.arange(1, TEXT_DIM + 1))
        return embeddings, (letters > 0).float()


@dataclass
class StandInSSL:
    name: str

    def encode_batch(self, songs: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        return [stereo[0].unfold(0, SSL_DIMS[self.name], 480).clone() for stereo in songs]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> CheckpointDir:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def lyric_tokenizer(tmp_path_factory) -> LyricTokenizer:
    path = tmp_path_factory.mktemp("lyrics") / "vocab.json"
    build_tiny_vocabulary(path)
    return LyricTokenizer.from_file(path)


@pytest.fixture
def encoder(lyric_tokenizer) -> Encoder:
    """An encoder whose models are stand-ins; a test may replace any."""
    return Encoder(
        RECIPE,
        codec=StandInCodec(),
        text_encoder=StandInTextEncoder(),
        ssl_encoders={name: StandInSSL(name) for name in SSL_DIMS},
        lyric_tokenizer=lyric_tokenizer,
    )


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Store:
    """Songs a to d in two parts, two of each."""
    monkeypatch.setattr("acestep_ray.cache.commit.PART_ROWS", 2)
    cache = Store.at(tmp_path / "cache")
    for keys in ("ab", "cd"):
        store_rows(cache, [song_row(key, speaker=key == "a") for key in keys])
    return write_rows(cache, [], [reject("x"), reject("y", "silent")])


def song(key: str = "a", **changes: Any) -> Song:
    fields = {
        "filename": f"audio/{key}.wav",
        "tags": ["pop", "slow"],
        "recaption": {"simplified": "a pop song"},
        "lyrics": "[verse]\nhello world",
        "language": "",
        "speaker_path": "",
    }
    return Song(key, **{**fields, **changes})


def decoded(
    one: Song, seconds: float = 3.0, speaker: np.ndarray | None = None, **changes: Any
) -> DecodedSong:
    wave = np.random.default_rng(len(one.key)).uniform(-0.5, 0.5, (2, int(seconds * 48_000)))
    fields = {
        "key": one.key,
        "window": 0,
        "is_last_window": True,
        "start_seconds": 0.0,
        "audio_sha256": "a" * 64,
        "audio_version": "1000-1",
        "speaker_sha256": None if speaker is None else "b" * 64,
        "speaker_version": None if speaker is None else "20-1",
        "duration_seconds": seconds,
        "wave": wave.astype(np.float32),
        "speaker": speaker,
    }
    return DecodedSong(song=one, **{**fields, **changes})


@dataclass
class SongFolder:
    """A dataset directory that a test fills with songs and writes."""

    path: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, key: str, audio: np.ndarray | bytes | None = None, **columns: Any) -> None:
        """A song whose audio is samples (n, channels) at 48 kHz, or the bytes of its file, or is not there."""
        filename = columns.pop("filename", f"audio/{key}.wav")
        file = self.path / filename
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(audio, bytes):
            file.write_bytes(audio)
        elif audio is not None:
            soundfile.write(file, audio, 48_000, format="WAV")
        self.rows[key] = {
            "keys": key,
            "filename": filename,
            "tags": ["pop", "slow", key],
            "norm_lyrics": "[verse]\nhello world",
            "speaker_emb_path": "",
            "recaption": {"simplified": f"the song {key}"},
            **columns,
        }

    def write(self) -> Path:
        datasets.Dataset.from_list(list(self.rows.values())).save_to_disk(self.path)
        return self.path


@pytest.fixture
def song_folder(tmp_path) -> SongFolder:
    return SongFolder(tmp_path / "dataset")


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (int(seconds * 48_000), 2))
