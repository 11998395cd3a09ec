"""Songs, caches and workers that take nothing but time, for `scale.py`.

`sleep_instead` runs in the process that workers are forked from (`simulated_nodes.py`), and puts stand-ins where songs
are decoded and encoded: they sleep, and give arrays of a few bytes. Everything around them is the real program.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from acestep_ray.cache.commit import commit, content_hash
from acestep_ray.cache.schema import FORMAT_VERSION, LEDGER_SCHEMA, SAMPLES, table_to_bytes
from acestep_ray.cache.songs import DecodedSong, FileVersions, Recipe, Song
from acestep_ray.cache.stored import claim_output_dir
from acestep_ray.data.songs import SongTable
from acestep_ray.storage import Store

SONG_BYTES = 7_660_000
"""Of a stored song of 240 s, all features (RESULTS.md)."""
SONGS_PER_FILE = 8
# What `file_versions` says of a file that is not there: no song of a million has one.
_NO_FILE = "missing"
_VARIABLE = "ACESTEP_SIMULATION"
_AUDIO_SHA256 = hashlib.sha256(b"audio").hexdigest()
_LYRICS = "[verse]\n" + "la la la, the night is long\n" * 40


@dataclass(frozen=True)
class Simulation:
    """How long a worker sleeps for a song, and how much of it there is."""

    decode_seconds: float
    encode_seconds: float
    wave_bytes: int

    def environment(self) -> dict[str, str]:
        """Variables for the workers, which find this module beside the script."""
        here = str(Path(__file__).parent)
        paths = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        return {_VARIABLE: json.dumps(asdict(self)), "PYTHONPATH": paths}


def sleep_instead() -> None:
    """Let this process sleep where it would decode or encode."""
    simulation = Simulation(**json.loads(os.environ[_VARIABLE]))

    def decode_song(root: Store, song: Song, recipe: Recipe, versions: FileVersions) -> Iterator[DecodedSong]:
        time.sleep(simulation.decode_seconds)
        yield DecodedSong(
            song=song,
            key=song.key,
            window=0,
            is_last_window=True,
            start_seconds=0.0,
            audio_sha256=_AUDIO_SHA256,
            audio_version=versions.audio,
            speaker_sha256=None,
            speaker_version=None,
            duration_seconds=240.0,
            wave=np.zeros((2, simulation.wave_bytes // 8), np.float32),
            speaker=None,
        )

    class SleepingEncoder:
        @classmethod
        def load(cls, *_: object) -> SleepingEncoder:
            return cls()

        def encode(self, songs: Sequence[DecodedSong]) -> list[dict[str, Any]]:
            time.sleep(simulation.encode_seconds * len(songs))
            return [_columns(song) for song in songs]

    from acestep_ray.cache import graph

    graph.decode_song = decode_song
    # In the place of modules that load torch, which a hundred processes on one machine have no room for.
    encoding, checkpoint = types.ModuleType("encoding"), types.ModuleType("checkpoint")
    encoding.Encoder = SleepingEncoder
    checkpoint.CheckpointDir = types.SimpleNamespace(open=lambda directory: None)
    sys.modules["acestep_ray.cache.encoding"] = encoding
    sys.modules["acestep_ray.models.checkpoint"] = checkpoint


def _columns(song: DecodedSong) -> dict[str, Any]:
    return {
        "latents": bytes(2 * 8 * 16),
        "latent_frames": 1,
        "prompts": [{"source": "tags", "text": ", ".join(song.song.tags)}],
        "text_embeddings": [bytes(2 * 4)],
        "text_dim": 4,
        "lyric_ids": [1, 2, 3],
        "lyric_languages": ["en"],
        "ssl": [],
    }


def write_table(path: Path, songs: int) -> None:
    """A table of songs with 1.2 kB of lyrics each, in the order of their keys; their audio is not there."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(songs):
            row = {
                "key": f"song{i:08d}",
                "filename": f"audio/{i // 1000:05d}/song{i:08d}.flac",
                "tags": "pop, piano, female vocals, slow, 90 bpm",
                "lyrics": f"{_LYRICS}{i}\n",
            }
            file.write(json.dumps(row) + "\n")


def write_folder(folder: Path, songs: int) -> None:
    """A folder of songs with a prompt and lyrics beside each, in folders of a thousand; the audio is empty."""
    for i in range(songs):
        parent = folder / f"{i // 1000:05d}"
        if i % 1000 == 0:
            parent.mkdir(parents=True)
        (parent / f"song{i:08d}.flac").touch()
        (parent / f"song{i:08d}_prompt.txt").write_text("pop, piano, female vocals, slow, 90 bpm")
        (parent / f"song{i:08d}_lyrics.txt").write_text(_LYRICS)


def write_incoming(cache: Store, songs: SongTable, recipe: Recipe) -> None:
    """What a run leaves that was killed when every song was stored, and before it committed.

    Parts have the sizes of real ones and take no room on the disk.
    """
    rows = iter(songs)
    for folder in ("parts", "ledgers"):
        (cache.path / ".incoming" / folder).mkdir(parents=True)
    number = 0
    while some := [Song.from_row(row) for row in islice(rows, SONGS_PER_FILE)]:
        name = content_hash(str(number).encode())
        part, sidecar = (f".incoming/{folder}/{name}.parquet" for folder in ("parts", "ledgers"))
        with (cache.path / part).open("wb") as file:
            file.truncate(SONG_BYTES * len(some))
        entries = [_entry(song, recipe, part, i, len(some)) for i, song in enumerate(some)]
        ledger = pa.Table.from_pylist(entries, schema=LEDGER_SCHEMA)
        (cache.path / sidecar).write_bytes(table_to_bytes(ledger, "file"))
        number += 1


def write_committed(cache: Store, songs: SongTable, recipe: Recipe) -> None:
    """A cache of these songs, whose parts are empty."""
    claim_output_dir(cache)
    (cache.path / SAMPLES).mkdir()
    rows, tables, number = iter(songs), [], 0
    while some := [Song.from_row(row) for row in islice(rows, 1024 * SONGS_PER_FILE)]:
        entries = []
        for start in range(0, len(some), SONGS_PER_FILE):
            group = some[start : start + SONGS_PER_FILE]
            part = f"{SAMPLES}/part-{content_hash(str(number).encode())}.parquet"
            with (cache.path / part).open("wb") as file:
                file.truncate(SONG_BYTES * len(group))
            entries += [_entry(song, recipe, part, i, len(group)) for i, song in enumerate(group)]
            number += 1
        tables.append(pa.Table.from_pylist(entries, schema=LEDGER_SCHEMA))
    ledger = pa.concat_tables(tables)
    manifest = {
        "format_version": FORMAT_VERSION,
        "counts": {"inputs": len(ledger), "samples": len(ledger), "rejects": 0},
        "settings": asdict(recipe.settings),
        "text_dim": 768,
        "ssl": {"mert": 1024, "m-hubert": 768},
    }
    commit(cache, ledger, [], manifest)


def _entry(song: Song, recipe: Recipe, part: str, place: int, count: int) -> dict[str, Any]:
    return {
        "key": song.key,
        "song_key": song.key,
        "window": 0,
        "is_last_window": True,
        "fingerprint": recipe.row_fingerprint(song, _AUDIO_SHA256, None),
        "audio_sha256": _AUDIO_SHA256,
        "audio_version": _NO_FILE,
        "speaker_sha256": None,
        "speaker_version": None,
        "latent_frames": 2584,
        "duration_seconds": 240.0,
        "file": part,
        "offset": place * SONG_BYTES,
        "length": SONG_BYTES,
        "rows_in_file": count,
        "bytes_in_file": count * SONG_BYTES,
        "latents_bytes": 660_000,
        "text_bytes": 300_000,
        "ssl_bytes": 6_700_000,
        "prompt_count": 5,
        "languages": ["en"],
    }
