"""Random access to the songs of a feature cache."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.schema import LATENT_CHANNELS, LATENT_HEIGHT, SAMPLES, CachedSong

# Each thread keeps this many files open; their footers take about 1 kB a song.
_OPEN_FILES = 32

_COLUMNS = ["key", "latents", "prompts", "text_embeddings", "text_dim", "lyric_ids", "speaker", "ssl"]


class CacheReader:
    """Reads song `i` of an index; any number of threads may read at once."""

    def __init__(self, cache: CacheIndex | str | Path):
        self.index = cache if isinstance(cache, CacheIndex) else CacheIndex.open(cache)
        self._local = threading.local()

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> CachedSong:
        """Song `i` of the index: one row group read, its tensors without a copy."""
        part = self.index.parts[self.index.part_numbers[i]]
        # Threads of the caller read ahead; more inside each read would only get in their way.
        row = self._file(part).read_row_group(
            int(self.index.row_groups[i]), columns=_COLUMNS, use_threads=False
        )
        return _cached_song(row, self.index.speaker_dim)

    def _file(self, part: str) -> pq.ParquetFile:
        files: OrderedDict[str, pq.ParquetFile] = self._local.__dict__.setdefault("files", OrderedDict())
        if part in files:
            files.move_to_end(part)
            return files[part]
        if len(files) == _OPEN_FILES:
            files.popitem(last=False)[1].close()
        files[part] = pq.ParquetFile(self.index.path / SAMPLES / part, pre_buffer=False)
        return files[part]

    def __reduce__(self):
        # Open files stay in their process.
        return CacheReader, (self.index,)


def _cached_song(row: pa.Table, speaker_dim: int) -> CachedSong:
    song = {name: row[name][0] for name in row.column_names}
    text_dim = song["text_dim"].as_py()
    lyric_ids = song["lyric_ids"].as_py()
    prompts = song["prompts"].as_py()
    ssl = {entry["name"].as_py(): entry for entry in song["ssl"]}
    return CachedSong(
        key=song["key"].as_py(),
        latents=_tensor(song["latents"], pa.float16()).view(LATENT_CHANNELS, LATENT_HEIGHT, -1),
        prompts=[prompt["text"] for prompt in prompts],
        prompt_sources=[prompt["source"] for prompt in prompts],
        text_embeddings=[
            _tensor(value, pa.float16()).view(-1, text_dim) for value in song["text_embeddings"]
        ],
        # The model needs a token where there are no lyrics; its mask is 0.
        lyric_ids=torch.tensor(lyric_ids or [0]),
        has_lyrics=bool(lyric_ids),
        speaker=_tensor(song["speaker"], pa.float32())
        if song["speaker"].is_valid
        else torch.zeros(speaker_dim),
        ssl={
            name: _tensor(entry["directions"], pa.int8()).view(-1, entry["dim"].as_py())
            for name, entry in ssl.items()
        },
        ssl_frames={name: entry["frames"].as_py() for name, entry in ssl.items()},
    )


def _tensor(value: pa.LargeBinaryScalar, kind: pa.DataType) -> torch.Tensor:
    """The bytes of a value as a flat tensor that shares and owns their memory."""
    buffer = value.as_buffer()
    return torch.from_dlpack(
        pa.Array.from_buffers(kind, buffer.size // (kind.bit_width // 8), [None, buffer])
    )
