"""A training as a process of its own: on one CPU, and ended by Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile

pytestmark = pytest.mark.faults

ONE_CPU = {"RAY_OVERRIDE_RESOURCES": '{"CPU": 1}'}
SECONDS = 150


@pytest.fixture
def project(tmp_path) -> Path:
    songs = tmp_path / "songs"
    songs.mkdir()
    for number in range(3):
        seconds = np.arange(5 * 44100) / 44100
        soundfile.write(songs / f"s{number}.wav", 0.3 * np.sin(2 * np.pi * 220 * seconds), 44100)
        (songs / f"s{number}_prompt.txt").write_text("pop")
        (songs / f"s{number}_lyrics.txt").write_text("[verse]\nla la\n")
    (tmp_path / "lora.json").write_text(json.dumps({"r": 4}))
    return tmp_path


def command(checkpoint_dir, *flags: str) -> list[str]:
    words = ["train", "--checkpoint_dir", str(checkpoint_dir), "--dataset_path", "songs", "--precision", "32"]
    words += ["--lora_config_path", "lora.json", "--exp_name", "run", "--tracking_uri", "none"]
    words += ["--every_plot_step", "100000", "--num_workers", "1", "--val_songs", "0"]
    return [sys.executable, "-m", "acestep_ray", *words, *flags]


def start(words: list[str], folder: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", **variables}
    log = open(folder / "log", "w")  # noqa: SIM115
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log, text=True)


def test_songs_are_trained_on_with_one_cpu(project, checkpoint):
    process = start(command(checkpoint.path, "--max_steps", "2"), project, **ONE_CPU)
    assert process.wait(SECONDS) == 0, (project / "log").read_text()
    assert (project / "exps/run/checkpoints/step=2/state.json").exists()


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_a_training_and_its_processes(times, project, checkpoint):
    process = start(command(checkpoint.path, "--max_steps", "100000"), project)
    until = time.monotonic() + SECONDS
    while not (project / "exps/run/songs.arrow").exists():
        assert time.monotonic() < until
        time.sleep(0.2)
    time.sleep(10)
    children = psutil.Process(process.pid).children(recursive=True)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert process.wait(60) == 130, (project / "log").read_text()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not [child.name() for child in alive if child.status() != psutil.STATUS_ZOMBIE]
