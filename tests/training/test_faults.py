"""Processes of a training run that are ended in the middle: it goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from acestep_ray.config import TrainConfig
from acestep_ray.errors import EXIT_INTERRUPTED
from acestep_ray.storage import Store
from acestep_ray.training.job import train
from acestep_ray.training.lora_config import read_lora_config
from acestep_ray.training.settings import WorkerSettings
from acestep_ray.training.state import Checkpoints
from tests.processes import wait_until, worker_processes
from tests.training.conftest import assert_same_weights, places_in, settings_in, short_run, train_alone

# A busy machine takes minutes to start so many processes.
pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(900)]

STEPS = 360
SAVED_EVERY = 20


@pytest.fixture(autouse=True)
def quick_reports(monkeypatch):
    """Ray Train takes a worker's report, and looks for lost workers, more often than every two seconds."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")


@pytest.fixture
def config(checkpoint, tiny_cache, tmp_path) -> TrainConfig:
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
        seed=5,
    )


@pytest.fixture
def beside() -> Iterator[ThreadPoolExecutor]:
    """Runs what a disturbed run is compared with, while that one starts again and again."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def run_alone(
    beside: ThreadPoolExecutor, directory: Path, config: TrainConfig
) -> tuple[WorkerSettings, Future]:
    settings = settings_in(directory, config, lora=read_lora_config(config.lora_config_path))
    return settings, beside.submit(train_alone, settings)


class Run:
    """`acestep-ray train` as a user starts it, in a process of its own."""

    def __init__(self, config: TrainConfig, address: str):
        flags = [f"--{name}={value}" for name, value in vars(config).items() if value is not None]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "acestep_ray", "train", *flags],
            env={**os.environ, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def finish(self) -> tuple[int, str]:
        """Its exit code and what it said."""
        output, _ = self.process.communicate(timeout=200)
        return self.process.returncode, output


def test_a_run_whose_processes_are_ended_one_after_another_is_the_run_that_was_left_alone(
    two_cpus, config, beside, tmp_path
):
    alone, expected = run_alone(beside, tmp_path / "alone", config)
    checkpoints = Checkpoints(Store.at(tmp_path / "exps" / "disturbed" / "checkpoints"))

    def has_saved(count: int) -> bool:
        return len(checkpoints.steps()) >= count

    run = Run(config, two_cpus)
    try:
        # A worker that is killed costs the steps since the last checkpoint.
        wait_until(lambda: has_saved(2), run.has_ended)
        for pid in worker_processes("RayTrainWorker", two_cpus):
            os.kill(pid, signal.SIGKILL)
        # One that is told to end, as on a machine that is about to go, saves first: at any step.
        wait_until(lambda: has_saved(5), run.has_ended)
        told = worker_processes("RayTrainWorker", two_cpus)
        for pid in told:
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not any(Path("/proc", str(pid)).exists() for pid in told), run.has_ended)
        in_between = [step for step in checkpoints.steps() if step % SAVED_EVERY]
        assert len(in_between) == 1
        # The command that is told to end saves, and says where it stopped.
        seen = len(checkpoints.steps())
        wait_until(lambda: has_saved(seen + 2), run.has_ended)
        run.process.send_signal(signal.SIGTERM)
        code, output = run.finish()
    finally:
        run.process.kill()
    assert code == EXIT_INTERRUPTED
    stopped_at = int(re.search(r"stopped at step (\d+), which is saved", output)[1])
    assert checkpoints.steps()[-1] == stopped_at < STEPS

    # A command that is killed saves nothing more.
    run = Run(config, two_cpus)
    try:
        wait_until(lambda: checkpoints.steps()[-1] > stopped_at, run.has_ended)
    finally:
        run.process.kill()
        run.process.wait()
    expected = expected.result()
    summary = train(config)
    assert summary.steps == STEPS
    assert summary.last_loss == expected["last"]
    disturbed = settings_in(tmp_path / "exps" / "disturbed", config)
    assert_same_weights(disturbed, alone)


def test_a_run_that_loses_a_node_goes_on_with_the_workers_that_are_left(config, beside, tmp_path):
    steps = 120
    config = replace(config, devices=2, min_devices=1, max_steps=steps)
    one = replace(config, devices=1, min_devices=None, accumulate_grad_batches=2)
    _, alone = run_alone(beside, tmp_path / "alone", one)
    checkpoints = tmp_path / "exps" / "disturbed" / "checkpoints"
    quickly = {
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "4",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.lose_a_node", json.dumps(vars(config)), str(checkpoints)],
        env={**os.environ, **quickly},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lost_at = re.search(r"^lost at step (\d+)$", done.stdout, re.MULTILINE)
    assert lost_at, done.stdout[-2000:] + done.stderr[-2000:]
    assert int(lost_at[1]) < steps
    ended = re.search(r'^\{"steps": .*\}$', done.stdout, re.MULTILINE)
    assert ended, done.stderr[-2000:]
    assert json.loads(ended[0]) == {
        "steps": steps,
        "last": pytest.approx(alone.result()["last"], rel=1e-5),
    }
