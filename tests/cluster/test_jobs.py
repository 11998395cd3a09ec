"""Pipelines as `ray job submit` runs them, on a head and two nodes: what a laptop does, in other places."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from ray.job_submission import JobStatus

from acestep_ray.cache.stored import find_rows
from acestep_ray.cache.verify import verify_cache
from acestep_ray.config import PrecomputeConfig, TrainConfig
from acestep_ray.data.demo import write_demo_songs
from acestep_ray.data.schema import open_dataset
from acestep_ray.errors import EXIT_INPUT
from acestep_ray.storage import Store
from acestep_ray.training.lora_config import read_lora_config
from acestep_ray.training.state import Checkpoints
from acestep_ray.tuning.records import DONE, Records
from cluster.local.nodes import CPU_NODE, GPU_NODE
from tests.cache.runs import encode_directly, rows_of
from tests.cluster.checks import check_winner
from tests.cluster.jobs import ROOT, TRIAL, command
from tests.training.conftest import (
    assert_close_weights,
    latest_weights,
    places_in,
    settings_in,
    short_run,
    train_alone,
)

pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.timeout(600)]

STEPS = 24
SAVED_EVERY = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def dataset(jobs, folder) -> Path:
    """Songs that were prepared through the command line."""
    write_demo_songs(folder / "songs")
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "ray.scripts.scripts",
                "job",
                "submit",
                "--address",
                jobs.cluster.dashboard,
            ),
            *("--working-dir", ROOT, "--"),
            *shlex.split(
                command("prepare", data_dir=folder / "songs", output_dir=folder / "dataset", repeat_count=2)
            ),
        ],
        env={**os.environ, **jobs.cluster.environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^rows +16 train", done.stdout, re.MULTILINE)
    return folder / "dataset"


@pytest.fixture(scope="module")
def config(dataset, checkpoint, folder) -> PrecomputeConfig:
    return PrecomputeConfig(
        dataset_path=str(dataset),
        checkpoint_dir=str(checkpoint.path),
        output_dir=str(folder / "cache"),
        features="latents,text",
        decode_resource=CPU_NODE,
        encode_resource=GPU_NODE,
    )


@pytest.fixture(scope="module")
def cache(jobs, config) -> Path:
    """A cache whose job was stopped in the middle, and handed in again."""
    folder = Path(config.output_dir)
    job = jobs.submit("precompute", **vars(config))
    jobs.wait_until(lambda: any(folder.glob(".incoming/ledgers/*.parquet")), job)
    assert jobs.stop(job).status == JobStatus.STOPPED
    stored = len(find_rows(Store.at(folder)))
    said = jobs.run("precompute", **vars(config))
    assert f"16 = {12 - stored} samples + 4 rejects + {stored} unchanged" in said
    return folder


@pytest.fixture(scope="module")
def train_config(cache, checkpoint, folder) -> TrainConfig:
    return short_run(
        checkpoint,
        cache,
        **places_in(folder),
        exp_name="two-nodes",
        tracking_uri="none",
        max_steps=STEPS,
        ssl_coeff=0,
        every_n_train_steps=SAVED_EVERY,
        plot_seconds=0.5,
        devices=2,
    )


@pytest.fixture(scope="module")
def trained(jobs, train_config) -> Path:
    """An experiment whose job was stopped in the middle, and handed in again."""
    experiment = Path(train_config.exp_dir) / train_config.exp_name
    checkpoints = Checkpoints(Store.at(experiment / "checkpoints"))
    job = jobs.submit("train", **vars(train_config))
    jobs.wait_until(lambda: len(checkpoints.steps()) >= 1, job)
    assert jobs.stop(job).status == JobStatus.STOPPED
    last = checkpoints.steps()[-1]
    assert last < STEPS
    assert f"stopped at step {last}, which is saved" in jobs.client.get_job_logs(job)
    said = jobs.run("train", **vars(train_config))
    assert f"checkpoints/step={STEPS}/pytorch_lora_weights.safetensors" in said
    return experiment


def test_a_mistake_fails_the_job_with_its_message_and_exit_code_2(jobs, folder, checkpoint):
    job = jobs.submit(
        "precompute", dataset_path=folder / "nowhere", checkpoint_dir=checkpoint.path, output_dir=folder
    )
    details = jobs.wait(job)
    assert (details.status, details.driver_exit_code) == (JobStatus.FAILED, EXIT_INPUT)
    assert f"error: the dataset does not exist: {folder / 'nowhere'}" in details.message
    assert "Traceback" not in jobs.client.get_job_logs(job)


def test_a_cache_made_on_two_nodes_has_the_rows_of_one(cache, config, checkpoint):
    rows, rejects = rows_of(cache), rows_of(cache, "rejects")
    songs = {row["keys"]: row for row in open_dataset(config.dataset_path)}
    assert sorted([*rows, *rejects]) == sorted(songs)
    assert {row["reason"] for row in rejects.values()} == {"silent", "corrupt"}
    for key, row in rows.items():
        assert row == encode_directly(config, checkpoint, songs[key])
    verify_cache(str(cache))  # raises for what is not whole


def test_decoding_and_encoding_lie_on_the_nodes_that_were_asked_for(jobs, cache):
    assert jobs.places("tasks", "_decode") == {"cpu-0"}
    assert jobs.places("actors", "_Encode") == {"gpu-0"}


def test_a_run_on_two_nodes_that_was_stopped_is_the_run_on_one(jobs, trained, train_config, tmp_path):
    assert jobs.places("actors", "RayTrainWorker") == {"cpu-0", "gpu-0"}
    lora = read_lora_config(train_config.lora_config_path)
    one = vars(train_config) | {"devices": 1, "accumulate_grad_batches": 2}
    alone = settings_in(tmp_path, TrainConfig(**one), lora=lora, samples=None)
    expected = train_alone(alone)
    found = settings_in(trained, train_config)
    losses = Checkpoints(found.checkpoints).latest_state()["losses"]
    assert losses["last"] == pytest.approx(expected["last"], rel=1e-5)
    assert_close_weights(latest_weights(found), latest_weights(alone))


def test_music_is_made_with_what_was_trained(jobs, trained, checkpoint, tmp_path):
    said = jobs.run(
        "generate",
        checkpoint_dir=checkpoint.path,
        output_path=tmp_path / "music.wav",
        lora_path=trained / "checkpoints" / f"step={STEPS}",
        duration=3,
        infer_steps=2,
    )
    assert f"{tmp_path / 'music.wav'} (3.0 s)" in said
    samples, rate = soundfile.read(tmp_path / "music.wav")
    assert len(samples) / rate == pytest.approx(3, abs=0.1)
    assert samples.std() > 0


def test_trials_lie_on_the_nodes_that_were_asked_for_and_find_what_one_node_finds(
    jobs, cache, checkpoint, tmp_path
):
    said = jobs.run(
        "tune",
        dataset_path=cache,
        checkpoint_dir=checkpoint.path,
        exp_dir=tmp_path,
        logger_dir=tmp_path / "logs",
        exp_name="two",
        tracking_uri="none",
        trials=2,
        scheduler="none",
        search_rank="choice(2, 4)",
        search_learning_rate="1e-3",
        search_targets="attention",
        max_steps=4,
        val_check_interval=2,
        val_songs=2,
        ssl_coeff=0,
        search_ssl_coeff=0,
        precision=32,
        num_workers=0,
        worker_resource=GPU_NODE,
    )
    records = Records(tmp_path / "two")
    assert [record.state for record in records] == [DONE, DONE], said
    assert jobs.places("actors", TRIAL) == {"gpu-0"}
    check_winner(tmp_path / "two", tmp_path / "alone")
