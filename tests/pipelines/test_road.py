"""The whole road as a user walks it: processes, files, exit codes."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import soundfile
from PIL import Image
from safetensors import safe_open

from acestep_ray import cli
from acestep_ray.data.demo import write_demo_songs
from acestep_ray.models.codec import latent_frames
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).parent.parent.parent
LORA_CONFIG = ROOT / "lora_config.json"


def run(job: str, *arguments: str | Path, timeout: float = 280) -> subprocess.CompletedProcess:
    """A pipeline as a process of its own, on a cluster of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [sys.executable, ROOT / "pipelines" / f"{job}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A quickstart on the demonstration songs."""
    output = tmp_path_factory.mktemp("road") / "out"
    done = run("quickstart", "--output_dir", output, "--device", "cpu", "--max_steps", 40)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def only(paths) -> Path:
    (path,) = paths
    return path


@pytest.mark.ray
def test_every_song_is_in_samples_or_in_rejects_with_its_reason(road):
    output, _ = road
    songs = {path.stem for path in (output / "songs").iterdir() if path.suffix not in (".txt", ".json")}
    samples = pq.read_table(output / "cache" / "samples").to_pylist()
    rejects = {row["key"]: row for row in pq.read_table(output / "cache" / "rejects").to_pylist()}
    assert sorted([row["key"] for row in samples] + list(rejects)) == sorted(songs)
    assert {row["reason"] for row in rejects.values()} == {"silent", "corrupt"}
    assert all(row["message"] and row["stage"] for row in rejects.values())
    for row in samples:
        # A song under 3 s is padded to 3 s.
        assert row["latent_frames"] == latent_frames(round(max(row["duration_seconds"], 3.0) * 48_000))


@pytest.mark.ray
def test_the_lora_is_trained_and_its_loss_falls(road):
    output, said = road
    checkpoint = only(output.glob("exps/quickstart-*/checkpoints/step=40"))
    losses = json.loads((checkpoint / "state.json").read_text())["losses"]
    before, after = losses["fixed_noise"].values()
    assert after < 0.9 * before
    assert f"{losses['first']:.4f} → {losses['last']:.4f}" in said
    with safe_open(checkpoint / "pytorch_lora_weights.safetensors", framework="np") as file:
        assert all(np.isfinite(file.get_tensor(key)).all() for key in file.keys())  # noqa: SIM118
        assert any(file.get_tensor(key).any() for key in file.keys() if "lora_B" in key)  # noqa: SIM118


@pytest.mark.ray
def test_the_music_plays_and_has_its_picture(road):
    output, _ = road
    samples, rate = soundfile.read(output / "music.wav")
    assert rate == 48_000
    assert samples.shape[1] == 2
    assert 7.5 < len(samples) / rate < 8.1
    assert samples.std() > 0.01
    picture = np.asarray(Image.open(output / "music.png").convert("RGB"))
    assert picture.shape[0] > 300
    assert json.loads((output / "music.json").read_text(encoding="utf-8"))["seed"] == 0
    assert picture.std() > 10


@pytest.mark.ray
def test_metrics_are_in_mlflow(road):
    output, _ = road
    with sqlite3.connect(output / "exps" / "logs" / "mlflow.db") as database:
        (status,) = database.execute("select status from runs").fetchone()
        steps = [
            step for (step,) in database.execute("select step from metrics where key='loss' order by step")
        ]
        (rank,) = database.execute("select value from params where key='max_steps'").fetchone()
    assert status == "FINISHED"
    assert steps == list(range(40))
    assert rank == "40"


@pytest.mark.ray
def test_the_summary_says_what_was_made_and_what_comes_next(road):
    output, said = road
    for made in ("checkpoint", "dataset", "cache", "music.wav", "pytorch_lora_weights.safetensors"):
        assert f"{output}" in said
        assert made in said
    assert "2 songs: 1 corrupt, 1 silent" in said
    assert "make quickstart SONGS=" in said


@pytest.mark.ray
def test_generating_again_with_the_same_seed_gives_the_same_music(road, tmp_path):
    output, _ = road
    arguments = [
        *("--checkpoint_dir", output / "checkpoint", "--prompt", "calm, piano", "--duration", 3),
        *("--lyrics", "[verse]\nhello there", "--infer_steps", 5, "--seed", 7),
        *("--lora_path", only(output.glob("exps/quickstart-*/checkpoints/step=40"))),
    ]
    done = run("generate", *arguments, "--output_path", tmp_path / "process.flac")
    assert done.returncode == 0, done.stderr
    assert cli.main(["generate", *map(str, arguments), "--output_path", str(tmp_path / "here.flac")]) == 0
    made = [soundfile.read(tmp_path / name)[0] for name in ("process.flac", "here.flac")]
    assert np.array_equal(*made)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny checkpoint and a folder of songs."""
    directory = tmp_path_factory.mktemp("inputs")
    write_tiny_checkpoint(directory / "checkpoint")
    write_demo_songs(directory / "songs")
    done = run("prepare", "--data_dir", directory / "songs", "--output_dir", directory / "dataset")
    assert done.returncode == 0, done.stderr
    return directory


def lora_config(directory: Path, text: str) -> Path:
    path = directory / "lora.json"
    path.write_text(text)
    return path


MISTAKES = (
    "no such folder of songs",
    "a folder without songs",
    "no such dataset",
    "a checkpoint without a part",
    "an unknown target module",
    "a LoRA configuration that is no JSON",
    "a corrupt settings file",
    "neither a cache nor songs",
    "no LoRA",
    "a format that cannot be written",
)


def bad_inputs(inputs: Path, scratch: Path) -> dict[str, tuple[list, str]]:
    """Arguments with one mistake each, and what the message has to name."""
    checkpoint = ["--checkpoint_dir", inputs / "checkpoint"]
    train = ["train", "--dataset_path", inputs / "dataset", *checkpoint]
    broken = scratch / "broken"
    broken.mkdir()
    for part in (inputs / "checkpoint").iterdir():
        if part.name != "music_vocoder":
            (broken / part.name).symlink_to(part)
    empty = scratch / "empty"
    empty.mkdir()
    settings = scratch / "train.yaml"
    settings.write_text("learning_rate: [")
    return {
        "no such folder of songs": (
            ["prepare", "--data_dir", scratch / "nowhere", "--output_dir", scratch / "d"],
            "nowhere",
        ),
        "a folder without songs": (["prepare", "--data_dir", empty, "--output_dir", scratch / "d"], "empty"),
        "no such dataset": (
            ["precompute", "--dataset_path", scratch / "nowhere", *checkpoint, "--output_dir", scratch / "c"],
            "nowhere",
        ),
        "a checkpoint without a part": (
            [
                "precompute",
                "--dataset_path",
                inputs / "dataset",
                "--output_dir",
                scratch / "c",
                "--checkpoint_dir",
                broken,
            ],
            "music_vocoder",
        ),
        "an unknown target module": (
            [*train, "--lora_config_path", lora_config(scratch, '{"target_modules": ["to_qqq"]}')],
            "to_qqq",
        ),
        "a LoRA configuration that is no JSON": ([*train, "--lora_config_path", inputs / "songs"], "songs"),
        "a corrupt settings file": (["train", "--config", settings], "train.yaml"),
        "neither a cache nor songs": (
            ["train", "--dataset_path", empty, *checkpoint, "--lora_config_path", LORA_CONFIG],
            "empty",
        ),
        "no LoRA": (
            ["generate", *checkpoint, "--output_path", scratch / "a.wav", "--lora_path", scratch / "nowhere"],
            "nowhere",
        ),
        "a format that cannot be written": (
            ["generate", *checkpoint, "--output_path", scratch / "a.xyz"],
            ".xyz",
        ),
    }


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_exit_code_2(inputs, tmp_path, mistake, capsys, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("work began"))
    arguments, named = bad_inputs(inputs, tmp_path)[mistake]
    assert cli.main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert named in said
    assert "Traceback" not in said


def test_a_mistake_ends_the_process_with_exit_code_2(tmp_path):
    done = run("prepare", "--data_dir", tmp_path / "nowhere", "--output_dir", tmp_path / "dataset")
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
