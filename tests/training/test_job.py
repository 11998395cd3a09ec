"""The train job on a real Ray cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import threading
from dataclasses import replace

import pytest
import soundfile
import torch
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from safetensors.torch import load

from acestep_ray.config import GenerateConfig
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.export.reading import LORA_FILE
from acestep_ray.generation.job import generate
from acestep_ray.storage import Store
from acestep_ray.training import launch
from acestep_ray.training.experiment import only_run
from acestep_ray.training.job import find_samples, train
from acestep_ray.training.launch import (
    fit_interruptibly,
    reserved_by_worker,
    run_worker,
    short_wait_for_lost_nodes,
)
from acestep_ray.training.lora_config import read_lora_config
from acestep_ray.training.settings import WorkerSettings, never
from acestep_ray.training.state import WEIGHTS_FILE
from acestep_ray.training.worker import TrainingDivergedError
from tests.cache.rows import reject, write_rows
from tests.training.conftest import (
    assert_close_weights,
    latest_weights,
    places_in,
    settings_in,
    short_run,
    train_alone,
)


@pytest.fixture
def config(checkpoint, tiny_cache, tmp_path):
    return short_run(
        checkpoint, tiny_cache, **places_in(tmp_path), exp_name="one", max_steps=3, warmup_steps=0
    )


def statuses(summary):
    path = summary.tracking_uri.removeprefix("sqlite:///")
    with sqlite3.connect(path) as database:
        return dict(database.execute("select name, status from runs"))


@pytest.mark.ray
def test_two_workers_train_what_one_does_and_a_finished_run_says_so(two_cpus, s3, config, tmp_path):
    config = replace(config, checkpoints_dir=s3.url("runs"))
    together = train(replace(config, exp_name="two", devices=2))
    assert together.result == f"{s3.url('runs')}/two/checkpoints/step={together.steps}/{LORA_FILE}"
    one = replace(config, accumulate_grad_batches=2)
    settings = settings_in(tmp_path, one, lora=read_lora_config(config.lora_config_path))
    alone = train_alone(settings)
    assert together.first_loss == pytest.approx(alone["first"], rel=1e-5)
    place = Store.at(together.result.rpartition("/")[0])
    assert_close_weights(load(place.read_bytes(WEIGHTS_FILE)), latest_weights(settings))
    assert statuses(together) == {"two": "FINISHED"}

    other = tmp_path / "other.json"
    other.write_text('{"r": 8, "target_modules": ["to_q", "to_v"]}', encoding="utf-8")
    with pytest.raises(InputError, match=r"LoRA r: 4 → 8(?s:.*)--allow_changes"):
        train(replace(config, exp_name="two", devices=2, lora_config_path=str(other)))
    again = train(replace(config, exp_name="two", devices=2))
    assert again.finished_before
    assert again.last_loss == together.last_loss
    assert "already finished" in again.render()


@pytest.mark.ray
@pytest.mark.faults
def test_all_weights_are_trained_by_two_workers_and_the_result_makes_music(two_cpus, config, tmp_path):
    base = replace(config, exp_name="base", lora_config_path=None, devices=2, learning_rate=3e-4)
    summary = train(base)
    alone = settings_in(tmp_path, replace(base, devices=1, accumulate_grad_batches=2), lora=None)
    assert summary.last_loss == pytest.approx(train_alone(alone)["last"], rel=1e-5)
    assert summary.result == summary.experiment.path / "ace_step_transformer"
    music = GenerateConfig(
        checkpoint_dir=config.checkpoint_dir,
        output_path=str(tmp_path / "music.wav"),
        prompt="calm",
        duration=2.0,
        infer_steps=2,
        device="cpu",
    )
    generate(replace(music, transformer_path=str(summary.result)))
    tuned, _ = soundfile.read(music.output_path)
    generate(music)
    released, _ = soundfile.read(music.output_path)
    assert tuned.shape == released.shape
    assert (tuned != released).any()

    shorter = train(replace(base, max_steps=2))
    assert shorter.finished_before
    assert shorter.steps == 3


def test_samples_are_told_by_step_and_other_sounds_in_their_folder_are_left_alone(tmp_path):
    for name in ("step=12/a.wav", "step=4/a.wav", "step=4/b.wav", "step=4/a.png", "mine.wav"):
        Store.at(tmp_path).write_bytes(name, b"")
    assert find_samples(Store.at(tmp_path)) == [
        tmp_path / name for name in ("step=4/a.wav", "step=4/b.wav", "step=12/a.wav")
    ]


@pytest.mark.ray
def test_more_workers_than_the_cluster_holds_are_refused(two_cpus, config):
    with pytest.raises(InputError, match="--devices 3"):
        train(replace(config, devices=3))


@pytest.mark.ray
@pytest.mark.faults
def test_an_error_of_the_loop_reaches_the_user_as_it_is(two_cpus, config):
    diverging = replace(config, learning_rate=1e30, gradient_clip_val=1e30, max_skipped_steps=2, ssl_coeff=0)
    with pytest.raises(Exception, match=r"the last \d steps before step 4 had no finite loss") as raised:
        train(replace(diverging, max_steps=4))
    assert type(raised.value).__name__ == "TrainingDivergedError"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_steps": 0}, "--max_steps 0"),
        ({"learning_rate": -1.0}, "--learning_rate -1.0"),
        ({"text_dropout": 1.5}, "--text_dropout 1.5"),
        ({"precision": "fp8"}, "--precision fp8"),
        ({"exp_name": "../elsewhere"}, "--exp_name"),
        ({"exp_name": ""}, "--exp_name"),
        ({"epochs": 0}, "--epochs 0"),
        ({"plot_seconds": 0.05}, "--plot_seconds 0.05"),
        ({"plot_seconds": 241.0}, "--plot_seconds 241.0"),
        ({"device": "tpu"}, "--device"),
        ({"gradient_clip_algorithm": "norms"}, "--gradient_clip_algorithm norms"),
        ({"batch_frames": 10}, "--batch_frames 10"),
        ({"train_parameters": "to_q"}, "--train_parameters"),
        ({"lora_config_path": None, "train_parameters": "to_qq,*.to_q"}, "`to_qq`"),
        ({"cpu_offload": True}, "--cpu_offload"),
        ({"min_devices": 2}, "--min_devices 2"),
        ({"val_songs": -1}, "--val_songs -1"),
        ({"ckpt_path": "nowhere"}, "--ckpt_path nowhere"),
        ({"activation_checkpointing": 2.0}, "--activation_checkpointing 2.0"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_named_before_work_starts(config, changes, named, no_work):
    with pytest.raises(InputError, match=named):
        train(replace(config, **changes))


@pytest.mark.parametrize("flag", ["exp_dir", "logger_dir"])
def test_a_folder_that_cannot_be_written_to_is_named_before_work_starts(config, flag, tmp_path, no_work):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"cannot write here(?s:.*)--{flag}"):
        train(replace(config, **{flag: str(tmp_path / "file" / "folder")}))


def test_a_second_run_of_one_name_is_refused_before_work_starts(config, tmp_path, no_work):
    (tmp_path / "exps" / "one").mkdir(parents=True)
    with only_run(tmp_path / "exps" / "one"), pytest.raises(InputError, match="under way"):
        train(config)


def test_a_cache_of_which_no_song_can_be_used_is_refused_before_work_starts(config, tmp_path, no_work):
    cache = write_rows(Store.at(tmp_path / "cache"), [], [reject("alpha"), reject("beta")])
    with pytest.raises(InputError, match=r"holds no songs(?s:.*)rejects/ say why"):
        train(replace(config, dataset_path=cache.url))
    assert not (tmp_path / "exps").exists()


def test_a_rank_larger_than_a_layer_is_refused_before_work_starts(config, tmp_path, no_work):
    places_in(tmp_path, r=1000)
    with pytest.raises(InputError, match=r"rank 1000 (?s:.*)to_q(?s:.*)at most"):
        train(config)
    assert not (tmp_path / "exps").exists()


def test_a_cache_without_ssl_features_needs_their_losses_off(config, tiny_cache, tmp_path, no_work):
    cache = tmp_path / "no-ssl"
    shutil.copytree(tiny_cache, cache)
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, "ssl": {}}))
    with pytest.raises(InputError, match="--ssl_coeff 0"):
        train(replace(config, dataset_path=str(cache)))


def test_a_cache_of_another_checkpoints_encoders_is_refused(config, tiny_cache, tmp_path, no_work):
    cache = tmp_path / "other"
    shutil.copytree(tiny_cache, cache)
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, "checkpoint": {"codec": "0" * 64}}))
    with pytest.raises(InputError, match=r"another codec than(?s:.*)--allow_changes"):
        train(replace(config, dataset_path=str(cache)))


@pytest.mark.parametrize(
    ("cpus", "devices", "share"), [(2, 1, 1.0), (2, 2, 0.5), (1, 1, 0.5), (16, 3, 1.0), (4, 6, 0.333)]
)
def test_workers_of_streamed_songs_leave_half_of_the_cpus_to_decoding(
    config, tmp_path, monkeypatch, cpus, devices, share
):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": float(cpus)})
    many = replace(config, devices=devices)
    streamed = WorkerSettings(many, {}, tmp_path, tmp_path, tmp_path, None, 1, stream=object())
    assert reserved_by_worker(streamed, use_gpu=False) == {"CPU": share}
    assert reserved_by_worker(streamed, use_gpu=True) is None
    assert reserved_by_worker(replace(streamed, stream=None), use_gpu=False) is None


@pytest.mark.parametrize(
    ("min_devices", "of_the_user", "seconds"),
    [(1, None, "5"), (1, "90", "90"), (2, None, None), (None, None, None)],
)
def test_a_run_that_can_do_with_fewer_workers_does_not_wait_long_for_a_lost_node(
    config, monkeypatch, min_devices, of_the_user, seconds
):
    variable = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    monkeypatch.delenv(variable, raising=False)
    if of_the_user is not None:
        monkeypatch.setenv(variable, of_the_user)
    with short_wait_for_lost_nodes(replace(config, devices=2, min_devices=min_devices)):
        assert os.environ.get(variable) == seconds
        assert get_env_vars_to_propagate().get(variable) == seconds  # what Ray Train takes along
    assert os.environ.get(variable) == of_the_user


@pytest.mark.parametrize(
    ("error", "workers", "is_raised"),
    [
        (AceStepError("a damaged song"), 1, False),
        (AceStepError("a damaged song"), 2, True),
        (TrainingDivergedError("nan"), 2, False),
    ],
)
def test_an_error_that_one_worker_alone_may_meet_ends_the_others_too(monkeypatch, error, workers, is_raised):
    class Context:
        get_world_rank = staticmethod(lambda: 0)
        get_world_size = staticmethod(lambda: workers)

    def fail(*_):
        raise error

    monkeypatch.setattr("ray.train.get_context", Context)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(launch, "train_worker", fail)
    if is_raised:
        with pytest.raises(AceStepError, match="a damaged song"):
            run_worker(None, print, never)
    else:
        assert run_worker(None, print, never) is error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_lets_the_run_come_to_its_end_and_handlers_are_put_back(number):
    asked = threading.Event()
    before = signal.getsignal(number)

    def fit():
        os.kill(os.getpid(), number)
        assert asked.wait(timeout=60)
        return "the last checkpoint"

    assert fit_interruptibly(fit, asked.set) == ("the last checkpoint", True)
    assert signal.getsignal(number) is before
    assert fit_interruptibly(lambda: "done", asked.set) == ("done", False)


def test_a_second_signal_ends_the_run_at_once():
    released = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        fit_interruptibly(
            lambda: [os.kill(os.getpid(), signal.SIGINT), released.wait(60)],
            lambda: os.kill(os.getpid(), signal.SIGINT),
        )
    released.set()


def test_an_error_of_the_run_comes_through(monkeypatch):
    def fit():
        raise AceStepError("no disk")

    with pytest.raises(AceStepError, match="no disk"):
        fit_interruptibly(fit, lambda: None)
