"""The command: models that make music and are compared, audio that is there already, and bad input."""

from __future__ import annotations

import json
import pickle
import shutil
import sqlite3
from contextlib import ExitStack

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from acestep_ray import cli
from acestep_ray.errors import InputError
from acestep_ray.evaluation import frechet
from acestep_ray.evaluation.candidates import find_candidates
from acestep_ray.evaluation.job import draw_curves, evaluate
from acestep_ray.storage import Store, upload_folder
from acestep_ray.training.lora_config import DEFAULT_LORA
from acestep_ray.training.validation import NOISE_LEVELS
from tests.browser import open_browser, visit
from tests.evaluation.conftest import RATE, noise, tone
from tests.loras import write_lora


def read_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


# --- models ---


@pytest.fixture(scope="module")
def compared(tmp_path_factory, checkpoint, tiny_cache, trained):
    """The base and a LoRA compared by the command; its folder."""
    place = tmp_path_factory.mktemp("compared")
    lora = place / "my_lora"
    lora.mkdir()
    write_lora(lora, trained(DEFAULT_LORA), "lora_adapter")
    reference = place / "reference"
    reference.mkdir()
    for seed in range(4):
        soundfile.write(reference / f"song {seed}.wav", noise(11.0, seed).T, RATE)
    flags = {
        "checkpoint_dir": checkpoint.path,
        "models": f"base,{lora}",
        "lora_weight": "1,0.5",
        "dataset_path": tiny_cache,
        "reference_dir": reference,
        "output_dir": place / "out",
        "logger_dir": place / "logs",
        "duration": 6,
        "infer_steps": 2,
        "device": "cpu",
    }
    assert (
        cli.main(["evaluate", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))])
        == 0
    )
    return place


MODELS = ["base", "my_lora@0.5"]


def test_every_model_has_every_figure(compared):
    rows = pq.read_table(compared / "out" / "scores.parquet").to_pylist()
    assert [row["model"] for row in rows] == MODELS
    assert [row["strength"] for row in rows] == [1.0, 0.5]
    for row in rows:
        measured = {name: value for name, value in row.items() if "/" in name}
        assert {
            "loss/validation",
            "loss/validation/q4",
            "frechet/mert",
            "frechet/m-hubert",
        } <= measured.keys()
        assert {"nearest/mert/mean", "nearest/m-hubert/beyond_mark", "sound/loudness_lufs"} <= measured.keys()
        assert np.isfinite(list(measured.values())).all()
    first, second = rows
    assert first["loss/validation"] != second["loss/validation"]
    assert first["frechet/mert"] != second["frechet/mert"]


def test_everything_is_in_the_json(compared):
    scores = read_json(compared / "out" / "scores.json")
    assert scores["settings"]["infer_steps"] == 2
    assert scores["real_music"]["mert"]["max"] <= 1
    for model in scores["models"]:
        assert len(model["loss_by_noise_level"]) == NOISE_LEVELS
        assert np.mean(model["loss_by_noise_level"]) == pytest.approx(model["loss/validation"])
        # Three clips are too few for an interval, which is said.
        assert model["frechet"]["mert"]["infinity"] is None
        assert any("no interval" in note and model["model"] in note for note in scores["notes"])
        assert [clip["key"] for clip in model["clips"]] == ["alpha", "beta", "gamma"]


def test_every_clip_is_there_to_be_heard_and_seen(compared):
    out = compared / "out"
    clips = pq.read_table(out / "clips.parquet").to_pylist()
    assert len(clips) == 6
    for clip in clips:
        sound, rate = soundfile.read(out / clip["file"])
        assert rate == RATE
        assert len(sound) / rate == pytest.approx(6, abs=0.15)
        assert np.abs(sound).max() == pytest.approx(clip["peak"], abs=1e-4)
        assert np.asarray(Image.open(out / clip["picture"]).convert("L")).std() > 5
        assert clip["prompt"]
        assert clip["mert/nearest_song"].startswith("song ")
    by_key = {
        key: [clip["seed"] for clip in clips if clip["key"] == key] for key in ("alpha", "beta", "gamma")
    }
    assert all(first == second for first, second in by_key.values())
    assert len({seeds[0] for seeds in by_key.values()}) == 3


def test_the_page_plays_its_clips_without_an_error(compared):
    with open_browser() as browser, visit(browser, compared / "out" / "index.html") as found:
        text = found.page.inner_text("main")
        for said in (
            *MODELS,
            "Loss by noise level",
            "Distance from the reference",
            "Nearness to training songs",
        ):
            assert said in text
        assert found.page.locator("audio").count() == 6
        assert found.play(4) > 0
        assert found.errors == []
        assert found.requests == []


def test_models_are_runs_in_mlflow_and_the_report_lies_with_their_parent(compared):
    with sqlite3.connect(compared / "logs" / "mlflow.db") as database:
        runs = dict(database.execute("select name, run_uuid from runs where status = 'FINISHED'"))
        tags = dict(database.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'"))
        losses = dict(database.execute("select run_uuid, value from metrics where key = 'loss/validation'"))
        (where,) = database.execute("select artifact_uri from runs where name = 'out'").fetchone()
    assert set(runs) == {"out", *(f"out/{model}" for model in MODELS)}
    rows = pq.read_table(compared / "out" / "scores.parquet").to_pylist()
    for row in rows:
        run = runs[f"out/{row['model']}"]
        assert tags[run] == runs["out"]
        assert losses[run] == pytest.approx(row["loss/validation"])
    uploaded = {path.name for path in (compared / "logs").rglob("artifacts/*")}
    assert runs["out"] in where
    assert uploaded == {"index.html", "scores.json", "scores.parquet", "clips.parquet"}


def test_a_model_that_comes_from_a_run_brings_its_losses_in_training(
    settings, checkpoint, trained, write_run
):
    run = write_run({10: trained(DEFAULT_LORA)}, DEFAULT_LORA)
    config = settings(models=f"base,{run}", dataset_path="cache")
    curves = draw_curves(find_candidates(config, checkpoint, ExitStack()))
    assert list(curves) == ["my_run-step10"]
    (axes,) = curves["my_run-step10"].axes
    assert "held-out songs" in axes.get_legend_handles_labels()[1]


# --- audio that is there already ---


@pytest.fixture
def heard(settings, write_songs, monkeypatch):
    """Audio of two models that is there already: with a copy of a training song, and with faults."""
    monkeypatch.setattr(frechet, "BOOTSTRAPS", 20)
    write_songs("training", **{f"trained_{i}": noise(10.0, 10 + i) for i in range(5)})
    write_songs("reference", **{f"real_{i}": noise(10.0, 40 + i) for i in range(5)})
    write_songs(
        "made/good",
        **{f"clip_{i}": noise(10.0, 60 + i) for i in range(4)},
        copy=noise(10.0, 12),
    )
    bad = {
        "silence": np.zeros((2, 6 * RATE), np.float32),
        "cut": (4 * tone(300, 6.0)).clip(-1, 1),
        "whisper": tone(440, 6.0, amplitude=0.01),
    }
    made = write_songs("made/bad", **bad).parent
    (made / "bad" / "broken.wav").write_bytes(b"RIFF")
    return settings(
        generated_dir=made, reference_dir=made.parent / "reference", training_dir=made.parent / "training"
    )


def test_audio_that_is_there_is_scored_a_subfolder_a_model(heard, tmp_path):
    summary = evaluate(heard)
    assert [row["model"] for row in summary.rows] == ["bad", "good"]
    scores = read_json(tmp_path / "out" / "scores.json")
    bad, good = scores["models"]
    clips = {clip["key"]: clip for model in (bad, good) for clip in model["clips"]}
    assert clips["silence.wav"]["flags"] == ["silent"]
    assert "clipped" in clips["cut.wav"]["flags"]
    assert clips["whisper.wav"]["flags"] == ["quiet"]
    assert "broken.wav" not in clips
    assert any("broken.wav of bad is left out" in note for note in scores["notes"])
    for encoder in ("mert", "m-hubert"):
        copied = clips["copy.wav"]
        assert copied[f"{encoder}/nearest"] == pytest.approx(1, abs=1e-3)
        assert copied[f"{encoder}/nearest_song"] == "trained_2.wav"
        others = [clips[f"clip_{i}.wav"][f"{encoder}/nearest"] for i in range(4)]
        assert max(others) < copied[f"{encoder}/nearest"] - 1e-3
        found = good["frechet"][encoder]
        assert found["low"] <= found["infinity"] <= found["high"]
        assert bad["frechet"][encoder]["infinity"] is None
        assert good[f"frechet/{encoder}"] < bad[f"frechet/{encoder}"]
    text = summary.render()
    assert "FAD∞ mert" in text
    assert f"{bad['frechet/mert']:.4g}, no FAD∞" in text
    assert f"{tmp_path}/out/index.html" in text
    assert (tmp_path / "out" / "index.html").is_file()


def test_without_training_songs_the_reference_takes_their_place(settings, write_songs, tmp_path):
    write_songs("reference", **{f"real_{i}": noise(8.0, 40 + i) for i in range(3)})
    made = write_songs("made", one=noise(8.0, 41))
    evaluate(settings(generated_dir=made, reference_dir=tmp_path / "reference"))
    scores = read_json(tmp_path / "out" / "scores.json")
    (clip,) = scores["models"][0]["clips"]
    assert clip["mert/nearest"] == pytest.approx(1, abs=1e-3)
    # No song of the baseline is compared with itself.
    assert scores["real_music"]["mert"]["max"] < 0.999
    assert any("taken for the songs trained on" in note for note in scores["notes"])


def test_audio_and_report_may_be_in_object_storage(settings, write_songs, s3, tmp_path):
    places = {}
    for folder, seed in (("made", 2), ("reference", 3)):
        places[folder] = s3.url(f"evaluation/{folder}")
        upload_folder(
            write_songs(folder, one=noise(6.0, seed), two=noise(6.0, seed + 9)), Store.at(places[folder])
        )
    out = s3.url("evaluation/out")
    summary = evaluate(
        settings(generated_dir=places["made"], reference_dir=places["reference"], output_dir=out)
    )
    assert f"{out}/index.html" in summary.render()
    there = Store.at(out).names()
    assert {"index.html", "scores.json", "clips/made/one.wav.png"} <= set(there)
    scores = json.loads(Store.at(out).read_bytes("scores.json"))
    assert scores["models"][0]["frechet/mert"] == pytest.approx(summary.rows[0]["frechet/mert"])
    assert scores["settings"]["generated_dir"] == scores["models"][0]["path"] == places["made"]


def test_one_song_has_a_distance_and_the_report_says_what_it_lacks(settings, write_songs, tmp_path):
    write_songs("reference", only=noise(20.0, 1))
    made = write_songs("made", one=noise(12.0, 2))
    summary = evaluate(settings(generated_dir=made, reference_dir=tmp_path / "reference"))
    assert summary.rows[0]["frechet/mert"] > 0
    notes = "\n".join(summary.notes)
    assert "no interval and no FAD∞: 1 clips and 1 reference songs" in notes
    assert "one training song alone gives no baseline" in notes


def without_encoders(checkpoint, folder):
    shutil.copytree(checkpoint.path, folder, ignore=shutil.ignore_patterns("mert", "mhubert"))
    return folder


def test_without_a_reference_and_encoders_the_sound_is_judged_alone(
    settings, write_songs, checkpoint, tmp_path
):
    made = write_songs("made", one=tone(440, 4.0, amplitude=0.1))
    base = without_encoders(checkpoint, tmp_path / "bare")
    summary = evaluate(settings(generated_dir=made, checkpoint_dir=base))
    assert summary.rows[0]["sound/loudness_lufs"] == pytest.approx(-20, abs=1)
    assert not any("frechet" in name or "nearest" in name for name in summary.rows[0])
    assert any("no Fréchet distance is measured" in note for note in summary.notes)


def test_a_reference_of_which_nothing_can_be_used_is_refused(settings, write_songs, tmp_path):
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "a.wav").write_bytes(b"RIFF")
    made = write_songs("made", one=tone(440, 4.0))
    with pytest.raises(InputError, match="no song here can be used: --reference_dir"):
        evaluate(settings(generated_dir=made, reference_dir=tmp_path / "reference"))


# --- bad input ---


@pytest.fixture
def no_work(monkeypatch):
    """A test in which no work may begin."""
    for name in ("load_yardsticks", "measure_models"):
        monkeypatch.setattr(f"acestep_ray.evaluation.job.{name}", lambda *_: pytest.fail("work began"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "there is nothing to evaluate: --models"),
        ({"models": "base"}, "there is nothing to evaluate: --dataset_path"),
        ({"models": "base", "generated_dir": "made"}, "--generated_dir and --models"),
        ({"models": "base", "dataset_path": "CACHE", "songs": 0}, "at least one song"),
        ({"models": "base", "dataset_path": "CACHE", "duration": 0.0}, "--duration 0.0"),
        ({"models": "base", "dataset_path": "CACHE", "duration": 10_000.0}, "--duration 10000.0"),
        ({"models": "base", "dataset_path": "CACHE", "duration": float("nan")}, "--duration nan"),
        ({"models": "base", "dataset_path": "CACHE", "infer_steps": 0}, "at least one step"),
        ({"models": "base", "dataset_path": "CACHE", "precision": "8"}, "unknown precision"),
        ({"models": "base", "dataset_path": "CACHE", "device": "tpu"}, "unknown device"),
        ({"models": "base", "dataset_path": "nowhere"}, "not a feature cache"),
        (
            {"models": "base", "dataset_path": "CACHE", "reference_dir": "nowhere"},
            "no such folder: --reference_dir",
        ),
        ({"models": "base", "dataset_path": "CACHE", "training_dir": "EMPTY"}, "no audio in this folder"),
        ({"models": "PICKLE", "dataset_path": "CACHE"}, "a pickle is not opened"),
        ({"models": "base,nowhere", "dataset_path": "CACHE"}, "nothing here: --models nowhere"),
        ({"generated_dir": "EMPTY"}, "no audio in this folder: --generated_dir"),
        ({"generated_dir": "MIXED"}, "both in this folder and in subfolders"),
        ({"generated_dir": "MIXED", "output_dir": "MIXED"}, "there is something here"),
    ],
)
def test_bad_input_is_told_before_work_begins(
    settings, tiny_cache, write_songs, tmp_path, no_work, changes, said
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "lora.bin").write_bytes(pickle.dumps({}))
    write_songs("mixed/one", a=tone(440, 1.0))
    places = {
        "CACHE": tiny_cache,
        "EMPTY": tmp_path / "empty",
        "MIXED": write_songs("mixed", b=tone(440, 1.0)),
        "PICKLE": tmp_path / "lora.bin",
    }
    given = {name: places.get(value, value) for name, value in changes.items()}
    with pytest.raises(InputError) as error:
        evaluate(settings(**given))
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_reference_without_encoders_to_compare_with_is_refused(
    settings, write_songs, checkpoint, tmp_path, no_work
):
    base = without_encoders(checkpoint, tmp_path / "bare")
    songs = write_songs("songs", a=tone(440, 4.0))
    with pytest.raises(InputError, match="no SSL encoder"):
        evaluate(settings(checkpoint_dir=base, generated_dir=songs, reference_dir=songs))
