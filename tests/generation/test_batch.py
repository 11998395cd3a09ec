from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import soundfile
from safetensors.torch import load_file, save_file

from acestep_ray import cli
from acestep_ray.errors import InputError
from acestep_ray.generation import batch as batch_module
from acestep_ray.generation.batch import RESULTS, claim_output, generate_batch
from acestep_ray.generation.job import generate
from tests.processes import wait_until


@pytest.fixture
def rows(config, tmp_path):
    """Writes the file of songs; gives the flags of a batch."""

    def write(*rows: dict):
        path = tmp_path / "songs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return replace(
            config, output_path=None, batch_path=str(path), output_dir=str(tmp_path / "out"), batch_size=2
        )

    return write


def results(config) -> list[dict]:
    path = Path(config.output_dir) / RESULTS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.ray
def test_a_batch_makes_every_song_that_can_be_made_and_a_rerun_only_what_is_missing(
    two_cpus, config, rows, tmp_path, capsys
):
    good = [
        {"name": "b/one", "seed": [1, 2]},
        {"name": "two", "prompt": "rock", "duration": 1.5, "scheduler": "pingpong"},
    ]
    flags = rows(good[0], {"guidance_scale": 1e38, "name": "bad"}, good[1])
    arguments = {
        "checkpoint_dir": flags.checkpoint_dir,
        "batch_path": flags.batch_path,
        "output_dir": flags.output_dir,
    }
    arguments |= {
        "prompt": flags.prompt,
        "lyrics": flags.lyrics,
        "duration": 2,
        "infer_steps": 3,
        "device": "cpu",
    }
    assert (
        cli.main(["generate", "--batch_size=2", *(f"--{name}={value}" for name, value in arguments.items())])
        == 1
    )
    told = capsys.readouterr()
    assert "all      4 = 3 made + 0 unchanged + 1 failed" in told.out
    assert "1 of 4 songs failed" in told.err

    found = results(flags)
    assert [(row["line"], row["name"], row["seed"]) for row in found] == [
        (1, "b/one-seed1", 1),
        (1, "b/one-seed2", 2),
        (2, "bad", 0),
        (3, "two", 0),
    ]
    assert [row["file"] for row in found] == ["b/one-seed1.wav", "b/one-seed2.wav", None, "two.wav"]
    assert [row["error"] is None for row in found] == [True, True, False, True]
    assert "not finite" in found[2]["error"]

    alone = [
        generate(replace(config, seed=2)),
        generate(
            replace(
                config, prompt="rock", duration=1.5, scheduler="pingpong", output_path=f"{tmp_path}/two.wav"
            )
        ),
    ]
    for row, summary in zip((found[1], found[3]), alone, strict=True):
        made, _ = soundfile.read(tmp_path / "out" / row["file"], dtype="int16")
        wanted, _ = soundfile.read(summary.songs[0].audio.path, dtype="int16")
        assert np.abs(made.astype(int) - wanted).max() <= 1
        assert row["seconds"] == len(made) / 48_000

    again = generate_batch(rows(good[1], good[0]))
    assert (again.unchanged, again.failed, again.unfinished) == (3, [], None)
    assert [row["name"] for row in results(flags)] == ["two", "b/one-seed1", "b/one-seed2"]


def test_the_requests_are_not_written_over_and_the_folder_can_be_written_to(tmp_path):
    with pytest.raises(InputError, match="would replace the requests"):
        claim_output(str(tmp_path), tmp_path / RESULTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write here"):
        claim_output(str(tmp_path / "file"), tmp_path / "songs.jsonl")


def test_a_mistake_in_the_file_or_the_lora_stops_the_batch_before_ray_starts(rows, monkeypatch, tmp_path):
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("work began"))
    monkeypatch.setattr(batch_module, "connect", lambda: pytest.fail("work began"))
    with pytest.raises(InputError, match="line 1"):
        generate(rows({"duration": 0}))
    with pytest.raises(InputError, match="nowhere"):
        generate(replace(rows({}), lora_path=str(tmp_path / "nowhere")))
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_a_batch_that_fails_leaves_no_models_to_the_next(two_cpus, rows, tmp_path):
    """In the same driver, which may keep the error, as a notebook does."""
    flags = rows({"name": "a"})
    broken = tmp_path / "broken"
    shutil.copytree(flags.checkpoint_dir, broken)
    (weights,) = broken.glob("music_vocoder/*.safetensors")
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors.pop(name)
    save_file(tensors, weights)
    everything = ray.cluster_resources()["CPU"]
    with pytest.raises(InputError, match=re.escape(name)) as kept:
        generate_batch(replace(flags, checkpoint_dir=str(broken)))
    wait_until(lambda: ray.available_resources().get("CPU") == everything, lambda: False, 20)
    del kept
