"""Whole searches on a Ray cluster of two CPUs, and what is refused before one begins."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from acestep_ray.config import TrainConfig, TuneConfig
from acestep_ray.errors import InputError
from acestep_ray.training.lora_config import read_lora_config
from acestep_ray.tuning import job
from acestep_ray.tuning.job import tune
from acestep_ray.tuning.records import DONE, FAILED, STOPPED, UNFINISHED, Records
from tests.training.conftest import settings_in, train_alone

ROOT = Path(__file__).parent.parent.parent
SPACE = """
rank: choice(1, 32)
alpha: 2r
learning_rate: loguniform(1e-5, 2e-2)
targets: attention+cross_attention+feed_forward+speaker
"""


@pytest.fixture(scope="module")
def config(checkpoint, problem, tmp_path_factory) -> TuneConfig:
    folder = tmp_path_factory.mktemp("tune")
    (folder / "space.yaml").write_text(SPACE, encoding="utf-8")
    return TuneConfig(
        dataset_path=str(problem),
        checkpoint_dir=str(checkpoint.path),
        space=str(folder / "space.yaml"),
        exp_dir=str(folder / "exps"),
        logger_dir=str(folder / "exps" / "logs"),
        max_steps=12,
        val_check_interval=6,
        val_songs=2,
        trials=8,
        seed=29,  # its second trial is the problem's best, so that the later ones are stopped
        batch_size=4,
        precision="32",
        num_workers=0,
        device="cpu",
        speaker_dropout=0.0,
        ssl_coeff=0.0,
        warmup_steps=2,
        gradient_clip_val=100.0,
    )


@pytest.fixture(scope="module")
def searched(config, two_cpus):
    """A search of eight trials, one after another."""
    # One at a time: which trials are stopped does not depend on which process is faster.
    return tune(replace(config, exp_name="eight", cpus_per_trial=2.0))


def records_of(config: TuneConfig, name: str) -> Records:
    return Records(Path(config.exp_dir) / name)


def runs_of(config: TuneConfig) -> dict[str, dict]:
    """MLflow's runs by name, with their tags, metrics and status."""
    with sqlite3.connect(Path(config.logger_dir) / "mlflow.db") as database:
        runs = {
            run: {"name": name, "status": status}
            for run, name, status in database.execute("select run_uuid, name, status from runs")
        }
        for run, values in runs.items():
            values["tags"] = dict(database.execute("select key, value from tags where run_uuid = ?", (run,)))
            values["params"] = dict(
                database.execute("select key, value from params where run_uuid = ?", (run,))
            )
            values["steps"] = [
                step
                for (step,) in database.execute(
                    "select step from metrics where run_uuid = ? and key = 'loss/validation' order by step",
                    (run,),
                )
            ]
    return {values["name"]: {**values, "id": run} for run, values in runs.items()}


@pytest.mark.ray
def test_half_of_the_trials_are_stopped_and_the_winner_has_the_rank_and_rate_of_the_problem(searched):
    rows = pq.read_table(searched.folder.path / "trials.parquet").to_pylist()
    states = Counter(row["state"] for row in rows)
    assert states[STOPPED] >= 4
    assert states[STOPPED] + states[DONE] == 8
    assert all(row["steps"] < 12 for row in rows if row["state"] == STOPPED)
    best, default = rows[0], next(row for row in rows if row["trial"] == "trial-0000")
    assert default["learning_rate"] == 1e-4
    assert best["rank"] == 32
    assert best["learning_rate"] > 2e-3
    assert best["validation"] < 0.95 * default["validation"]
    assert best["train"] < default["train"]
    assert best["gap"] is not None


@pytest.mark.ray
def test_the_winners_settings_train_it_again_to_the_same_loss(searched, tmp_path):
    row = searched.trials[0]
    values = yaml.safe_load(searched.best.read_bytes("train.yaml"))
    found = TrainConfig(**values)
    lora = json.loads(Path(found.lora_config_path).read_text(encoding="utf-8"))
    assert (lora["r"], lora["lora_alpha"], found.learning_rate) == (32, 64, row["learning_rate"])
    settings = settings_in(tmp_path, found, lora=lora, samples=None, held_out=held_out_of(searched, found))
    losses = train_alone(settings)
    assert losses["validation"][str(row["best_step"])] == pytest.approx(row["validation"], rel=1e-5)
    written = searched.best.read_bytes("pytorch_lora_weights.safetensors")
    repeated = settings.checkpoints.child(f"step={row['best_step']}")
    assert len(written) == len(repeated.read_bytes("pytorch_lora_weights.safetensors"))


def held_out_of(searched, config: TrainConfig) -> tuple[int, ...]:
    """The songs that the search held out."""
    from acestep_ray.cache.index import CacheIndex
    from acestep_ray.training.holdout import hold_out, recordings_of_cache

    index = CacheIndex.open(config.dataset_path)
    return tuple(hold_out(recordings_of_cache(index), config.val_songs).tolist())


@pytest.mark.ray
def test_mlflow_has_the_search_and_below_it_every_trial_with_its_curve(searched, config):
    runs = runs_of(config)
    parent = runs["eight"]
    trials = {name: run for name, run in runs.items() if name.startswith("eight/")}
    assert len(trials) == 8
    assert {run["status"] for run in (*trials.values(), parent)} == {"FINISHED"}
    assert parent["params"]["space.rank"] == "choice(1, 32)"
    assert parent["tags"]["best.trial"] == searched.trials[0]["trial"]
    for row in searched.trials:
        run = trials[f"eight/{row['trial']}"]
        assert run["tags"]["mlflow.parentRunId"] == parent["id"]
        assert run["params"]["rank"] == str(row["rank"])
        assert run["steps"] == list(range(0, row["steps"] + 1, 6))
    files = {
        path.relative_to(Path(config.logger_dir) / "mlruns")
        for path in (Path(config.logger_dir) / "mlruns").rglob("*")
        if path.is_file()
    }
    reports = {path.name for path in files if parent["id"] in path.parts}
    assert reports == {"index.html", "parallel_coordinates.png", "rank_by_learning_rate.png"}
    with_checkpoint = {path.parts[1] for path in files if path.name == "pytorch_lora_weights.safetensors"}
    assert {trials[f"eight/{row['trial']}"]["id"] for row in searched.trials[:3]} == with_checkpoint


@pytest.mark.ray
def test_the_winner_is_trained_anew_and_longer(searched, config, monkeypatch):
    class Summary:
        def render(self):
            return "what a run says"

    trained = []
    monkeypatch.setattr(job, "train", lambda its: [trained.append(its), Summary()][1])
    summary = tune(replace(config, exp_name="eight", cpus_per_trial=2.0, retrain_best=100))
    (its,) = trained
    assert (its.max_steps, its.exp_name, its.learning_rate) == (
        100,
        "eight_best",
        searched.trials[0]["learning_rate"],
    )
    assert read_lora_config(its.lora_config_path)["r"] == 32
    assert "the winner, trained anew:\nwhat a run says" in summary.render()


@pytest.mark.ray
def test_a_search_that_is_done_says_so_again_and_takes_no_other_space(searched, config, tmp_path):
    again = tune(replace(config, exp_name="eight", cpus_per_trial=2.0))
    assert [row["trial"] for row in again.trials] == [row["trial"] for row in searched.trials]
    with pytest.raises(InputError, match=r"another space(?s:.*)choice\(1, 32\)(?s:.*)choice\(1, 16\)"):
        tune(replace(config, exp_name="eight", search_rank="choice(1, 16)"))


def kill_trial_once(folder: Path, name: str) -> None:
    """End the processes of trials once one has a validation."""
    record = folder / "trials" / name / "trial.json"
    while not (record.exists() and json.loads(record.read_text(encoding="utf-8"))["validations"]):
        time.sleep(0.05)
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("ray::") and "Trainable" in " ".join(process.cmdline()):
            process.kill()


@pytest.mark.ray
@pytest.mark.faults
def test_trials_on_a_shared_base_go_on_after_a_kill_and_one_that_diverges_ends_nothing(
    searched, config, tmp_path
):
    shared = replace(
        config,
        exp_name="shared",
        trials=2,
        share_base=True,
        scheduler="none",
        tracking_uri="none",
        search_rank="1",
        search_learning_rate="choice(1e-4, 1e30)",
        max_skipped_steps=2,
        val_check_interval=3,
    )
    thread = threading.Thread(target=kill_trial_once, args=(Path(config.exp_dir) / "shared", "trial-0000"))
    thread.start()
    summary = tune(shared)
    thread.join()
    records = records_of(config, "shared")
    assert records["trial-0000"].state == DONE
    assert records["trial-0000"].failures >= 1
    assert records["trial-0001"].state == FAILED
    assert "no finite loss" in records["trial-0001"].error
    assert "failed   trial-0001" in summary.render()
    # Number for number what a process of its own has found, which measured half as often.
    assert [one["step"] for one in records["trial-0000"].validations] == [3, 6, 9, 12]
    alone = records_of(config, "eight")["trial-0000"].validations
    for mine, theirs in zip(records["trial-0000"].validations[1::2], alone, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)

    assert len(tune(replace(shared, trials=3)).trials) == 2, "a space of two values is searched once"


@pytest.mark.ray
@pytest.mark.faults
def test_a_trial_may_be_a_run_of_two_workers(two_cpus, config):
    two = replace(
        config,
        exp_name="two",
        trials=2,
        workers_per_trial=2,
        cpus_per_trial=2.0,
        tracking_uri="none",
        reduction_factor=2.0,
        search_rank="32",
        search_learning_rate="choice(1e-4, 1e-2)",
        max_steps=4,
        val_check_interval=2,
    )
    summary = tune(two)
    assert [row["learning_rate"] for row in summary.trials] == [1e-2, 1e-4]
    assert summary.trials[0]["steps"] == 4
    assert summary.best.status("pytorch_lora_weights.safetensors") is not None


@pytest.mark.ray
@pytest.mark.faults
def test_ctrl_c_reports_what_is_finished_and_the_same_command_goes_on(two_cpus, config):
    interrupted = replace(
        config,
        exp_name="interrupted",
        trials=3,
        scheduler="none",
        tracking_uri="none",
        share_base=True,
        max_steps=36,
    )
    flags = [
        f"--{field.name}={value}"
        for field in fields(TuneConfig)
        if (value := getattr(interrupted, field.name)) != field.default
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [sys.executable, ROOT / "pipelines" / "tune.py", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    record = Path(config.exp_dir) / "interrupted" / "trials" / "trial-0000" / "trial.json"
    while not (record.exists() and json.loads(record.read_text(encoding="utf-8"))["validations"]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "the same command goes on from here" in out
    assert "trial-0000" in out
    assert (record.parent.parent.parent / "trials.parquet").exists()
    records = records_of(config, "interrupted")
    assert records["trial-0000"].state == UNFINISHED
    saved = records.checkpoints(records["trial-0000"]).steps()
    assert saved
    assert saved[-1] < 36

    tune(replace(interrupted, trials=2))
    after = records_of(config, "interrupted")
    assert [record.state for record in after] == [DONE, DONE]
    assert [one["step"] for one in after["trial-0000"].validations] == list(range(6, 37, 6))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search_rank": "choice()"}, "`rank` is empty"),
        ({"search_rank": "log2int(4, 256)"}, "rank 256 is larger than the layer"),
        ({"val_songs": 0}, "no validation songs(?s:.*)--val_songs 0"),
        ({"val_songs": None}, "no validation songs(?s:.*)give --val_songs N, such as 3"),
        ({"gpus_per_trial": 1.0}, "no GPU for the trials: --gpus_per_trial 1"),
        ({"cpus_per_trial": 64.0}, "--cpus_per_trial 64"),
        ({"scheduler": "hyperband"}, "unknown scheduler(?s:.*)asha, median, none"),
        ({"searcher": "grid"}, "unknown searcher(?s:.*)random, optuna"),
        ({"trials": 0}, "--trials 0"),
        ({"reduction_factor": 1.0}, "--reduction_factor 1"),
        ({"grace_steps": 13}, "--grace_steps 13"),
        ({"search_ssl_coeff": "choice(0, 1)", "dataset_path": "no-cache"}, "the dataset does not exist"),
        ({"space": "no-space.yaml"}, "cannot read the search space"),
    ],
)
def test_a_mistake_is_told_before_a_trial_begins(two_cpus, config, changes, said, monkeypatch):
    monkeypatch.setattr("ray.tune.Tuner", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(InputError, match=said):
        tune(replace(config, exp_name="mistake", **changes))


def test_a_dora_shares_no_base_model_and_several_adapters_are_no_search(config, tmp_path):
    path = tmp_path / "lora_config.json"
    path.write_text('{"use_dora": true}', encoding="utf-8")
    with pytest.raises(InputError, match=r"DoRA(?s:.*)--share_base"):
        tune(replace(config, lora_config_path=str(path), share_base=True))
    path.write_text('{"adapters": {"style": {"r": 4}}}', encoding="utf-8")
    with pytest.raises(InputError, match="a search is for one adapter"):
        tune(replace(config, lora_config_path=str(path)))
