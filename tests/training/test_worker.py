"""The training loop on a tiny model: it learns, it resumes exactly, it writes what it should."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import soundfile
import torch
from safetensors.torch import load

from acestep_ray.cache.index import CacheIndex
from acestep_ray.config import TrainConfig
from acestep_ray.export.lora import LORA_FILE
from acestep_ray.training import worker
from acestep_ray.training.batch import build_batch
from acestep_ray.training.state import Checkpoints
from acestep_ray.training.worker import TrainingDivergedError, WorkerPlace, build_plan, train_worker
from tests.training.conftest import Killed, latest_weights, settings_in, train_alone

RATES = ("steps_per_second", "songs_per_second", "audio_seconds_per_second", "tflops", "data_wait")


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


def test_a_sample_that_fails_is_told_and_ends_nothing(settings, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(worker, "write_sample", fail)
    told = []
    assert train_alone(settings, say=told.append)["step"] == 6
    (warning,) = (line for line in told if "no sample" in line)
    assert "step 6: OutOfMemoryError: CUDA out of memory" in warning
    assert Checkpoints(settings.checkpoints).steps()[-1] == 6
    assert not list(settings.samples.rglob("*.wav"))


def test_state_is_plain_json_with_the_step(settings):
    train_alone(settings)
    state = json.loads(settings.checkpoints.read_bytes("step=6/state.json"))
    assert state["step"] == 6
    assert set(state["losses"]["fixed_noise"]) == {"0", "6"}


def with_broken_songs(monkeypatch, *keys: str) -> None:
    """These songs have a latent that is not a number."""

    def build(songs, *arguments, **options):
        songs = [replace(s, latents=s.latents * math.nan) if s.key in keys else s for s in songs]
        return build_batch(songs, *arguments, **options)

    monkeypatch.setattr(worker, "build_batch", build)


def test_a_step_without_a_finite_loss_is_skipped_and_its_song_named(settings, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one_song = replace(settings.config, batch_size=1, max_steps=6)
    settings = replace(settings, config=one_song)
    plan = build_plan(CacheIndex.open(one_song.dataset_path).latent_frames, one_song)
    beta = list(CacheIndex.open(one_song.dataset_path).keys).index("beta")
    with_broken_songs(monkeypatch, "beta")
    told = []
    losses = train_alone(settings, say=told.append)
    skipped = [step for step in range(6) if plan.step(step)[0].songs == (beta,)]
    assert losses["skipped"] == len(skipped) == 2
    assert math.isfinite(losses["last"])
    warnings = [line for line in told if "skipped" in line]
    assert [line.split(" (")[0] for line in warnings] == [
        f"warning: step {step} is skipped: the loss of beta is not finite" for step in skipped
    ]
    assert all(value.isfinite().all() for value in latest_weights(settings).values())
    events = EventAccumulator(str(settings.log_dir)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [s for s in range(6) if s not in skipped]


def test_a_skipped_step_leaves_weights_and_moments_as_they_were(settings, monkeypatch):
    settings = replace(settings, config=replace(settings.config, max_steps=4), total_steps=4)
    with_broken_songs(monkeypatch, "alpha", "beta", "gamma")
    train_alone(settings)
    untrained = {name: value.clone() for name, value in latest_weights(settings).items()}
    for name, value in untrained.items():
        assert ("lora_B" in name) == (not value.any()), name
    moments = load(settings.checkpoints.read_bytes("step=4/optimizer.safetensors"))
    assert moments == {}


def test_too_many_skipped_steps_in_a_row_end_the_run_with_advice_and_a_checkpoint(settings, monkeypatch):
    with_broken_songs(monkeypatch, "alpha", "beta", "gamma")
    config = replace(settings.config, max_skipped_steps=3, every_n_train_steps=100)
    with pytest.raises(TrainingDivergedError, match=r"before step 6(?s:.*)step=6\n(?s:.*)--learning_rate"):
        train_alone(replace(settings, config=config))
    assert Checkpoints(settings.checkpoints).steps() == [6]


def test_a_run_tells_how_fast_it_is_and_what_it_waits_for(settings):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(settings.config, max_steps=20)
    train_alone(replace(settings, config=config, total_steps=20))
    events = EventAccumulator(str(settings.log_dir)).Reload()
    rate = {name: [e.value for e in events.Scalars(f"throughput/{name}")][-1] for name in RATES}
    assert rate["songs_per_second"] / rate["steps_per_second"] == pytest.approx(
        1.5, abs=0.51
    )  # 2 and 1 in turns
    seconds = rate["audio_seconds_per_second"] / rate["songs_per_second"]
    assert 3.0 < seconds < 6.5  # of a song
    assert rate["tflops"] > 0
    assert 0 <= rate["data_wait"] < 1
    assert [e.value for e in events.Scalars("memory/allocated_gb")][-1] > 0.1
    assert "throughput/mfu" not in events.Tags()["scalars"]  # nobody knows a CPU's peak


def test_the_validation_of_the_step_that_a_run_resumes_from_stays_in_tensorboard(settings):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = replace(settings, config=replace(settings.config, val_check_interval=4))

    def kill(metrics, path):
        if metrics["step"] == 4:
            raise Killed

    with pytest.raises(Killed):
        train_alone(settings, kill)
    train_alone(settings)
    events = EventAccumulator(str(settings.log_dir)).Reload()
    for name in ("loss/fixed_noise", "loss/fixed_noise/q1"):
        assert [event.step for event in events.Scalars(name)] == [0, 4, 6], name


def test_a_machine_that_is_about_to_go_is_reason_to_save_once(settings):
    config = replace(settings.config, max_steps=25, every_n_train_steps=100)
    settings = replace(settings, config=config, total_steps=25)
    asked = []
    place = WorkerPlace(0, 1, torch.device("cpu"), preempted=lambda: not asked.append(1))
    train_worker(settings, place, lambda metrics, place: None, lambda line: None)
    assert Checkpoints(settings.checkpoints).steps() == [10, 25]
    assert len(asked) == 1
