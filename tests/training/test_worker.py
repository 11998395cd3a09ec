"""The training loop on a tiny model: it learns, it resumes exactly, it writes what it should."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import soundfile
import torch

from acestep_ray.config import TrainConfig
from acestep_ray.export.lora import LORA_FILE
from acestep_ray.training.state import Checkpoints
from acestep_ray.training.worker import TrainingDivergedError
from tests.training.conftest import Killed, latest_weights, settings_in, train_alone


@pytest.fixture
def settings(checkpoint, tiny_cache, tmp_path):
    config = TrainConfig(
        dataset_path=str(tiny_cache),
        checkpoint_dir=str(checkpoint.path),
        learning_rate=3e-3,
        max_steps=6,
        batch_size=2,
        precision="32",
        num_workers=2,
        every_n_train_steps=2,
        every_plot_step=1000,
        plot_seconds=3.0,
    )
    return settings_in(tmp_path / "run", config)


def test_two_hundred_steps_on_one_song_lower_its_fixed_noise_loss(settings, write_tiny_cache):
    config = replace(
        settings.config,
        dataset_path=str(write_tiny_cache("gamma")),
        max_steps=200,
        batch_size=1,
        every_n_train_steps=200,
    )
    losses = train_alone(replace(settings, config=config, total_steps=200))
    before, after = losses["fixed_noise"]["0"], losses["fixed_noise"]["200"]
    assert after < 0.7 * before


@pytest.mark.parametrize("killed_at", [2, 4])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(settings, tmp_path, killed_at):
    lora = {**settings.lora, "lora_dropout": 0.2}
    settings = replace(settings, lora=lora)

    def kill(metrics, path):
        if metrics["step"] == killed_at:
            raise Killed

    with pytest.raises(Killed):
        train_alone(settings, kill)
    assert Checkpoints(settings.checkpoints).steps()[-1] == killed_at
    resumed = train_alone(settings)

    unbroken = replace(settings_in(tmp_path / "unbroken", settings.config), lora=lora)
    expected = train_alone(unbroken)
    assert resumed["last"] == expected["last"]
    assert resumed["first"] == expected["first"]
    found = latest_weights(settings)
    for name, value in latest_weights(unbroken).items():
        assert torch.equal(found[name], value), name


def test_accumulated_micro_batches_are_one_batch(settings, tmp_path):
    # Three songs: one step over all of them, as one batch of three or as three batches of one.
    one_batch = replace(settings.config, batch_size=3, max_steps=2, every_n_train_steps=2)
    many = replace(one_batch, batch_size=1, accumulate_grad_batches=3)
    first, second = settings_in(tmp_path / "one", one_batch), settings_in(tmp_path / "many", many)
    assert train_alone(first)["first"] == pytest.approx(train_alone(second)["first"], rel=1e-5)
    found = latest_weights(second)
    for name, value in latest_weights(first).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_it_reports_and_saves_at_its_pace_and_at_the_end(settings):
    reported = []
    config = replace(settings.config, max_steps=5)
    train_alone(
        replace(settings, config=config, total_steps=5),
        lambda metrics, place: reported.append((metrics["step"], place)),
    )
    assert [step for step, _ in reported] == [2, 4, 5]
    assert all(place.status(LORA_FILE) for _, place in reported)


def test_every_step_is_in_tensorboard_once_also_after_a_resume(settings):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def kill(metrics, path):
        if metrics["step"] == 4:
            raise Killed

    with pytest.raises(Killed):
        train_alone(settings, kill)
    train_alone(settings)
    events = EventAccumulator(str(settings.log_dir)).Reload()
    for name in ("loss", "loss/denoising", "loss/mert", "loss/m-hubert", "grad_norm", "learning_rate"):
        assert [event.step for event in events.Scalars(name)] == list(range(6)), name
    assert [event.step for event in events.Scalars("loss/fixed_noise")] == [0, 6]


def test_it_leaves_a_sample_that_plays(settings):
    train_alone(settings)
    (sample,) = settings.samples.rglob("*.wav")
    samples, rate = soundfile.read(sample)
    assert sample.parent.name == "step=6"
    assert rate == 48_000
    assert samples.shape[1] == 2
    assert 2.5 < len(samples) / rate < 3.1
    assert samples.std() > 0.01


def test_state_is_plain_json_with_the_step(settings):
    train_alone(settings)
    state = json.loads(settings.checkpoints.read_bytes("step=6/state.json"))
    assert state["step"] == 6
    assert set(state["losses"]["fixed_noise"]) == {"0", "6"}


def test_a_loss_that_is_no_number_ends_the_run_with_advice(settings):
    config = replace(
        settings.config, learning_rate=1e30, warmup_steps=0, gradient_clip_val=1e30, max_steps=60
    )
    with pytest.raises(TrainingDivergedError, match="--learning_rate"):
        train_alone(replace(settings, config=config, total_steps=60))
