"""Which songs make up which step."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from acestep_ray.errors import InputError
from acestep_ray.training.sampler import BatchPlan

FRAMES = np.random.default_rng(0).integers(32, 2584, size=1000).astype(np.int32)
BY_COUNT = {"batch_size": 3}
BY_FRAMES = {"batch_frames": 6000}


def plan(seed=1, micro_batches=4, frames=FRAMES, **how):
    return BatchPlan(frames, seed=seed, micro_batches_per_step=micro_batches, **how)


def stream(a_plan, steps):
    return list(chain.from_iterable(a_plan.step(step) for step in range(steps)))


@pytest.mark.parametrize("how", [BY_COUNT, BY_FRAMES])
def test_every_song_comes_once_an_epoch(how):
    a_plan = plan(**how)
    batches = stream(a_plan, a_plan.steps_in_epochs(3))
    for epoch in range(3):
        songs = Counter(chain.from_iterable(b.songs for b in batches if b.epoch == epoch))
        assert songs == Counter(range(len(FRAMES)))


@pytest.mark.parametrize("how", [BY_COUNT, BY_FRAMES])
def test_a_step_is_the_same_whatever_was_asked_before(how):
    in_order = plan(**how)
    expected = [in_order.step(step) for step in range(400)]
    for step in (399, 0, 250):
        assert plan(**how).step(step) == expected[step]


@pytest.mark.parametrize("how", [BY_COUNT, BY_FRAMES])
def test_epochs_and_seeds_differ(how):
    def epoch(a_plan, number):
        return [b.songs for b in stream(a_plan, a_plan.steps_in_epochs(2)) if b.epoch == number]

    first = epoch(plan(**how), 0)
    assert epoch(plan(**how), 1) != first
    assert epoch(plan(seed=2, **how), 0) != first


@pytest.mark.parametrize("how", [BY_COUNT, BY_FRAMES])
def test_workers_and_accumulation_share_one_sequence(how):
    assert stream(plan(micro_batches=1, **how), 24) == stream(plan(micro_batches=6, **how), 4)


def test_batches_by_frames_keep_the_budget_and_waste_little_of_it():
    batches = [b for b in stream(plan(**BY_FRAMES), plan(**BY_FRAMES).steps_in_epochs(1)) if b.epoch == 0]
    padded = [len(b.songs) * FRAMES[list(b.songs)].max() for b in batches]
    valid = sum(FRAMES[list(b.songs)].sum() for b in batches)
    assert max(padded) <= BY_FRAMES["batch_frames"]
    assert valid / sum(padded) > 0.97


def test_a_dataset_smaller_than_a_step_goes_round():
    tiny = plan(frames=np.array([40, 50], dtype=np.int32), batch_size=1)
    assert [b.epoch for b in tiny.step(0)] == [0, 0, 1, 1]
    assert {b.songs for b in tiny.step(0)} == {(0,), (1,)}


def test_a_budget_below_the_longest_song_is_refused():
    with pytest.raises(InputError, match="--batch_frames"):
        plan(batch_frames=int(FRAMES.max()) - 1)


def test_an_epoch_of_many_songs_is_kept_as_arrays():
    epoch = plan(batch_size=3)._epoch(0)
    assert len(epoch) == len(epoch.order) == -(-len(FRAMES) // 3)
    assert sum(column.nbytes for column in (epoch.songs, epoch.begins, epoch.order)) <= 24 * len(FRAMES)


def test_the_plan_of_a_run_that_has_begun_stays_what_it_was():
    first = tuple(b.songs for b in stream(plan(**BY_FRAMES), 1)[:3])
    assert first == ((672, 381, 883, 544, 998, 448, 941, 255, 843), (549, 953), (236, 163, 980, 149))
