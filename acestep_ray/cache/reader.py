"""Random access to the songs of a feature cache, on a local disk or in object storage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from torch.utils.dlpack import from_dlpack

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.parts import damaged, read_row
from acestep_ray.cache.schema import LATENT_CHANNELS, LATENT_HEIGHT, SAMPLES, CachedSong
from acestep_ray.errors import InputError
from acestep_ray.storage import Store

_COLUMNS = ["key", "latents", "prompts", "text_embeddings", "text_dim", "lyric_ids", "speaker", "ssl"]


class CacheReader:
    """Reads songs of a cache, each in one request; any number of threads may read at once."""

    def __init__(
        self,
        cache: CacheIndex | str | os.PathLike[str] | Store,
        needs: Sequence[str] = ("latents", "text"),
    ):
        """Raises InputError if `cache` is none, or lacks one of the feature groups that are needed."""
        self.index = cache if isinstance(cache, CacheIndex) else CacheIndex.open(cache)
        self.needs = tuple(needs)
        missing = [group for group in self.needs if group not in self.index.features]
        if missing:
            raise InputError(
                f"the feature cache holds no {' and no '.join(missing)}",
                where=self.index.store.url,
                fix=f"run `acestep-ray precompute` with --features {','.join((*self.index.features, *missing))}",
            )

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> CachedSong:
        """Song `i` of the index; what a feature group that the cache lacks would hold is empty.

        Raises CacheDamagedError if its bytes are not there or are not this song's.
        """
        key, index = self.index.keys[i], self.index
        file = f"{SAMPLES}/{index.parts[index.part_numbers[i]]}"
        row = read_row(index.store, file, int(index.offsets[i]), int(index.lengths[i]), key, columns=_COLUMNS)
        try:
            song = song_of_row(row, index.speaker_dim)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise damaged(index.store, file, key, f"{type(error).__name__}: {error}") from error
        frames = song.latents.shape[-1]
        if frames not in (0, index.latent_frames[i]):
            raise damaged(index.store, file, key, f"{frames} latent frames, not {index.latent_frames[i]}")
        return song

    def read_key(self, key: str) -> CachedSong:
        """The song with this key. Raises KeyError if there is none, and what `read` raises."""
        return self.read(self.index.position(key))

    def __reduce__(self) -> tuple[type[CacheReader], tuple[CacheIndex, tuple[str, ...]]]:
        return CacheReader, (self.index, self.needs)


def song_of_row(row: pa.Table, speaker_dim: int) -> CachedSong:
    """The song of a one-row table; its tensors share the table's memory.

    Raises KeyError, RuntimeError, TypeError or ValueError for features that are no arrays of the right shapes.
    """
    song = {name: row[name].chunk(0) for name in _COLUMNS}
    text_dim = song["text_dim"][0].as_py()
    prompts = song["prompts"].flatten().to_pylist()
    lyric_ids = song["lyric_ids"].flatten().to_numpy()
    ssl = song["ssl"].flatten()
    names, dims, frames = (ssl.field(name).to_pylist() for name in ("name", "dim", "frames"))
    directions = _tensors(ssl.field("directions"), pa.int8())
    latents, speaker = (
        next(iter(_tensors(song[name].drop_null(), kind)), None)
        for name, kind in (("latents", pa.float16()), ("speaker", pa.float32()))
    )
    return CachedSong(
        key=song["key"][0].as_py(),
        latents=torch.zeros(LATENT_CHANNELS, LATENT_HEIGHT, 0, dtype=torch.float16)
        if latents is None
        else latents.view(LATENT_CHANNELS, LATENT_HEIGHT, -1),
        prompts=[prompt["text"] for prompt in prompts],
        prompt_sources=[prompt["source"] for prompt in prompts],
        text_embeddings=[
            embedding.view(-1, text_dim)
            for embedding in _tensors(song["text_embeddings"].flatten(), pa.float16())
        ],
        # The model needs a token where there are no lyrics; its mask is 0.
        lyric_ids=torch.from_numpy(lyric_ids.astype(np.int64)) if len(lyric_ids) else torch.tensor([0]),
        has_lyrics=len(lyric_ids) > 0,
        speaker=torch.zeros(speaker_dim) if speaker is None else speaker.view(speaker_dim),
        ssl={name: kept.view(-1, dim) for name, dim, kept in zip(names, dims, directions, strict=True)},
        ssl_frames=dict(zip(names, frames, strict=True)),
    )


def _tensors(values: pa.BinaryArray, kind: pa.DataType) -> list[torch.Tensor]:
    """The bytes of each value as a flat tensor; all share and own the memory of the array. A scalar would copy it."""
    _, offsets, content = values.buffers()
    bounds = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1].tolist()
    tensors = []
    for start, end in pairwise(bounds):
        length, rest = divmod(end - start, kind.bit_width // 8)
        if rest:
            raise ValueError(f"{end - start} bytes are no array of {kind}")
        buffers = [None, content.slice(start, end - start) if length else pa.py_buffer(b"")]
        tensors.append(from_dlpack(pa.Array.from_buffers(kind, length, buffers)))
    return tensors
