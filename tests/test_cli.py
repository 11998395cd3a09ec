"""The command line: flags, environment, files, exit codes and messages, as a user meets them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from acestep_ray import cli
from acestep_ray.config import TrainConfig
from acestep_ray.errors import AceStepError, InputError

PIPELINES = Path(__file__).parent.parent / "pipelines"
REQUIRED = ["--dataset_path", "cache", "--checkpoint_dir", "checkpoint"]


@pytest.fixture
def jobs(monkeypatch):
    """Jobs that note their settings, or raise what they are told to."""
    seen = {}

    class Summary:
        def render(self):
            return "the summary"

    def fake(target):
        def job(config):
            seen["target"], seen["config"] = target, config
            if "error" in seen:
                raise seen["error"]
            return Summary()

        return job

    monkeypatch.setattr(cli, "load", fake)
    return seen


def test_a_rays_job_puts_no_results_into_its_copy_of_the_working_directory(
    jobs, tmp_path, monkeypatch, capsys
):
    copy = tmp_path / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    absolute = ["--exp_dir", str(tmp_path), "--logger_dir", "/logs"]
    assert cli.main(["train", *REQUIRED, *absolute, "--lora_config_path", "lora.json"]) == 0
    assert cli.main(["train", *REQUIRED, *absolute, "--checkpoints_dir", "s3://bucket/runs"]) == 0
    assert cli.main(["train", *REQUIRED, *absolute[:2]]) == 2
    assert "--logger_dir ./exps/logs/" in capsys.readouterr().err


def parse(jobs, *arguments):
    assert cli.main(["train", *REQUIRED, *arguments]) == 0
    return jobs["config"]


def test_defaults_are_those_of_the_guide(jobs):
    config = parse(jobs)
    expected = {
        "learning_rate": 1e-4,
        "max_steps": 2_000_000,
        "precision": "bf16-mixed",
        "devices": 1,
        "accumulate_grad_batches": 1,
        "num_workers": 8,
        "every_n_train_steps": 2000,
        "every_plot_step": 2000,
        "exp_name": "text2music_train_test",
        "logger_dir": "./exps/logs/",
        "shift": 3.0,
        "gradient_clip_val": 0.5,
        "ssl_coeff": 1.0,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_hyphens_and_underscores_are_the_same(jobs):
    assert parse(jobs, "--learning-rate", "3e-4", "--max-steps=7") == parse(
        jobs, "--learning_rate", "3e-4", "--max_steps=7"
    )
    assert jobs["config"].learning_rate == 3e-4
    assert jobs["config"].max_steps == 7


def test_a_value_keeps_its_hyphens(jobs):
    assert parse(jobs, "--exp-name=my-first-lora").exp_name == "my-first-lora"


def test_environment_then_file_then_flags(jobs, monkeypatch, tmp_path):
    monkeypatch.setenv("ACESTEP_TRAIN__LEARNING_RATE", "1e-3")
    assert parse(jobs).learning_rate == 1e-3
    file = tmp_path / "train.yaml"
    file.write_text("learning_rate: 2e-3\nmax_steps: 5\n", encoding="utf-8")
    assert parse(jobs, "--config", str(file)).learning_rate == 2e-3
    config = parse(jobs, "--config", str(file), "--learning_rate", "3e-3")
    assert (config.learning_rate, config.max_steps) == (3e-3, 5)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["train", *REQUIRED, "--no_such_flag", "1"],
        ["train", *REQUIRED, "--max_steps", "many"],
        ["checkpoint", "gigantic", "dir"],
        ["dance"],
        [],
    ],
)
def test_a_mistake_in_the_flags_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_flag_is_not_guessed_from_its_beginning_but_the_nearest_is_named(jobs, capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["train", *REQUIRED, "--learning_rat", "1"])
    assert "did you mean learning_rate?" in capsys.readouterr().err
    file = tmp_path / "train.yaml"
    file.write_text("max_step: 5\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        cli.main(["train", *REQUIRED, "--config", str(file)])
    assert "did you mean max_steps?" in capsys.readouterr().err


def test_a_variable_that_names_no_setting_is_a_mistake(jobs, capsys, monkeypatch):
    monkeypatch.setenv("ACESTEP_LYRIC_VOCAB", "vocab.json")
    assert cli.main(["train", *REQUIRED]) == 0
    monkeypatch.setenv("ACESTEP_TRAIN__LEARNING_RATES", "1")
    assert cli.main(["train", *REQUIRED]) == 2
    assert "did you mean ACESTEP_TRAIN__LEARNING_RATE?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("no such file", where="song.wav", fix="look again"), 2, "error: no such file: song.wav"),
        (AceStepError("the disk is full"), 1, "error: the disk is full"),
        (ZeroDivisionError("division by zero"), 1, "fault: ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_end_has_its_exit_code_and_one_message(jobs, capsys, error, code, said):
    jobs["error"] = error
    assert cli.main(["train", *REQUIRED]) == code
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert cli.main(["train", *REQUIRED, "--debug"]) == code


def test_every_job_has_a_pipeline_with_the_same_flags():
    for job in cli.JOBS:
        run = subprocess.run(
            [sys.executable, PIPELINES / f"{job}.py", "--help"], capture_output=True, text=True, timeout=60
        )
        assert run.returncode == 0
        assert f"acestep-ray {job}" in run.stdout


def test_every_setting_is_documented_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(TrainConfig):
        assert f"--{field.name}" in text
    assert "Peak learning rate of AdamW." in text


def test_help_answers_without_loading_torch_or_ray():
    code = "import sys, acestep_ray.cli as cli; cli.build_parser(); sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
