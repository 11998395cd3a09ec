"""Every command of README and docs is one that the real parsers take: no flag is unknown, no value of a wrong kind."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from dataclasses import MISSING, fields
from functools import cache

import click
import pytest
import yaml

from acestep_ray import cli
from acestep_ray.config import PrecomputeConfig, TrainConfig
from acestep_ray.errors import InputError
from acestep_ray.training.checks import check_train_config
from tests.docs.pages import PAGES, ROOT, Command, blocks, commands, prose

COMMANDS = [command for page in PAGES for command in commands(page)]

# Flags in the text that are another program's, or the original trainer's.
FOREIGN_FLAGS = {
    *("output_name", "working_dir", "num_cpus", "num_gpus", "shm_size", "install", "pod", "head", "address"),
    *(
        "resources",
        "entrypoint_resources",
        "runtime_env_json",
        "follow",
        "logdir",
        "backend_store_uri",
        "no_deps",
        "extra_index_url",
        "index_url",
    ),
}
# Programs whose flags are not looked at.
OTHER_PROGRAMS = {
    *(
        "git",
        "cd",
        "source",
        "mkdir",
        "cp",
        "export",
        "curl",
        "cat",
        "ls",
        "base64",
        "watch",
        "kill",
        "nvidia-smi",
    ),
    *("apt-get", "sudo", "conda", "docker", "kubectl", "helm", "aws", "gcloud", "hf"),
}


@pytest.fixture
def parsed(monkeypatch):
    """Runs a command of ours as far as its parser; gives what that made of it."""
    seen = []
    parser = shared_parser()
    monkeypatch.setattr(cli, "build_parser", lambda: parser)
    monkeypatch.setattr(cli, "run", seen.append)

    def parse(words: list[str]):
        seen.clear()
        assert cli.main(words) == 0, words
        return seen[0]

    return parse


@cache
def shared_parser():
    return cli.build_parser()


def job_of(words: list[str]) -> cli.Job | None:
    """The job that these words call; None for another subcommand."""
    if words[0] == "export":
        return cli.EXPORT_ACTIONS.get(words[1], cli.EXPORT_ACTIONS["lora"])
    return cli.JOBS.get(words[0])


def completed(words: list[str]) -> list[str]:
    """A command of the text with what it leaves out."""
    job = job_of(words)
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words}
    if job is None or given & {"help", "config"}:
        return words
    missing = [f.name for f in fields(job.config) if f.default is f.default_factory is MISSING]
    return [*words, *(part for name in missing if name not in given for part in (f"--{name}", "x"))]


def check_ours(words: list[str], parse, tmp_path) -> None:
    words = ["train" if word == "JOB" else word for word in words]
    if "--help" in words or "--version" in words:
        with pytest.raises(SystemExit) as end:
            parse(words)
        assert end.value.code == 0
        return
    if "--config" in words:
        # What the file holds, a run has written: all settings.
        settings = tmp_path / "train.yaml"
        settings.write_text(yaml.safe_dump({"dataset_path": "cache", "checkpoint_dir": "checkpoint"}))
        words[words.index("--config") + 1] = str(settings)
    check_values(words, parse(words))


def check_values(words: list[str], namespace) -> None:
    """What can be found wrong with a job's settings without their files."""
    job = job_of(words)
    if job is None:
        return
    settings = namespace[namespace.command]
    if namespace.command == "export":
        settings = settings[settings.action]
    values = {name: value for name, value in settings.as_dict().items() if name != "config"}
    if job.config is TrainConfig:
        check_train_config(TrainConfig(**{**values, "ckpt_path": None}))
    if job.config is PrecomputeConfig:
        from acestep_ray.cache.precompute import check_settings

        check_settings(PrecomputeConfig(**values))


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name}\s*\??=" if is_variable else rf"^{re.escape(name)}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {name}"


def check_pip(words: list[str]) -> None:
    extras = importlib.metadata.metadata("acestep-ray").get_all("Provides-Extra")
    for name in re.findall(r"(?:acestep-ray|\.)\[([\w,-]+)\]", " ".join(words)):
        assert set(name.split(",")) <= set(extras), f"there is no extra {name}"


def check_click(command: click.Command, words: list[str]) -> None:
    """Let click parse without running anything; words of a group lead to its command."""
    while isinstance(command, click.Group):
        # Not its dictionary: some groups know other names too.
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"there is no {words[0]}"
        command, words = found, words[1:]
    command.make_context(command.name, list(words))


def check_benchmark(script: str, words: list[str]) -> None:
    text = (ROOT / script).read_text(encoding="utf-8")
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert f'"{flag}"' in text, f"{script} has no {flag}"


def check_command(words: list[str], parse, tmp_path, *, is_whole: bool) -> None:
    """Raises, or ends with SystemExit, for a command that cannot be typed."""
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    script = next((word for word in rest if word.endswith(".py")), "")
    if program == "acestep-ray" or (program == "python" and rest[:2] == ["-m", "acestep_ray"]):
        rest = rest if program == "acestep-ray" else rest[2:]
        check_ours(rest if is_whole else completed(rest), parse, tmp_path)
    elif program == "python" and script.startswith("pipelines/"):
        assert (ROOT / script).is_file(), f"there is no {script}"
        ours = [script.removeprefix("pipelines/").removesuffix(".py"), *rest[rest.index(script) + 1 :]]
        check_ours(ours if is_whole else completed(ours), parse, tmp_path)
    elif program == "python" and script:
        check_benchmark(script, rest)
    elif program == "ray":
        from ray.dashboard.modules.job.cli import submit
        from ray.scripts.scripts import cli as ray_cli

        if rest[:2] == ["job", "submit"]:
            check_click(submit, rest[2:])
            inner = rest[rest.index("--") + 1 :]
            check_command(inner, parse, tmp_path, is_whole=is_whole)
        else:
            check_click(ray_cli, rest)
    elif program == "mlflow":
        from mlflow.cli import cli as mlflow_cli

        check_click(mlflow_cli, rest)
    elif program == "make":
        check_make(rest)
    elif program in ("pip", "pip3"):
        check_pip(rest)
    elif program == "tensorboard":
        assert {word for word in rest if word.startswith("--")} <= {"--logdir", "--port", "--bind_all"}
    elif program == "python":
        assert rest[:2] in (["-m", "venv"], ["-m", "pip"], ["-m", "pytest"]), words
    elif program == "docker" and "acestep-ray" in rest:
        check_ours(rest[rest.index("acestep-ray") + 1 :], parse, tmp_path)
    else:
        assert program in OTHER_PROGRAMS, f"{program} is no program that the documentation speaks of"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_taken_by_its_parser(command: Command, parsed, tmp_path, capsys):
    try:
        check_command(list(command.words), parsed, tmp_path, is_whole=command.is_whole)
    except (SystemExit, InputError, AssertionError, click.ClickException, KeyError, ValueError) as error:
        pytest.fail(
            f"{command.page}:{command.line}\n{shlex.join(command.words)}\n{error} {capsys.readouterr().err}"
        )


def test_a_wrong_command_is_found(parsed, tmp_path, capsys):
    train = "acestep-ray train --dataset_path a --checkpoint_dir b"
    for text, is_whole in (
        (f"{train} --no_such_flag 1", True),
        (f"{train} --max_steps many", True),
        (f"{train} --precision bf17", True),
        (f"{train} --batch_size 0", False),
        ("acestep-ray train --dataset_path a", True),
        ("acestep-ray dance", True),
        ("acestep-ray precompute --dataset_path a --checkpoint_dir b --output_dir c --window some", True),
        ("python pipelines/train.py --bogus 1", False),
        ("python pipelines/nothing.py", False),
        ("make nothing", True),
        ("make quickstart SONG=x", True),
        ("pip install acestep-ray[nothing]", True),
        ("ray job submit --nothing 1 -- python pipelines/train.py", False),
        ("ray job submit -- python pipelines/train.py --bogus 1", False),
        ("mlflow ui --nothing", True),
        ("python benchmarks/train_step.py --nothing", True),
        ("asectep-ray train", True),
    ):
        with pytest.raises((SystemExit, InputError, AssertionError, click.ClickException, OSError)):
            check_command(shlex.split(text), parsed, tmp_path, is_whole=is_whole)


@cache
def all_flags() -> set[str]:
    """Of every subcommand, `JOB` or `ACTION`, and of the scripts in benchmarks."""
    found = {"debug", "verbose", "help", "version", "config", "json", "dry_run"}
    for job in {**cli.JOBS, **cli.EXPORT_ACTIONS}.values():
        found |= {field.name for field in fields(job.config)}
    # Subcommands whose flags are no dataclass, benchmarks, and what starts clusters.
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "cluster").rglob("*.py")]
    for source in [ROOT / "acestep_ray" / "flags.py", *scripts]:
        found |= {
            name.replace("-", "_") for name in re.findall(r'"--([\w-]+)"', source.read_text(encoding="utf-8"))
        }
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_flag_in_the_text_is_one(page):
    mentioned = re.findall(r"(?<![\w-])--([a-z][\w-]*)", prose(page))
    unknown = {name.replace("-", "_") for name in mentioned} - all_flags() - FOREIGN_FLAGS
    assert not unknown, f"{page.name} speaks of flags that there are not: {sorted(unknown)}"


def test_the_pages_have_commands_to_look_at():
    assert len(COMMANDS) > 40
    assert {"README.md", "docs/guide.md", "docs/export.md", "docs/tuning.md"} <= {c.page for c in COMMANDS}
    assert any("pipelines/train.py" in c.words for c in COMMANDS)
    assert sum(1 for page in PAGES for _ in blocks(page)) > 30
