"""Processes of a training run that are ended in the middle: it goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from acestep_ray.config import TrainConfig
from acestep_ray.errors import EXIT_INTERRUPTED
from acestep_ray.storage import Store
from acestep_ray.training.job import train
from acestep_ray.training.lora import read_lora_config
from acestep_ray.training.state import Checkpoints
from tests.processes import wait_until, worker_processes
from tests.training.conftest import latest_weights, settings_in, train_alone

pytestmark = [pytest.mark.ray, pytest.mark.faults]

STEPS = 400
SAVED_EVERY = 25


@pytest.fixture
def config(checkpoint, tiny_cache, tmp_path) -> TrainConfig:
    lora_config = tmp_path / "lora_config.json"
    lora_config.write_text(
        '{"r": 4, "lora_dropout": 0.1, "target_modules": ["to_q", "to_v"]}', encoding="utf-8"
    )
    return TrainConfig(
        dataset_path=str(tiny_cache),
        checkpoint_dir=str(checkpoint.path),
        lora_config_path=str(lora_config),
        exp_name="disturbed",
        exp_dir=str(tmp_path / "exps"),
        logger_dir=str(tmp_path / "exps" / "logs"),
        tracking_uri="none",
        learning_rate=3e-3,
        max_steps=STEPS,
        precision="32",
        device="cpu",
        ssl_coeff=0,
        num_workers=1,
        every_n_train_steps=SAVED_EVERY,
        every_plot_step=10_000,
        plot_seconds=2.0,
        seed=5,
    )


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
    two_cpus, config, tmp_path
):
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
    summary = train(config)
    assert summary.steps == STEPS

    alone = settings_in(tmp_path / "alone", config, lora=read_lora_config(config.lora_config_path))
    expected = train_alone(alone)
    assert summary.last_loss == expected["last"]
    disturbed = settings_in(tmp_path / "exps" / "disturbed", config)
    found = latest_weights(disturbed)
    for name, value in latest_weights(alone).items():
        assert torch.equal(found[name], value), name


def test_a_run_that_loses_a_node_goes_on_with_the_workers_that_are_left(config, tmp_path):
    config = replace(config, devices=2, min_devices=1, max_steps=150)
    checkpoints = tmp_path / "exps" / "disturbed" / "checkpoints"
    quickly = {
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "4",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
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
    assert int(lost_at[1]) < 150
    ended = re.search(r'^\{"steps": .*\}$', done.stdout, re.MULTILINE)
    assert ended, done.stderr[-2000:]
    one = replace(config, devices=1, min_devices=None, accumulate_grad_batches=2)
    alone = train_alone(settings_in(tmp_path / "alone", one, lora=read_lora_config(config.lora_config_path)))
    assert json.loads(ended[0]) == {"steps": 150, "last": pytest.approx(alone["last"], rel=1e-5)}
