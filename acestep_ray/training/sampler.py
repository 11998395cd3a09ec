"""Which songs make up which step: a pure function of the seed and the cache, without any state to save.

The run is one endless sequence of micro-batches, epoch after epoch; every song comes once an epoch. Step n takes
micro-batches n·M … n·M + M − 1, and worker r of R takes every R-th of those, so that a step's songs do not depend on
how many workers share it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from acestep_ray.errors import InputError

# Songs are sorted by length within windows of this many micro-batches: batches of nearly equal length, in an order that
# is still random.
WINDOW_BATCHES = 64
# Songs in an ordinary micro-batch, for sizing the window under a budget of frames.
TYPICAL_BATCH = 8


@dataclass(frozen=True)
class MicroBatch:
    """Songs that go through the model together."""

    epoch: int
    songs: tuple[int, ...]
    """Rows of the cache index."""


@dataclass(frozen=True)
class _Epoch:
    """The micro-batches of an epoch, as arrays: a tuple for each of a million would take ten times the memory."""

    songs: np.ndarray
    """Rows of the cache index."""
    begins: np.ndarray
    """Where each batch begins in `songs`, and where the last one ends."""
    order: np.ndarray
    """In which the batches come."""

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> tuple[int, ...]:
        batch = self.order[place]
        return tuple(self.songs[self.begins[batch] : self.begins[batch + 1]].tolist())


class BatchPlan:
    """The sequence of micro-batches of a run, by count (`batch_size`) or by a budget of padded frames."""

    def __init__(
        self,
        frames: np.ndarray,
        *,
        seed: int,
        micro_batches_per_step: int,
        batch_size: int = 1,
        batch_frames: int | None = None,
        held_out: Sequence[int] = (),
        shuffle_every: int = 1,
    ):
        """`frames` (songs,) are the songs' latent frames; songs `held_out` are in no micro-batch.

        Every `shuffle_every` epochs the songs get a new order, with 0 never.
        Raises InputError for a budget under the longest song.
        """
        self.songs = np.delete(np.arange(len(frames)), np.asarray(held_out, dtype=np.int64))
        frames = frames[self.songs]
        if batch_frames is not None and batch_frames < frames.max():
            raise InputError(
                f"a song has {frames.max()} latent frames, more than one micro-batch may hold",
                where=f"--batch_frames {batch_frames}",
                fix=f"give at least {frames.max()}",
            )
        self.frames = frames
        self.seed = seed
        self.micro_batches_per_step = micro_batches_per_step
        self.batch_size = batch_size
        self.batch_frames = batch_frames
        self.shuffle_every = shuffle_every
        # ends[e] is the number of micro-batches in epochs 0 … e; grown as far as it is asked for.
        self._ends: list[int] = []
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step `step`, counted from 0."""
        first = step * self.micro_batches_per_step
        return [self._micro_batch(first + i) for i in range(self.micro_batches_per_step)]

    @property
    def most_frames(self) -> int:
        """Latent frames, padding included, of a micro-batch at most."""
        return self.batch_frames or self.batch_size * int(self.frames.max())

    def steps_in_epochs(self, epochs: int) -> int:
        """Steps that begin within the first `epochs` epochs."""
        micro_batches = self._start(epochs)
        return -(-micro_batches // self.micro_batches_per_step)

    def _micro_batch(self, number: int) -> MicroBatch:
        if self.batch_frames is None:
            epoch, place = divmod(number, self._batches_by_count())
        else:
            while not self._ends or self._ends[-1] <= number:
                self._ends.append(self._start(len(self._ends)) + len(self._epoch(len(self._ends))))
            epoch = bisect_right(self._ends, number)
            place = number - self._start(epoch)
        return MicroBatch(epoch, self._epoch(epoch)[place])

    def _start(self, epoch: int) -> int:
        """The number of micro-batches before `epoch`."""
        if self.batch_frames is None:
            return epoch * self._batches_by_count()
        while len(self._ends) < epoch:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._epoch(len(self._ends))))
        return self._ends[epoch - 1] if epoch else 0

    def _batches_by_count(self) -> int:
        return -(-len(self.frames) // self.batch_size)

    def _plan_epoch(self, epoch: int) -> _Epoch:
        number = epoch // self.shuffle_every if self.shuffle_every else 0
        random = np.random.default_rng([self.seed, number])
        order = random.permutation(len(self.frames))
        window = WINDOW_BATCHES * (self.batch_size if self.batch_frames is None else TYPICAL_BATCH)
        begins: list[int] = []
        for start in range(0, len(order), window):
            songs = order[start : start + window]
            songs = songs[np.argsort(self.frames[songs], kind="stable")]
            order[start : start + window] = songs
            begins += self._cut(start, self.frames[songs])
        return _Epoch(self.songs[order], np.array([*begins, len(order)]), random.permutation(len(begins)))

    def _cut(self, start: int, frames: np.ndarray) -> Sequence[int]:
        """Where batches within the count or the budget begin, of songs from `start` on that are sorted by length."""
        if self.batch_frames is None:
            return range(start, start + len(frames), self.batch_size)
        begins = [start]
        for place, longest in enumerate(frames.tolist(), start):
            if place > begins[-1] and (place + 1 - begins[-1]) * longest > self.batch_frames:
                begins.append(place)
        return begins
