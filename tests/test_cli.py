"""The command line: flags, environment, files, exit codes and messages, as a user meets them."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch

from acestep_ray import cli
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.jobs import COMMAND_GROUPS, EXPORT_ACTIONS, JOBS
from acestep_ray.terminal import VERBOSE, is_verbose

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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_settings_file_may_begin_with_a_byte_order_mark_and_lie_in_the_home_folder(
    encoding, jobs, monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "s.yaml").write_bytes("exp_dir: ~/é\n".encode(encoding))
    for words in (["--config", "~/s.yaml"], ["--config=~/s.yaml"]):
        assert parse(jobs, *words).exp_dir == f"{tmp_path}/é"


def test_the_home_folder_is_expanded_in_flags_and_variables(jobs, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ACESTEP_TRAIN__LOGGER_DIR", "~/logs")
    config = parse(jobs, "--exp_dir=~/exps", "--ckpt-path", "~/step=1", "--exp_name=~")
    assert (config.exp_dir, config.ckpt_path) == (f"{tmp_path}/exps", f"{tmp_path}/step=1")
    assert (config.logger_dir, config.exp_name) == (f"{tmp_path}/logs", "~")


def test_a_settings_file_leaves_no_number_empty(jobs, capsys, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("max_steps:\nbatch_frames: null\n", encoding="utf-8")
    assert cli.main(["train", *REQUIRED, "--config", str(file)]) == 2
    assert "error: has to be of type int, and is null: --max_steps\n" in capsys.readouterr().err
    file.write_text("batch_frames: null\n", encoding="utf-8")
    assert parse(jobs, "--config", str(file)).batch_frames is None


@pytest.mark.parametrize("flag", ["--dataset_path", "--exp_dir", "--init_lora_path"])
def test_an_empty_path_is_not_the_working_directory(jobs, capsys, flag):
    assert cli.main(["train", *REQUIRED, flag, ""]) == 2
    assert f"error: the path is empty: {flag}\n" in capsys.readouterr().err
    assert parse(jobs, flag, ".") is not None


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
        (torch.OutOfMemoryError("CUDA: full"), 1, "OutOfMemoryError: CUDA: full\n  → look with nvidia-smi"),
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
    assert ("Traceback" in capsys.readouterr().err) == (code != 130)


def test_every_job_has_a_pipeline_with_the_same_flags():
    for job in cli.JOBS:
        run = subprocess.run(
            [sys.executable, PIPELINES / f"{job}.py", "--help"], capture_output=True, text=True, timeout=60
        )
        assert run.returncode == 0
        assert f"acestep-ray {job}" in run.stdout


ALL_JOBS = {
    **{(name,): job for name, job in JOBS.items()},
    **{("export", n): j for n, j in EXPORT_ACTIONS.items()},
}


def help_of(capsys, *words) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", ALL_JOBS, ids=" ".join)
def test_every_setting_is_in_one_group(words):
    job = ALL_JOBS[words]
    grouped = [name for names in job.config.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted({field.name for field in fields(job.config)} - job.decides)


@pytest.mark.parametrize("words", ALL_JOBS, ids=" ".join)
def test_every_flag_is_in_the_help_with_its_text_and_default_below_its_group(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    text = help_of(capsys, *words)
    job = ALL_JOBS[words]
    sections = dict(re.findall(r"^(\S.*)\n((?:  .*\n)+)", text, re.MULTILINE))
    for title, names in job.config.GROUPS.items():
        flags = re.split(r"^  (?=--)", sections[title], flags=re.MULTILINE)[1:]
        assert [flag.split()[0] for flag in flags] == [f"--{name}" for name in names]
        for name, flag in zip(names, flags, strict=True):
            default = next(field.default for field in fields(job.config) if field.name == name)
            shown = {"None": "none", "True": "true", "False": "false", "": '""'}.get(str(default), default)
            wanted = "[required]" if default is MISSING else f"[default: {shown}]"
            about = " ".join(flag.split()).removesuffix(wanted)
            assert about != " ".join(flag.split()), f"{name} has no {wanted}"
            assert len(about.split()) > 3, f"nothing is said of {name}"
    for flag in ("--config FILE", "--print_config", "-v, --verbose", "--debug"):
        assert flag in sections["with every command"]


def test_the_environment_the_pages_and_the_exit_codes_are_told_once(capsys):
    text = " ".join(help_of(capsys, "train").split())
    assert text.count("ACESTEP_TRAIN__") == 1
    assert "Docs: docs/training.md." in text
    assert "Exit codes: 0 done, 1 a fault, 2 a mistake in the input or the flags, 130 interrupted" in text
    for job in ALL_JOBS.values():
        assert (PIPELINES.parent / "docs" / job.page).is_file()


def test_commands_come_in_the_order_of_the_road(capsys):
    listed = re.findall(r"^  ([a-z]+)  ", help_of(capsys), re.MULTILINE)
    assert listed == [name for names in COMMAND_GROUPS.values() for name in names]
    (subcommands,) = (action.choices for action in cli.build_parser()._actions if action.dest == "command")
    assert sorted(listed) == sorted(subcommands)


def test_actions_are_in_the_help_of_their_command(capsys):
    assert re.findall(r"^  ([a-z]+)  ", help_of(capsys, "export"), re.MULTILINE) == [*EXPORT_ACTIONS]
    fetch = help_of(capsys, "checkpoint", "fetch")
    assert re.search(r"--jobs N +Files that are downloaded at a time. \[default: 4\]", fetch)


@pytest.mark.parametrize("place", [0, 1, 5])
def test_verbose_may_stand_anywhere_and_ends_with_the_command(jobs, monkeypatch, place):
    monkeypatch.delenv(VERBOSE, raising=False)
    seen = []
    load = cli.load
    monkeypatch.setattr(cli, "load", lambda target: seen.append(is_verbose()) or load(target))
    for switch in ("-v", "--verbose"):
        arguments = ["train", *REQUIRED]
        arguments.insert(place, switch)
        assert cli.main(arguments) == 0
    assert cli.main(["train", *REQUIRED]) == 0
    assert seen == [True, True, False]


def test_a_mistyped_value_is_told_in_the_users_words_and_a_traceback_where_asked(capsys):
    for debug in (False, True):
        with pytest.raises(SystemExit) as end:
            cli.main(["train", *REQUIRED, "--max_steps", "many", *["--debug"] * debug])
        assert end.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith(
            "error: --max_steps: has to be of type int, and is many\n  → acestep-ray train --help"
        )
        assert ("Traceback" in err) == debug
    with pytest.raises(SystemExit):
        cli.main(["generate", "--checkpoint_dir", "checkpoint", "--workers", "two"])
    assert capsys.readouterr().err.startswith(
        "error: --workers: has to be of type int, and is two\n  → acestep-ray generate --help"
    )
    with pytest.raises(SystemExit):
        cli.main(["train"])
    assert "are required: --dataset_path, --checkpoint_dir\n" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["dance"])
    assert "error: there is no command 'dance'\n" in capsys.readouterr().err


def test_a_reader_who_has_seen_enough_is_no_fault():
    code = (
        "import sys; from acestep_ray.cli import finish\n"
        "class Summary:\n    def render(self): return 'a line\\n' * 100_000\n"
        "finish(Summary())"
    )
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout is not None
    command.stdout.readline()
    command.stdout.close()
    _, told = command.communicate(timeout=60)
    assert (command.returncode, told) == (0, b"")


def test_help_answers_without_loading_torch_or_ray():
    code = (
        "import sys, acestep_ray.cli as cli; cli.build_parser().print_help(); "
        "sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, stdout=subprocess.DEVNULL).returncode == 0
