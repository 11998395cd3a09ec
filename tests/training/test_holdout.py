"""Songs that are kept from training."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from acestep_ray.cache.index import CacheIndex
from acestep_ray.config import TrainConfig
from acestep_ray.errors import InputError
from acestep_ray.training.holdout import hold_out, recordings_of_cache
from acestep_ray.training.state import Checkpoints
from acestep_ray.training.validation import VALIDATION
from acestep_ray.training.worker import build_plan
from tests.training.conftest import scalars, settings_in, short_run, train_alone

SONGS = [f"song {i}" for i in range(100)]


def test_one_in_twenty_is_held_out_and_few_songs_are_all_trained_on():
    assert len(hold_out(SONGS, None)) == 5
    assert len(hold_out([f"song {i}" for i in range(1000)], None)) == 8
    assert len(hold_out(SONGS[:19], None)) == 0
    assert len(hold_out(SONGS, 0)) == 0


def test_rows_of_one_recording_are_held_out_together():
    rows = [song for song in SONGS for _ in range(3)]
    held_out = hold_out(rows, 4)
    names = {rows[i] for i in held_out}
    assert len(names) == 4
    assert len(held_out) == 12
    assert list(held_out) == sorted(held_out)


def test_the_choice_does_not_depend_on_order_or_on_a_few_more_songs():
    names = {SONGS[i] for i in hold_out(SONGS, 5)}
    turned = SONGS[::-1]
    assert {turned[i] for i in hold_out(turned, 5)} == names
    more = [*SONGS, "another", "and another"]
    assert len({more[i] for i in hold_out(more, 5)} & names) >= 3


def test_a_song_must_be_left_to_train_on():
    with pytest.raises(InputError, match=r"there are 3 recordings, and 3(?s:.*)--val_songs 3"):
        hold_out(["a", "b", "c", "c"], 3)


def test_a_plan_never_holds_what_is_held_out():
    frames = np.arange(30, 130)
    config = TrainConfig(dataset_path="", checkpoint_dir="", batch_size=3)
    held_out = hold_out(SONGS, 10)
    plan = build_plan(frames, config, held_out)
    steps = plan.steps_in_epochs(1)
    seen = [song for step in range(steps) for item in plan.step(step) for song in item.songs]
    assert sorted(seen) == sorted(set(range(100)) - set(held_out.tolist()))


def test_songs_can_keep_their_order_for_some_epochs():
    frames = np.arange(30, 130)
    config = TrainConfig(dataset_path="", checkpoint_dir="", reload_dataloaders_every_n_epochs=2)
    plan = build_plan(frames, config)
    epochs = [[plan.step(100 * epoch + step)[0].songs for step in range(100)] for epoch in range(4)]
    assert epochs[0] == epochs[1] != epochs[2] == epochs[3]
    never = build_plan(frames, replace(config, reload_dataloaders_every_n_epochs=0))
    assert [never.step(500 + step)[0].songs for step in range(100)] == epochs[0]


def test_a_recording_is_known_by_its_audio(tiny_cache):
    index = CacheIndex.open(tiny_cache)
    assert recordings_of_cache(index) == ["0" * 64] * 3


@pytest.fixture
def settings(checkpoint, tiny_cache, tmp_path):
    config = short_run(checkpoint, tiny_cache, max_steps=12, val_check_interval=2)
    return settings_in(tmp_path, config, held_out=(1,))


def test_held_out_songs_have_a_loss_of_their_own(settings):
    losses = train_alone(settings)
    assert list(losses[VALIDATION]) == ["0", "2", "4", "6", "8", "10", "12"]
    assert losses[VALIDATION]["12"] != losses["fixed_noise"]["12"]
    assert list(scalars(settings, "loss/validation/q4")) == list(range(0, 13, 2))


@pytest.mark.parametrize(
    "validation",
    [[8.0, 4.0, 3.0, 5.0, 3.5, 1.0], [math.nan, 8.0, 4.0, 5.0, 4.5, 1.0], [9.0, 8.0, 7.0, *[math.nan] * 3]],
)
def test_a_run_ends_with_a_checkpoint_when_the_validation_loss_falls_no_more(
    settings, monkeypatch, validation
):
    losses = iter(validation)

    def fixed_noise_losses(transformer, read, songs, *_, **__):
        return [next(losses) if songs == [1] else 7.0] * 8

    monkeypatch.setattr("acestep_ray.training.worker.fixed_noise_losses", fixed_noise_losses)
    config = replace(settings.config, early_stopping_patience=2)
    ended = train_alone(replace(settings, config=config))
    assert (ended["step"], ended["stopped_early"]) == (8, 8)
    assert Checkpoints(settings.checkpoints).steps() == [8]
