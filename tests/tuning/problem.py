"""Songs that only a LoRA of high rank and rate learns in a few steps.

Each song is a chord that sounds from its beginning to its end, and its speaker says which: the chord is a linear
function of the speaker, of rank 16. Held-out songs have speakers that no other song has.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from acestep_ray.cache.parts import store_rows
from acestep_ray.cache.stored import claim_output_dir
from acestep_ray.storage import Store
from tests.cache.rows import finish, song_row

SPEAKER_DIM, TEXT_DIM, SSL_DIMS = 512, 32, {"mert": 32, "m-hubert": 24}
CHORD_RANK = 16
FRAMES = 12


def write_problem(path: Path, songs: int) -> Path:
    """Write the feature cache of the problem, for the tiny checkpoint."""
    random = np.random.default_rng(0)
    chords = 2 * random.standard_normal((128, CHORD_RANK)) / np.sqrt(CHORD_RANK)
    speakers = random.standard_normal((CHORD_RANK, SPEAKER_DIM))
    speakers /= np.linalg.norm(speakers, axis=1, keepdims=True)
    rows = []
    for number in range(songs):
        mixture = random.standard_normal(CHORD_RANK)
        latents = (chords @ mixture).reshape(8, 16, 1) + 0.05 * random.standard_normal((8, 16, FRAMES))
        row = song_row(
            f"song-{number:02d}",
            frames=FRAMES,
            text_dim=TEXT_DIM,
            ssl_dims=SSL_DIMS,
            lyric_ids=[],
            latents=latents.astype(np.float16).tobytes(),
            audio_sha256=f"{number:064d}",
            audio_version=f"{number}-1",
        )
        column = row.schema.get_field_index("speaker")
        field = row.schema.field(column)
        speaker = (mixture @ speakers).astype(np.float32).tobytes()
        rows.append(row.set_column(column, field, pa.array([speaker], field.type)))
    cache = Store.at(path)
    claim_output_dir(cache)
    store_rows(cache, rows)
    finish(cache, settings={"ssl_frame_stride": 1, "speaker_dim": SPEAKER_DIM})
    return cache.path
