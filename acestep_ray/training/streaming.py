"""Where a run's songs come from: a feature cache, or the songs themselves, decoded by Ray Data and encoded here.

Both give the same `CachedSong`s: what a song's features are in the cache, the worker makes of its audio in memory.

Without a cache, every worker runs a Ray Data pipeline of its own over the songs of its own micro-batches, in the plan's
order and from the step where it begins. So no row has to find its worker, and a resume needs no state.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import DataContext, ExecutionResources

from acestep_ray.cache.encoding import Encoder
from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.reader import CacheReader, song_of_row
from acestep_ray.cache.schema import CachedSong
from acestep_ray.cache.songs import DecodedSong, Recipe, Reject, build_row
from acestep_ray.cache.transport import read_decoded
from acestep_ray.data.schema import RejectReason
from acestep_ray.errors import AceStepError
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.ray_runtime import cluster_cpus
from acestep_ray.storage import Store
from acestep_ray.terminal import is_verbose
from acestep_ray.training.loader import read_ahead
from acestep_ray.training.sampler import MicroBatch
from acestep_ray.training.scan import DECODE_CPUS, decode_songs, read_songs

Made = TypeVar("Made")

# A pipeline has an end, and the next one begins to decode before that. Longer ones leave CPUs idle less often; their
# list of songs is in memory.
_SONGS_PER_PIPELINE = 256
_WAVES_PER_PIPELINE = 16
# Of decoded songs that lie here already while one is encoded.
_PREFETCHED = 2
# Ray Data's own share of the object store, of all pipelines together.
_STORE_SHARE = 0.5
# Songs that are asked for again and again, to validate with.
_KEPT = 16


class SongSource(Protocol):
    """The songs of a run, sorted by key; song `i` is the same on every worker."""

    latent_frames: np.ndarray
    """Length of each song, int32 (songs,)."""
    ssl_stride: int

    def read(self, i: int) -> CachedSong:
        """Any song."""

    def read_ahead(
        self,
        items: Iterable[MicroBatch],
        make: Callable[[MicroBatch, list[CachedSong]], Made],
        threads: int,
    ) -> Iterator[Made]:
        """`make(item, its songs)` for every item, in order, ahead of the caller; with 0 threads, in the caller's."""


class CacheSource:
    """Songs of a feature cache."""

    def __init__(self, index: CacheIndex):
        self.reader = CacheReader(index)
        self.latent_frames = index.latent_frames
        self.ssl_stride = index.ssl_frame_stride

    def read(self, i: int) -> CachedSong:
        return self.reader.read(i)

    def read_ahead(
        self,
        items: Iterable[MicroBatch],
        make: Callable[[MicroBatch, list[CachedSong]], Made],
        threads: int,
    ) -> Iterator[Made]:
        return read_ahead(items, lambda item: make(item, [self.read(i) for i in item.songs]), threads)


@dataclass(frozen=True)
class Stream:
    """Songs without a cache, as the driver hands them to every worker."""

    root: Store
    """File names of songs are relative to it."""
    scan: Store
    """Directory of the scan that found the songs."""
    checkpoint_dir: str
    """Of the encoders."""
    recipe: Recipe


class SongLostError(AceStepError):
    """A song that was usable when the run began cannot be read or encoded now."""


class StreamSource:
    """Songs that are decoded somewhere in the cluster, and encoded on this worker's device."""

    def __init__(self, stream: Stream, device: torch.device, workers: int = 1):
        """Loads the encoders; the pipelines of `workers` share the cluster's memory."""
        self.stream = stream
        self.workers = workers
        self.songs = read_songs(stream.scan)
        self.latent_frames = self.songs["latent_frames"].to_numpy()
        self.ssl_stride = stream.recipe.settings.ssl_frame_stride
        self.encoder = Encoder.load(CheckpointDir.open(stream.checkpoint_dir), stream.recipe, str(device))
        # Training reads ahead in a thread, and validates in its own.
        self._encoding = threading.Lock()
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="decode-ahead")
        self.read = lru_cache(_KEPT)(self._read)

    def _read(self, i: int) -> CachedSong:
        task = ray.remote(num_cpus=DECODE_CPUS, scheduling_strategy="SPREAD")(decode_songs)
        decoded = ray.get(task.remote(self.songs.slice(i, 1), self.stream.root, self.stream.recipe))
        (song,) = self._encode([i], [decoded])
        return song

    def read_ahead(
        self,
        items: Iterable[MicroBatch],
        make: Callable[[MicroBatch, list[CachedSong]], Made],
        threads: int,
    ) -> Iterator[Made]:
        def load(entry: tuple[MicroBatch, Iterator[pa.Table]]) -> Made:
            item, decoded = entry
            return make(item, self._encode(item.songs, [next(decoded) for _ in item.songs]))

        # One thread, so that every micro-batch takes its own songs from the pipeline.
        return read_ahead(self._with_pipelines(items), load, min(threads, 1))

    def _with_pipelines(self, items: Iterable[MicroBatch]) -> Iterator[tuple[MicroBatch, Iterator[pa.Table]]]:
        """Each micro-batch with the pipeline that its songs come out of next."""
        cpus = cluster_cpus()
        songs = max(_SONGS_PER_PIPELINE, math.ceil(_WAVES_PER_PIPELINE * cpus / DECODE_CPUS / self.workers))
        for piece in _pieces(items, songs):
            decoded = self._start_pipeline([i for item in piece for i in item.songs])
            for item in piece:
                yield item, decoded

    def _start_pipeline(self, rows: Sequence[int]) -> Iterator[pa.Table]:
        """The decoded songs in these rows, one after another; Ray Data begins with them at once."""
        context = DataContext.get_current().copy()
        context.enable_progress_bars = is_verbose()
        context.print_on_execution_start = is_verbose()
        context.raise_original_map_exception = True
        # Every song is a block of its own.
        context.target_max_block_size = 1
        context.execution_options.preserve_order = True
        store = ray.cluster_resources().get("object_store_memory", 0) * _STORE_SHARE / self.workers
        context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=store)
        songs = self.songs.take(pa.array(rows, pa.int64()))
        with DataContext.current(context):
            # Not `from_arrow`, which sizes each table in a task of one CPU: more than the worker leaves of one CPU.
            dataset: ray.data.Dataset = ray.data.from_blocks([songs.slice(i, 1) for i in range(len(rows))])
            dataset = dataset.map_batches(
                partial(decode_songs, root=self.stream.root, recipe=self.stream.recipe),
                num_cpus=DECODE_CPUS,
                batch_size=None,
                batch_format="pyarrow",
            )
        batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=_PREFETCHED)
        decoded = iter(batches)
        first = self._starter.submit(next, decoded)

        def in_order() -> Iterator[pa.Table]:
            yield first.result()
            yield from decoded

        return in_order()

    def _encode(self, rows: Sequence[int], tables: Sequence[pa.Table]) -> list[CachedSong]:
        """The songs in these rows as the cache would give them; `tables` hold their decoded audio."""
        decoded = [self._check_decoded(row, table) for row, table in zip(rows, tables, strict=True)]
        with self._encoding:
            outcomes = self.encoder.encode(decoded)
        songs = []
        for row, song, columns in zip(rows, decoded, outcomes, strict=True):
            if isinstance(columns, Reject):
                raise _lost(columns)
            recipe = self.stream.recipe
            songs.append(song_of_row(build_row(song, columns, recipe), recipe.settings.speaker_dim))
            frames = songs[-1].latents.shape[-1]
            if frames != self.latent_frames[row]:
                raise SongLostError(
                    f"the song {song.key!r} has {frames} latent frames, it had {self.latent_frames[row]} when the "
                    "run began\n  → start the run again: it looks at songs that have changed"
                )
        return songs

    def _check_decoded(self, row: int, table: pa.Table) -> DecodedSong:
        if table["reject"][0].is_valid:
            raise _lost(Reject(**json.loads(table["reject"][0].as_py())))
        decoded = read_decoded(table, 0)
        expected = self.songs["key"][row].as_py()
        assert decoded.key == expected, f"the pipeline gave {decoded.key!r} in the place of {expected!r}"
        return decoded


def _pieces(items: Iterable[MicroBatch], songs: int) -> Iterator[list[MicroBatch]]:
    """Micro-batches in lists that hold at least this many songs, but for the last."""
    piece: list[MicroBatch] = []
    count = 0
    for item in items:
        piece.append(item)
        count += len(item.songs)
        if count >= songs:
            yield piece
            piece, count = [], 0
    if piece:
        yield piece


def _lost(reject: Reject) -> Exception:
    problem = f"the song {reject.key!r} could be used when the run began, and cannot now"
    problem = f"{problem} ({reject.reason}): {reject.message}"
    if RejectReason.of(reject.reason).is_transient:
        return RuntimeError(
            problem
        )  # a fault of the machine, after which the run goes on from its checkpoint
    return SongLostError(f"{problem}\n  → mend it, or start the run again: it leaves out what cannot be used")
