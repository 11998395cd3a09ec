"""A run of which everything is in object storage: it goes on elsewhere, is held by one, and says what it cannot do."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import soundfile
import yaml
from safetensors.torch import load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from acestep_ray.errors import InputError
from acestep_ray.export.reading import LORA_FILE
from acestep_ray.storage import Store, fetched, lease
from acestep_ray.training.experiment import check_unchanged, make_folder, note_identity, only_run
from acestep_ray.training.job import train
from acestep_ray.training.state import Checkpoints
from tests.training.conftest import (
    Killed,
    assert_close_weights,
    kill_at,
    places_in,
    settings_in,
    short_run,
    train_alone,
)


@pytest.fixture
def config(checkpoint, tiny_cache, tmp_path, s3):
    """Settings of a run that writes nothing to this machine."""
    place = s3.fresh()
    places = places_in(tmp_path) | {"exp_dir": f"{place}/exps", "logger_dir": f"{place}/logs"}
    return short_run(
        checkpoint, tiny_cache, **places, exp_name="one", max_steps=2, warmup_steps=0, tracking_uri="none"
    )


def scalars(place: Store, name: str) -> dict[int, float]:
    """What TensorBoard shows, by step."""
    with fetched(place) as folder:
        events = EventAccumulator(str(folder)).Reload().Scalars(name)
    return {event.step: event.value for event in events}


@pytest.mark.ray
@pytest.mark.faults
def test_a_run_in_object_storage_goes_on_from_there_with_nothing_on_this_machine(two_cpus, config, tmp_path):
    before = sorted(path.name for path in tmp_path.rglob("*"))
    first = train(config)
    experiment, logs = Store.at(config.exp_dir).child("one"), Store.at(config.logger_dir).child("one")
    assert first.result == experiment.url_of(f"checkpoints/step=2/{LORA_FILE}")
    assert yaml.safe_load(experiment.read_bytes("train.yaml"))["max_steps"] == 2
    assert first.samples == [experiment.url_of("samples/step=2/alpha.wav")]
    assert set(experiment.names("samples")) == {
        f"samples/step=2/alpha.{kind}" for kind in ("json", "png", "wav")
    }
    with fetched(experiment.child("samples/step=2")) as folder:
        assert soundfile.info(str(folder / "alpha.wav")).duration == pytest.approx(2.0, abs=0.1)
    assert not [name for name in experiment.names() if name.startswith(".")]  # the lease is given back

    again = train(config)
    assert again.finished_before
    assert len(logs.names()) == 1

    longer = train(replace(config, max_steps=3))
    assert longer.steps == 3
    assert not longer.finished_before
    assert len(logs.names()) == 2
    assert sorted(scalars(logs, "loss")) == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.rglob("*")) == before

    with pytest.raises(InputError, match=r"learning_rate: 0.003 → 0.1") as refused:
        train(replace(config, max_steps=4, learning_rate=0.1))
    assert experiment.url in str(refused.value)


def test_the_same_numbers_come_out_as_on_a_disk_also_after_a_kill(config, tmp_path, s3):
    config = replace(config, every_n_train_steps=1, max_steps=3)
    place = Store.at(s3.fresh())
    places = {name: place.child(name) for name in ("checkpoints", "samples")} | {
        "log_dir": place.child("logs")
    }
    settings = settings_in(tmp_path, config, **places)
    with pytest.raises(Killed):
        train_alone(settings, kill_at(2))
    outcome = train_alone(settings)
    local = settings_in(tmp_path / "local", config)
    assert outcome["last"] == train_alone(local)["last"]
    found = load(Checkpoints(settings.checkpoints).folder(3).read_bytes("trainable.safetensors"))
    expected = load(Checkpoints(local.checkpoints).folder(3).read_bytes("trainable.safetensors"))
    assert_close_weights(found, expected)
    assert sorted(place.names("samples")) == [
        f"samples/step=3/alpha.{kind}" for kind in ("json", "png", "wav")
    ]
    assert scalars(place.child("logs"), "loss").keys() == {0, 1, 2}


def test_a_sample_that_storage_does_not_take_ends_nothing(config, tmp_path, s3):
    settings = settings_in(
        tmp_path, replace(config, max_steps=1), samples=Store.at("s3://no-such-bucket/samples")
    )
    said = []
    assert train_alone(settings, say=lambda line: said.append(str(line)))["step"] == 1
    assert sum("no sample at step 1" in line and "no-such-bucket" in line for line in said) == 1


def test_mlflows_own_database_is_not_looked_for_in_object_storage(config, no_work):
    with pytest.raises(InputError, match=r"--logger_dir s3://(?s:.*)--tracking_uri"):
        train(replace(config, tracking_uri=None))


def test_a_checkpoint_directory_in_object_storage_is_refused_with_what_to_do(config, s3, no_work):
    with pytest.raises(InputError, match=r"read from a disk(?s:.*)s3://(?s:.*)on every node"):
        train(replace(config, checkpoint_dir=s3.url("checkpoint")))


@pytest.mark.parametrize("flag", ["exp_dir", "logger_dir"])
def test_storage_that_takes_nothing_is_named_before_work_starts(config, flag, no_work):
    with pytest.raises(InputError, match="the bucket does not exist: s3://no-such-bucket"):
        train(replace(config, **{flag: "s3://no-such-bucket/folder"}))
    with pytest.raises(InputError, match="hf:// is read from, not written to"):
        train(replace(config, **{flag: "hf://datasets/user/songs"}))


def test_a_second_run_of_one_name_is_refused_before_work_starts(config, no_work, monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.3)
    experiment = Store.at(config.exp_dir).child("one")
    with only_run(experiment), pytest.raises(InputError, match="under way"):
        train(config)


def test_what_a_run_was_started_with_is_noted_and_compared_there(s3):
    experiment = Store.at(s3.fresh())
    make_folder(experiment, "--exp_dir")
    assert experiment.names() == {}
    check_unchanged(experiment, {"--seed": 1}, allow_changes=False)
    note_identity(experiment, {"--seed": 1})
    check_unchanged(experiment, {"--seed": 1}, allow_changes=False)
    with pytest.raises(InputError, match="--seed: 1 → 2"):
        check_unchanged(experiment, {"--seed": 2}, allow_changes=False)
    assert json.loads(experiment.read_bytes("run.json")) == {"--seed": 1}
