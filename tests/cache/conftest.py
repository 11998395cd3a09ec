from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch

from acestep_ray.cache.parts import (
    Part,
    claim_output_dir,
    commit,
    find_rows,
    plan_parts,
    read_dims,
    row_to_bytes,
    store_song,
    write_part,
)
from acestep_ray.cache.schema import FORMAT_VERSION
from acestep_ray.cache.stages import DecodedSong, Encoder, Recipe, Reject, Settings, Song
from acestep_ray.data.lyrics import LyricTokenizer, build_tiny_vocabulary

TEXT_DIM = 6
SPEAKER_DIM = 5
SSL_DIMS = {"mert": 7, "m-hubert": 4}
SETTINGS = Settings(max_duration=240.0, tag_shuffles=3, ssl_frame_stride=1, seed=0, speaker_dim=SPEAKER_DIM)
RECIPE = Recipe(SETTINGS, {"codec": "c0", "text_encoder": "t0"})


class StandInCodec:
    """One latent frame for 4800 samples, made of the wave itself."""

    def encode(self, waves: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frames = waves[:, 0].unfold(1, 128, 4800).transpose(1, 2).unflatten(1, (8, 16))
        return frames, lengths // 4800


class StandInTextEncoder:
    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.tensor([len(text) for text in texts])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).float()
        embeddings = torch.randn(*mask.shape, TEXT_DIM, generator=torch.Generator().manual_seed(0))
        return embeddings * mask[..., None], mask


@dataclass
class StandInSSL:
    name: str

    def encode(self, stereo: torch.Tensor) -> torch.Tensor:
        return stereo[0].unfold(0, SSL_DIMS[self.name], 480).clone()


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


def decoded(one: Song, seconds: float = 3.0, speaker: np.ndarray | None = None) -> DecodedSong:
    wave = np.random.default_rng(len(one.key)).uniform(-0.5, 0.5, (2, int(seconds * 48_000)))
    speaker_sha256 = None if speaker is None else "b" * 64
    return DecodedSong(one, "a" * 64, speaker_sha256, seconds, wave.astype(np.float32), speaker)


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


@pytest.fixture
def write_cache(encoder, tmp_path):
    """Writes a finished cache of stand-in songs; returns its directory."""

    def write(songs: list[DecodedSong], name: str = "cache", rejects: Sequence[Reject] = ()) -> Path:
        cache = tmp_path / name
        claim_output_dir(cache)
        for one in songs:
            store_song(cache, row_to_bytes(encoder.encode_song(one)))
        finish(cache, rejects)
        return cache

    return write


def finish(cache: Path, rejects: Sequence[Reject] = ()) -> list[Part]:
    """What a run does once every song is stored."""
    parts = plan_parts(rows[0] for rows in find_rows(cache).values())
    for part in parts:
        if not part.is_written:
            write_part(cache, part)
    dims = read_dims(cache, parts[0]) if parts else {"text_dim": None, "ssl": {}}
    samples = sum(len(part.rows) for part in parts)
    manifest = {
        "format_version": FORMAT_VERSION,
        "counts": {"samples": samples},
        "settings": asdict(SETTINGS),
    }
    commit(cache, parts, rejects, {**manifest, **dims})
    return parts
