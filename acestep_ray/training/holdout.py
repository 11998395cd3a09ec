"""Which songs are kept from training, to measure the model on what it has never seen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.stored import find_rows
from acestep_ray.errors import InputError

# Without a number that was asked for: one song in twenty, and no more than a validation needs.
SONGS_PER_HELD_OUT, MOST_HELD_OUT = 20, 8


def hold_out(recordings: Sequence[str], count: int | None) -> np.ndarray:
    """Positions, ascending, of the rows of `count` recordings; `recordings` names the recording of every row.

    Rows of one recording (windows of a song, or a song that the dataset repeats) are held out together. A recording's
    own hash decides, so that more songs in a dataset hardly change which ones are held out. None takes one recording in
    `SONGS_PER_HELD_OUT`, at most `MOST_HELD_OUT`. Raises InputError where nothing would be left to train on.
    """
    names, group_of_row = np.unique(np.asarray(recordings, dtype=object), return_inverse=True)
    if count is None:
        count = min(len(names) // SONGS_PER_HELD_OUT, MOST_HELD_OUT)
    if count >= len(names):
        raise InputError(
            f"there are {len(names)} recordings, and {count} are held out: none is left to train on",
            where=f"--val_songs {count}",
            fix="hold out fewer, or 0",
        )
    chosen = sorted(range(len(names)), key=lambda i: _hash(str(names[i])))[:count]
    return np.flatnonzero(np.isin(group_of_row, chosen))


def recordings_of_cache(index: CacheIndex) -> list[str]:
    """The SHA-256 of the audio file behind each row of a cache."""
    rows = find_rows(index.store)
    audio = dict(zip(rows["key"].to_pylist(), rows["audio_sha256"].to_pylist(), strict=True))
    # A row that nothing is known of is a recording of its own.
    return [audio.get(key) or key for key in index.keys]


def _hash(name: str) -> bytes:
    return hashlib.blake2b(f"held out/{name}".encode(errors="surrogatepass")).digest()
