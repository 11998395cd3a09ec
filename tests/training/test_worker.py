"""The training loop on a tiny model: it learns, it resumes exactly, it writes what it should."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import replace

import pytest
import soundfile
import torch
from safetensors.torch import load

from acestep_ray.cache.index import CacheIndex
from acestep_ray.errors import AceStepError, GpuMemoryError
from acestep_ray.export.reading import LORA_FILE
from acestep_ray.storage import StorageError, Store
from acestep_ray.training import state as state_module
from acestep_ray.training import worker
from acestep_ray.training.gpu_memory import ways_to_save
from acestep_ray.training.settings import WorkerPlace, WorkerSettings
from acestep_ray.training.state import OPTIMIZER_FILE, STATE_FILE, WEIGHTS_FILE, Checkpoints
from acestep_ray.training.worker import TrainingDivergedError, build_plan, train_worker
from tests.training.conftest import (
    SECONDS,
    Killed,
    assert_close_weights,
    assert_same_weights,
    kill_at,
    latest_weights,
    scalars,
    settings_in,
    short_run,
    train_alone,
)

RATES = ("steps_per_second", "songs_per_second", "audio_seconds_per_second", "tflops", "data_wait")

OFFLOAD = "--cpu_offload true"


@pytest.fixture
def settings(checkpoint, tiny_cache, tmp_path):
    config = short_run(
        checkpoint,
        tiny_cache,
        max_steps=6,
        batch_size=2,
        num_workers=2,
        every_n_train_steps=2,
        plot_seconds=3.0,
    )
    return settings_in(tmp_path / "run", config)


@pytest.fixture(scope="module")
def broken_cache(write_tiny_cache):
    """All songs have a NaN in their latents."""
    return write_tiny_cache(*SECONDS, broken=list(SECONDS))


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

    with pytest.raises(Killed):
        train_alone(settings, kill_at(killed_at))
    assert Checkpoints(settings.checkpoints).steps()[-1] == killed_at
    resumed = train_alone(settings)

    unbroken = replace(settings_in(tmp_path / "unbroken", settings.config), lora=lora)
    expected = train_alone(unbroken)
    assert resumed["last"] == expected["last"]
    assert resumed["first"] == expected["first"]
    assert_same_weights(settings, unbroken)


def test_storage_that_fails_now_and_then_while_saving_changes_nothing(settings, tmp_path, monkeypatch):
    expected = train_alone(settings_in(tmp_path / "calm", settings.config))
    write, failed = Store.write_bytes, []

    def write_or_fail(self: Store, name: str, content: bytes) -> None:
        # Each checkpoint fails once, at another of its files.
        step = int(self.url.rpartition("=")[2])
        fails_at = {2: WEIGHTS_FILE, 4: OPTIMIZER_FILE, 6: STATE_FILE}[step]
        if name == fails_at and step not in failed:
            failed.append(step)
            raise StorageError("slow down") if step == 2 else OSError(errno.EIO, "Input/output error")
        write(self, name, content)

    monkeypatch.setattr(Store, "write_bytes", write_or_fail)
    monkeypatch.setattr(state_module, "_RETRY_AFTER_SECONDS", (0.0,))
    assert train_alone(settings) == expected
    assert failed == Checkpoints(settings.checkpoints).steps() == [2, 4, 6]
    assert_same_weights(settings, settings_in(tmp_path / "calm", settings.config))


def test_a_disk_that_is_full_ends_a_run_with_one_message_and_with_room_it_goes_on(
    settings, tmp_path, monkeypatch
):
    unbroken = settings_in(tmp_path / "unbroken", settings.config)
    expected = train_alone(unbroken)
    write = Store.write_bytes

    def write_or_fail(self: Store, name: str, content: bytes) -> None:
        if self.url.endswith("step=4") and name == OPTIMIZER_FILE:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, content)

    with monkeypatch.context() as full:
        full.setattr(Store, "write_bytes", write_or_fail)
        with pytest.raises(AceStepError) as ended:
            train_alone(settings)
    assert "step 4 cannot be written" in str(ended.value)
    assert "No space left on device" in str(ended.value)
    assert "goes on from step 2" in str(ended.value)
    assert Checkpoints(settings.checkpoints).steps() == [2]
    assert train_alone(settings) == expected
    assert_same_weights(settings, unbroken)


def test_accumulated_micro_batches_are_one_batch(settings, tmp_path):
    # Three songs: one step over all of them, as one batch of three or as three batches of one.
    one_batch = replace(settings.config, batch_size=3, max_steps=2, every_n_train_steps=2)
    many = replace(one_batch, batch_size=1, accumulate_grad_batches=3)
    first, second = settings_in(tmp_path / "one", one_batch), settings_in(tmp_path / "many", many)
    assert train_alone(first)["first"] == pytest.approx(train_alone(second)["first"], rel=1e-5)
    assert_close_weights(latest_weights(second), latest_weights(first))


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
    with pytest.raises(Killed):
        train_alone(settings, kill_at(4))
    train_alone(settings)
    for name in ("loss", "loss/denoising", "loss/mert", "loss/m-hubert", "grad_norm", "learning_rate"):
        assert list(scalars(settings, name)) == list(range(6)), name
    assert list(scalars(settings, "loss/fixed_noise")) == [0, 6]


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_it_leaves_a_sample_that_plays(settings, precision):
    settings = replace(settings, config=replace(settings.config, precision=precision))
    train_alone(settings)
    (sample,) = settings.samples.path.rglob("*.wav")
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
    assert train_alone(settings, say=lambda line: told.append(str(line)))["step"] == 6
    (warning,) = (line for line in told if "no sample" in line)
    assert "step 6: OutOfMemoryError: CUDA out of memory" in warning
    assert Checkpoints(settings.checkpoints).steps()[-1] == 6
    assert not list(settings.samples.path.rglob("*.wav"))


@pytest.mark.parametrize(
    ("changes", "is_lora", "ways"),
    [
        ({}, True, ["--activation_checkpointing 1", "--quantize_base nf4"]),
        ({"batch_size": 4, "activation_checkpointing": 1.0}, True, ["--batch_size 1", "--quantize_base nf4"]),
        (
            {"batch_frames": 9000, "quantize_base": "int8"},
            True,
            ["--batch_frames below 9000", "--activation_checkpointing 1"],
        ),
        (
            {"activation_checkpointing": 0.5},
            False,
            ["--activation_checkpointing 1", "more --devices", OFFLOAD],
        ),
        ({"cpu_offload": True, "activation_checkpointing": 1.0}, False, ["more --devices"]),
    ],
)
def test_what_is_left_to_do_about_memory_follows_from_the_settings(settings, changes, is_lora, ways):
    config = replace(settings.config, **{"batch_size": 1, "activation_checkpointing": 0.0, **changes})
    assert ways_to_save(config, is_lora=is_lora)[:-1] == ways


def test_a_gpu_that_is_too_small_is_told(settings, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 64.00 MiB. GPU 0 has 15.56 MiB free. If reserved but unallocated "
            "memory is large try setting PYTORCH_ALLOC_CONF"
        )

    monkeypatch.setattr(worker.Trainer, "train_step", fail)
    with pytest.raises(GpuMemoryError) as raised:
        train_alone(settings)
    reason, advice = str(raised.value).splitlines()
    assert reason.endswith("Tried to allocate 64.00 MiB. GPU 0 has 15.56 MiB free.")
    assert all(way in advice for way in ways_to_save(settings.config, is_lora=True))


def test_state_is_plain_json_with_the_step(settings):
    train_alone(settings)
    state = json.loads(settings.checkpoints.read_bytes("step=6/state.json"))
    assert state["step"] == 6
    assert set(state["losses"]["fixed_noise"]) == {"0", "6"}


def test_a_step_without_a_finite_loss_is_skipped_and_its_song_named(settings, write_tiny_cache):
    cache = write_tiny_cache(*SECONDS, broken=["beta"])
    one_song = replace(settings.config, dataset_path=str(cache), batch_size=1, max_steps=6)
    settings = replace(settings, config=one_song)
    index = CacheIndex.open(cache)
    plan = build_plan(index.latent_frames, one_song)
    told = []
    losses = train_alone(settings, say=lambda line: told.append(str(line)))
    skipped = [step for step in range(6) if plan.step(step)[0].songs == (index.position("beta"),)]
    assert losses["skipped"] == len(skipped) == 2
    assert math.isfinite(losses["last"])
    warnings = [line for line in told if "skipped" in line]
    assert [line.split(" (")[0] for line in warnings] == [
        f"warning: step {step} is skipped: the loss of beta is not finite" for step in skipped
    ]
    assert all(value.isfinite().all() for value in latest_weights(settings).values())
    assert list(scalars(settings, "loss")) == [s for s in range(6) if s not in skipped]
    # Two values of the validation can be compared all the same: they are of the other songs.
    assert all(map(math.isfinite, losses["fixed_noise"].values()))
    assert len(losses["fixed_noise"]) == len([line for line in told if "beta is left out" in line]) == 2


def test_a_skipped_step_leaves_weights_and_moments_as_they_were(settings, broken_cache):
    config = replace(settings.config, dataset_path=str(broken_cache), max_steps=4)
    settings = replace(settings, config=config, total_steps=4)
    train_alone(settings)
    untrained = {name: value.clone() for name, value in latest_weights(settings).items()}
    for name, value in untrained.items():
        assert ("lora_B" in name) == (not value.any()), name
    moments = load(settings.checkpoints.read_bytes("step=4/optimizer.safetensors"))
    assert moments == {}


def test_too_many_skipped_steps_in_a_row_end_the_run_with_advice_and_a_checkpoint(settings, broken_cache):
    config = replace(
        settings.config, dataset_path=str(broken_cache), max_skipped_steps=3, every_n_train_steps=100
    )
    with pytest.raises(TrainingDivergedError, match=r"before step 6(?s:.*)step=6\n(?s:.*)--learning_rate"):
        train_alone(replace(settings, config=config))
    assert Checkpoints(settings.checkpoints).steps() == [6]


def last(settings: WorkerSettings, name: str) -> float:
    """The latest value of a metric."""
    return list(scalars(settings, name).values())[-1]


def test_a_run_tells_how_fast_it_is_and_what_it_waits_for(settings):
    config = replace(settings.config, max_steps=20)
    train_alone(replace(settings, config=config, total_steps=20))
    rate = {name: last(settings, f"throughput/{name}") for name in RATES}
    assert rate["songs_per_second"] / rate["steps_per_second"] == pytest.approx(
        1.5, abs=0.51
    )  # 2 and 1 in turns
    seconds = rate["audio_seconds_per_second"] / rate["songs_per_second"]
    assert 3.0 < seconds < 6.5  # of a song
    assert rate["tflops"] > 0
    assert 0 <= rate["data_wait"] < 1
    assert last(settings, "memory/allocated_gb") > 0.1
    with pytest.raises(KeyError):
        scalars(settings, "throughput/mfu")  # nobody knows a CPU's peak


def test_the_validation_of_the_step_that_a_run_resumes_from_stays_in_tensorboard(settings):
    settings = replace(settings, config=replace(settings.config, val_check_interval=4))

    with pytest.raises(Killed):
        train_alone(settings, kill_at(4))
    train_alone(settings)
    for name in ("loss/fixed_noise", "loss/fixed_noise/q1"):
        assert list(scalars(settings, name)) == [0, 4, 6], name


def test_a_machine_that_is_about_to_go_is_reason_to_save_once(settings):
    config = replace(settings.config, max_steps=25, every_n_train_steps=100)
    settings = replace(settings, config=config, total_steps=25)
    asked = []
    place = WorkerPlace(0, 1, torch.device("cpu"), preempted=lambda: not asked.append(1))
    train_worker(settings, place, lambda metrics, place: None, lambda line: None)
    assert Checkpoints(settings.checkpoints).steps() == [10, 25]
    assert len(asked) == 1
