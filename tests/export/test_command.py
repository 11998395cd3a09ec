"""The `export` command: its actions, the short form, mistakes in flags and the environment."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from acestep_ray import cli
from acestep_ray.export import job

PIPELINE = Path(__file__).parents[2] / "pipelines" / "export.py"


class Written:
    """Stands for a summary."""

    def render(self):
        return "written"


@pytest.fixture
def called(monkeypatch):
    """The settings that the job is called with."""
    calls = []

    def export(config):
        calls.append(config)
        return Written()

    monkeypatch.setattr(job, "export", export)
    return calls


@pytest.mark.parametrize("action", [[], ["lora"]])
def test_export_without_an_action_writes_a_lora(called, action):
    assert cli.main(["export", *action, "--input_path", "a", "--output-dir", "b", "--format", "peft"]) == 0
    (config,) = called
    assert (config.input_path, config.output_dir, config.format, config.dry_run) == ("a", "b", "peft", False)


@pytest.mark.parametrize(
    ("flags", "value"),
    [(["--dry_run"], True), (["--dry-run", "false"], False), (["--dry_run=true"], True), ([], False)],
)
def test_a_switch_needs_no_value(called, flags, value):
    assert cli.main(["export", *flags, "--input_path", "a", "--output_dir", "b"]) == 0
    assert called[0].dry_run is value


def test_settings_come_from_a_file_and_the_environment_too(called, tmp_path, monkeypatch):
    (tmp_path / "export.yaml").write_text("input_path: a\noutput_dir: b\nformat: peft\n")
    monkeypatch.setenv("ACESTEP_EXPORT__LORA__DTYPE", "float16")
    assert cli.main(["export", "--config", str(tmp_path / "export.yaml")]) == 0
    assert (called[0].format, called[0].dtype) == ("peft", "float16")


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("ACESTEP_EXPORT__LORA__FORMATT", "ACESTEP_EXPORT__LORA__FORMAT"),
        ("ACESTEP_EXPORT__MERGE__LORA_WEIGHTS", "ACESTEP_EXPORT__MERGE__LORA_WEIGHT"),
        ("ACESTEP_TRAIN__SEEDS", "ACESTEP_TRAIN__SEED"),
    ],
)
def test_a_mistyped_variable_is_told_with_what_was_meant(called, capsys, monkeypatch, variable, near):
    monkeypatch.setenv(variable, "x")
    assert cli.main(["export", "--input_path", "a", "--output_dir", "b"]) == 2
    assert f"did you mean {near}?" in capsys.readouterr().err
    assert called == []


def test_a_mistyped_flag_is_told_with_what_was_meant(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", "merge", "--lora_wieght", "1"])
    assert ended.value.code == 2
    assert "did you mean lora_weight?" in capsys.readouterr().err


@pytest.mark.parametrize("action", cli.EXPORT_ACTIONS)
def test_the_pipeline_has_every_actions_flags(action):
    command = [sys.executable, PIPELINE, action, "--help"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0
    assert f"acestep-ray export {action}" in run.stdout
    for field in fields(cli.EXPORT_ACTIONS[action].config):
        assert f"--{field.name}" in run.stdout
