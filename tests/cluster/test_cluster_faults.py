"""Nodes, drivers, memory and networks that fail while jobs run: nothing is lost, nothing there twice, nothing wrong."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray.job_submission import JobStatus

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.stored import find_rows
from acestep_ray.cli import JOBS
from acestep_ray.config import PrecomputeConfig, TrainConfig
from acestep_ray.data.schema import open_dataset
from acestep_ray.storage import Store
from acestep_ray.training.lora_config import read_lora_config
from acestep_ray.training.state import Checkpoints
from acestep_ray.tuning.records import DONE, Records
from cluster.local.nodes import HEAD, LocalNode
from tests.cache.conftest import SongFolder, noise
from tests.cache.runs import encode_directly, rows_of
from tests.cluster.checks import check_winner
from tests.cluster.jobs import TRIAL, Jobs
from tests.training.conftest import (
    assert_close_weights,
    assert_same_weights,
    latest_weights,
    places_in,
    settings_in,
    short_run,
    train_alone,
)
from tests.tuning.problem import write_problem

pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(1800)]

SONGS = 12
STEPS = 200
SAVED_EVERY = 20
CUT_SECONDS = 20.0
STORE_MB = 80


@pytest.fixture(autouse=True)
def all_nodes(jobs) -> Iterator[None]:
    """Every test begins with all nodes, those lost before started anew, and leaves no job behind."""
    for node in list(jobs.cluster.nodes.values()):
        if node.process.poll() is not None:
            jobs.cluster.start(node.settings)
    jobs.cluster.wait_for_nodes()
    yield
    jobs.stop_all()


# --- precompute --------------------------------------------------------------------------------------------


@pytest.fixture
def songs(checkpoint, tmp_path) -> PrecomputeConfig:
    return songs_in(tmp_path, checkpoint, seconds=[3.0 + i / 2 for i in range(SONGS)])


def songs_in(folder: Path, checkpoint, seconds: list[float]) -> PrecomputeConfig:
    """Songs of these lengths and a broken one, and where their cache goes."""
    dataset = SongFolder(folder / "dataset")
    for i, length in enumerate(seconds):
        dataset.add(f"song{i:02d}", noise(length, seed=i))
    dataset.add("broken", b"RIFF\x24\x00\x00\x00WAVEfmt ")
    return PrecomputeConfig(
        dataset_path=str(dataset.write()),
        checkpoint_dir=str(checkpoint.path),
        output_dir=str(folder / "cache"),
        features="latents",
    )


def has_stored(config: PrecomputeConfig, count: int = 1) -> Callable[[], bool]:
    ledgers = Path(config.output_dir, ".incoming", "ledgers")
    return lambda: len(list(ledgers.glob("*.parquet"))) >= count


def check_cache(config: PrecomputeConfig, checkpoint) -> None:
    """Every song is there once, with the row that one process makes of it."""
    rows = rows_of(config.output_dir)
    songs = {row["keys"]: row for row in open_dataset(config.dataset_path)}
    assert sorted([*rows, *rows_of(config.output_dir, "rejects")]) == sorted(songs)
    assert sorted(set(songs) - set(rows)) == ["broken"]
    assert list(CacheIndex.open(config.output_dir).keys) == sorted(rows)
    for key, row in rows.items():
        assert row == encode_directly(config, checkpoint, songs[key])
    assert not Path(config.output_dir, ".incoming").exists()


def finish(jobs: Jobs, job: str) -> str:
    """Wait for a job that is to succeed; returns what it said."""
    details = jobs.wait(job)
    said = jobs.client.get_job_logs(job)
    assert details.status == JobStatus.SUCCEEDED, f"{details.message}\n{said}"
    return said


def test_precompute_outlives_a_node(jobs, songs, checkpoint):
    job = jobs.submit("precompute", **vars(songs))
    jobs.wait_until(has_stored(songs), job)
    jobs.cluster.nodes["gpu-0"].kill()
    said = finish(jobs, job)
    assert f"{SONGS + 1} = {SONGS} samples + 1 rejects + 0 unchanged" in said
    check_cache(songs, checkpoint)


def test_precompute_outlives_a_network_that_is_cut(jobs, songs, checkpoint):
    job = jobs.submit("precompute", **vars(songs))
    jobs.wait_until(has_stored(songs), job)
    cut(jobs.cluster.nodes["gpu-0"])
    assert not jobs.client.get_job_info(job).status.is_terminal()
    said = finish(jobs, job)
    assert f"{SONGS + 1} = {SONGS} samples + 1 rejects + 0 unchanged" in said
    check_cache(songs, checkpoint)


def test_precompute_waits_for_a_slow_node(jobs, songs, checkpoint):
    with slow(jobs.cluster.nodes["gpu-0"]):
        said = finish(jobs, jobs.submit("precompute", **vars(songs)))
    assert f"{SONGS + 1} = {SONGS} samples + 1 rejects + 0 unchanged" in said
    check_cache(songs, checkpoint)


def test_precompute_goes_on_after_its_driver_was_killed(jobs, songs, checkpoint):
    job = jobs.submit("precompute", **vars(songs))
    jobs.wait_until(has_stored(songs), job)
    (driver,) = driver_of(jobs, "precompute")
    driver.kill()
    details = jobs.wait(job)
    assert (details.status, details.driver_exit_code) == (JobStatus.FAILED, 128 + signal.SIGKILL)
    wait_for_none_left(jobs)
    stored = len(find_rows(Store.at(songs.output_dir)))
    said = jobs.run("precompute", **vars(songs))
    assert f"{SONGS + 1} = {SONGS - stored} samples + 1 rejects + {stored} unchanged" in said
    check_cache(songs, checkpoint)


def cut(node: LocalNode) -> None:
    """Cut a node off for a while."""
    node.cut()
    time.sleep(CUT_SECONDS)
    node.mend()


@contextlib.contextmanager
def slow(node: LocalNode) -> Iterator[None]:
    """Let a node stand still nine tenths of the time."""
    ended = threading.Event()

    def slow_down() -> None:
        while not ended.wait(0.2):
            node.send(signal.SIGSTOP)
            ended.wait(1.8)
            node.send(signal.SIGCONT)

    thread = threading.Thread(target=slow_down)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def driver_of(jobs: Jobs, pipeline: str) -> list:
    """The processes that drive a pipeline, without the shells that started them."""
    driving = jobs.cluster.nodes["head"].processes(f"pipelines/{pipeline}.py")
    return [process for process in driving if process.name() != "sh"]


def wait_for_none_left(jobs: Jobs) -> None:
    """Wait until no process works for a job any more."""
    deadline = time.monotonic() + 60
    while left := jobs.processes():
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


# --- train -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(checkpoint, tiny_cache, tmp_path) -> TrainConfig:
    return short_run(
        checkpoint,
        tiny_cache,
        **places_in(tmp_path, lora_dropout=0.1),
        exp_name="disturbed",
        tracking_uri="none",
        max_steps=STEPS,
        ssl_coeff=0,
        every_n_train_steps=SAVED_EVERY,
        every_plot_step=10_000,
        plot_seconds=0.5,
    )


def checkpoints_of(config: TrainConfig) -> Checkpoints:
    return Checkpoints(Store.at(Path(config.exp_dir) / config.exp_name / "checkpoints"))


def has_saved(config: TrainConfig, count: int = 2) -> Callable[[], bool]:
    return lambda: len(checkpoints_of(config).steps()) >= count


def check_run(config: TrainConfig, folder: Path) -> None:
    """The run has ended as one that was left alone."""
    lora = read_lora_config(config.lora_config_path)
    workers = config.devices
    one = TrainConfig(
        **vars(config) | {"devices": 1, "min_devices": None, "accumulate_grad_batches": workers}
    )
    alone = settings_in(folder / "alone", one, lora=lora, samples=None)
    expected = train_alone(alone)
    found = settings_in(Path(config.exp_dir) / config.exp_name, config)
    state = Checkpoints(found.checkpoints).latest_state()
    assert state["step"] == STEPS
    if workers == 1:
        assert state["losses"]["last"] == expected["last"]
        assert_same_weights(found, alone)
    else:
        assert state["losses"]["last"] == pytest.approx(expected["last"], rel=1e-5)
        assert_close_weights(latest_weights(found), latest_weights(alone))


def test_training_goes_on_elsewhere_when_its_node_is_lost(jobs, run, tmp_path):
    job = jobs.submit("train", **vars(run))
    jobs.wait_until(has_saved(run), job)
    (place,) = jobs.working_places("RayTrainWorker")
    jobs.cluster.nodes[place].kill()
    finish(jobs, job)
    check_run(run, tmp_path)


def test_training_on_two_nodes_outlives_a_network_that_is_cut(jobs, run, tmp_path):
    two = replace(run, devices=2)
    job = jobs.submit("train", **vars(two))
    jobs.wait_until(has_saved(two), job)
    cut(jobs.cluster.nodes["gpu-0"])
    assert checkpoints_of(two).steps()[-1] < STEPS
    finish(jobs, job)
    check_run(two, tmp_path)


def test_training_goes_on_with_the_node_that_is_left(jobs, run, tmp_path):
    elastic = replace(run, devices=2, min_devices=1)
    job = jobs.submit("train", **vars(elastic))
    jobs.wait_until(has_saved(elastic), job)
    jobs.cluster.nodes["gpu-0"].kill()
    finish(jobs, job)
    check_run(elastic, tmp_path)


def test_training_goes_on_after_the_supervisor_of_its_job_was_killed(jobs, run, tmp_path):
    job = jobs.submit("train", **vars(run))
    jobs.wait_until(has_saved(run), job)
    (supervisor,) = jobs.cluster.nodes["head"].processes("ray::JobSupervisor")
    supervisor.kill()
    assert jobs.wait(job).status == JobStatus.FAILED
    wait_for_none_left(jobs)
    assert checkpoints_of(run).steps()[-1] < STEPS
    jobs.run("train", **vars(run))
    check_run(run, tmp_path)


# --- tune --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_base", [False, True])
def test_a_search_goes_on_when_the_node_of_a_trial_is_lost(jobs, run, tmp_path, share_base):
    search = {
        "dataset_path": write_problem(tmp_path / "problem", songs=8),
        "trials": 2,
        "scheduler": "none",
        "share_base": share_base,
        "search_rank": "choice(2, 4)",
        "search_learning_rate": "1e-3",
        "search_targets": "attention",
        "search_ssl_coeff": "0",
        "val_songs": 2,
        "val_check_interval": SAVED_EVERY,
    }
    folder = Path(run.exp_dir) / run.exp_name
    given = {name: value for name, value in vars(run).items() if name not in JOBS["tune"].decides}
    job = jobs.submit("tune", **given | search)
    jobs.wait_until(lambda: any(record.validations for record in Records(folder)), job)
    jobs.cluster.nodes[jobs.working_places("SharedBaseHost" if share_base else TRIAL)[0]].kill()
    finish(jobs, job)
    records = Records(folder)
    assert [record.state for record in records] == [DONE, DONE]
    assert sum(record.failures for record in records) >= 1
    for record in records:
        steps = [one["step"] for one in record.validations]
        assert steps == list(range(SAVED_EVERY, STEPS + 1, SAVED_EVERY))
    check_winner(folder, tmp_path / "alone")


# --- memory ------------------------------------------------------------------------------------------------


def test_precompute_goes_on_when_the_object_store_is_full(checkpoint, tmp_path, jobs):
    # Of 230 s decoded is 88 MB, more than the whole store of a node.
    songs = songs_in(tmp_path, checkpoint, seconds=[230.0, *[40.0] * 8])
    for node in list(jobs.cluster.nodes.values()):
        if node.settings.name != HEAD:
            node.kill()
            jobs.cluster.start(replace(node.settings, object_store_mb=STORE_MB))
    jobs.cluster.wait_for_nodes()
    hog = jobs.client.submit_job(entrypoint=f"python {Path(__file__).parent / 'fill_store.py'} {STORE_MB}")
    jobs.wait_until(lambda: has_spilled(jobs), hog)
    finish(jobs, jobs.submit("precompute", **vars(songs)))
    assert jobs.client.get_job_info(hog).status == JobStatus.RUNNING
    check_cache(songs, checkpoint)


def has_spilled(jobs: Jobs) -> bool:
    """Whether every node but the head has moved objects from its store to disk."""
    folders = [jobs.cluster.folder / name for name in jobs.cluster.nodes if name != HEAD]
    logs = [list(folder.glob("session_*/logs/raylet*.out")) for folder in folders]
    return all(any("Spilled " in log.read_text() for log in of_node) for of_node in logs)
