"""The files of a batch: each song's audio and its note, by which a later run knows that it need not be made again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acestep_ray.cache.schema import hash_of
from acestep_ray.data.audio import SAMPLE_RATE
from acestep_ray.generation.audio import Sound, audio_bytes
from acestep_ray.generation.song import Song
from acestep_ray.plain_files import JSON
from acestep_ray.plain_json import load_json
from acestep_ray.storage import FileStatus, Store

if TYPE_CHECKING:
    from acestep_ray.generation.models import ModelChoice
    from acestep_ray.models.checkpoint import CheckpointDir

_READERS = 16


@dataclass(frozen=True)
class Recipe:
    """What songs are made with, beside their own settings."""

    models: dict[str, Any]
    """Fingerprints of the models, and of LoRAs with their strength."""
    precision: str
    overlapped: bool | None
    format: str

    @classmethod
    def of(cls, choice: ModelChoice, checkpoint: CheckpointDir, format: str) -> Recipe:
        """The recipe of these models, whose files are read unless an earlier run has noted what they hold."""
        from acestep_ray.data.lyrics import LyricTokenizer
        from acestep_ray.export.reading import sha256_of
        from acestep_ray.models.fingerprints import noted_sha256
        from acestep_ray.models.weights import weight_files

        parts = ("codec", "vocoder", "text_encoder")
        transformer = [noted_sha256(file) for file in weight_files(Path(choice.transformer_path))]
        models = {
            "transformer": hash_of(checkpoint.transformer_config.to_dict(), transformer),
            **{part: checkpoint.fingerprint(part) for part in parts},
            "lyric_tokenizer": LyricTokenizer.from_file(checkpoint.lyric_vocab_path()).fingerprint,
            "loras": [[sha256_of(updates), weight] for updates, weight in choice.loras],
        }
        return cls(models, choice.precision, choice.overlapped, format)

    def fingerprint(self, song: Song) -> str:
        """Changes when the song would."""
        return hash_of(song.settings(), self.models, self.precision, self.overlapped)

    def file(self, song: Song) -> str:
        """The song's file in the output folder."""
        return f"{song.name}.{self.format}"


def note_of(song: Song) -> str:
    """The file beside the song's that says what it was made from."""
    return f"{song.name}.json"


def write_song(store: Store, song: Song, sound: Sound, recipe: Recipe) -> float:
    """Write a song, then its note; returns its seconds."""
    content = audio_bytes(sound.waveform, recipe.format)
    seconds = sound.waveform.shape[1] / SAMPLE_RATE
    settings = song.settings()
    note = {
        **{name: value for name, value in settings.items() if name != "speaker"},
        "speaker": None if song.speaker is None else hash_of(song.speaker),
        "models": recipe.models,
        "precision": recipe.precision,
        "overlapped_decode": sound.overlapped,
        "seconds": seconds,
        "bytes": len(content),
        "fingerprint": recipe.fingerprint(song),
    }
    store.write_bytes(recipe.file(song), content)
    store.write_bytes(note_of(song), (json.dumps(note, ensure_ascii=False, indent=1) + "\n").encode())
    return seconds


def find_made(store: Store, songs: Sequence[Song], recipe: Recipe) -> dict[str, float]:
    """Seconds of the songs, by name, that are there and were made by this recipe."""
    files = store.names()
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda song: _seconds_if_made(store, files, song, recipe), songs)
        return {song.name: seconds for song, seconds in zip(songs, found, strict=True) if seconds is not None}


def _seconds_if_made(store: Store, files: dict[str, FileStatus], song: Song, recipe: Recipe) -> float | None:
    audio = files.get(recipe.file(song))
    if audio is None or note_of(song) not in files:
        return None
    try:
        note = load_json(store.read_bytes(note_of(song), JSON))
        is_same = note["fingerprint"] == recipe.fingerprint(song) and note["bytes"] == audio.size
        return float(note["seconds"]) if is_same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # something else of that name
