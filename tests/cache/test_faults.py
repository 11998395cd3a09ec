"""Processes that are killed in the middle of a run: nothing is lost, nothing is there twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.precompute import PrecomputeSummary, precompute
from acestep_ray.config import PrecomputeConfig
from acestep_ray.data.schema import open_dataset
from acestep_ray.errors import InputError
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
from tests.cache.conftest import SongFolder, noise
from tests.cache.runs import encode_directly, rows_of
from tests.processes import wait_until, worker_processes

SONGS = 8


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory) -> str:
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny").path)


@pytest.fixture
def config(song_folder: SongFolder, checkpoint_dir: str, tmp_path: Path) -> PrecomputeConfig:
    for i in range(SONGS):
        song_folder.add(f"song{i}", noise(3.0 + i / 2, seed=i))
    song_folder.add("broken", b"RIFF\x24\x00\x00\x00WAVEfmt ")
    song_folder.write()
    return PrecomputeConfig(
        dataset_path=str(song_folder.path),
        checkpoint_dir=checkpoint_dir,
        output_dir=str(tmp_path / "cache"),
        features="latents",
        device="cpu",
    )


def check_result(config: PrecomputeConfig, summary: PrecomputeSummary) -> None:
    rows = rows_of(config.output_dir)
    assert sorted(rows) == [f"song{i}" for i in range(SONGS)]
    assert list(CacheIndex.open(config.output_dir).keys) == [f"song{i}" for i in range(SONGS)]
    assert summary.computed + summary.unchanged == SONGS
    assert [reject.key for reject in summary.rejects] == ["broken"]
    checkpoint = CheckpointDir.open(config.checkpoint_dir)
    for row in open_dataset(config.dataset_path):
        if row["keys"] != "broken":
            assert rows[row["keys"]] == encode_directly(config, checkpoint, row)
    assert not Path(config.output_dir, ".incoming").exists()


def stored_parts(config: PrecomputeConfig) -> int:
    return len(list(Path(config.output_dir).glob(".incoming/ledgers/*.parquet")))


def run_and_kill(config: PrecomputeConfig, address: str, moment: Callable[[], bool]) -> None:
    """Run the job in a process of its own, and kill that when the moment has come."""
    code = (
        "from acestep_ray.cache.precompute import precompute\n"
        "from acestep_ray.config import PrecomputeConfig\n"
        f"precompute(PrecomputeConfig(**{vars(config)!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "RAY_ADDRESS": address})
    try:
        wait_until(moment, lambda: process.poll() is not None)
    finally:
        process.kill()
        process.wait()


@pytest.mark.ray
@pytest.mark.faults
def test_workers_that_are_killed_cost_no_song(two_cpus, config):
    torch.set_num_threads(1)
    outcome: list[PrecomputeSummary] = []
    run = threading.Thread(target=lambda: outcome.append(precompute(config)), daemon=True)
    run.start()
    for stage, moment in (
        ("_decode", lambda: bool(worker_processes("_decode", two_cpus))),
        ("_Encode", lambda: stored_parts(config) > 0),
    ):
        wait_until(moment, lambda: not run.is_alive())
        victims = worker_processes(stage, two_cpus)
        assert victims
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
    run.join(timeout=200)
    assert outcome, "the run has not ended, or it has failed"
    check_result(config, outcome[0])
    assert outcome[0].unchanged == 0


@pytest.mark.ray
@pytest.mark.faults
def test_a_driver_that_is_killed_again_and_again_goes_on_from_there(two_cpus, config, song_folder):
    torch.set_num_threads(1)
    cache = Path(config.output_dir)
    stored = 0
    for moment in (
        lambda: (cache / ".incoming").exists(),
        lambda: stored_parts(config) >= 3,
        lambda: bool(list(cache.glob("samples/*"))),
    ):
        run_and_kill(config, two_cpus, moment)
        with pytest.raises(InputError, match=r"not complete|not a feature cache"):
            CacheIndex.open(cache)
        stored = max(stored, stored_parts(config))
    assert stored >= 3
    summary = precompute(config)
    check_result(config, summary)
    assert summary.unchanged >= stored

    # From here on there is a cache, which stays as it is until the next one is whole.
    before = CacheIndex.open(cache)
    song_folder.add("song0", noise(4.0, seed=77))
    song_folder.write()
    run_and_kill(config, two_cpus, lambda: stored_parts(config) > 0)
    assert CacheIndex.open(cache).fingerprint == before.fingerprint
    summary = precompute(config)
    assert (summary.computed, summary.unchanged) == (0, SONGS)
    assert CacheIndex.open(cache).fingerprint != before.fingerprint
