"""The `acestep-ray` command: one subcommand a job, `checkpoint`, `cache` and `info`.

A job's module is imported when its subcommand is called, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from acestep_ray import __version__
from acestep_ray.config import (
    ExportConfig,
    ExtractConfig,
    GenerateConfig,
    MergeConfig,
    MixConfig,
    PrecomputeConfig,
    PrepareConfig,
    QuickstartConfig,
    TrainConfig,
    TuneConfig,
)
from acestep_ray.errors import EXIT_DONE, EXIT_FAULT, EXIT_INTERRUPTED, AceStepError, InputError


@dataclass(frozen=True)
class Job:
    """A subcommand: its settings and the function that does the work, `module:function`."""

    config: type
    target: str
    decides: frozenset[str] = frozenset()
    """Settings that the job makes itself, and that are no flags of it."""


JOBS = {
    "prepare": Job(PrepareConfig, "acestep_ray.data.prepare:prepare_dataset"),
    "precompute": Job(PrecomputeConfig, "acestep_ray.cache.precompute:precompute"),
    "train": Job(TrainConfig, "acestep_ray.training.job:train"),
    "tune": Job(
        TuneConfig,
        "acestep_ray.tuning.job:tune",
        decides=frozenset(
            (
                "train_parameters",
                "cpu_offload",
                "devices",
                "num_nodes",
                "min_devices",
                "every_n_train_steps",
                "every_plot_step",
                "plot_seconds",
                "ckpt_path",
                "checkpoints_dir",
                "keep_last",
            )
        ),
    ),
    "generate": Job(GenerateConfig, "acestep_ray.generation.job:generate"),
    "quickstart": Job(QuickstartConfig, "acestep_ray.quickstart:quickstart"),
}
EXPORT_ACTIONS = {
    "lora": Job(ExportConfig, "acestep_ray.export.job:export"),
    "merge": Job(MergeConfig, "acestep_ray.export.merge:merge"),
    "extract": Job(ExtractConfig, "acestep_ray.export.extract:extract"),
    "mix": Job(MixConfig, "acestep_ray.export.mix:mix"),
}
CHECKPOINT_ACTIONS = {
    "tiny": "acestep_ray.tiny_checkpoint:write_tiny_checkpoint",
    "fetch": "acestep_ray.models.checkpoint:fetch_checkpoint",
}
CACHE_ACTIONS = {
    "verify": (
        "acestep_ray.cache.maintenance:verify_cache",
        "Read every song of a feature cache and tell what is wrong.",
    ),
    "stats": (
        "acestep_ray.cache.maintenance:cache_stats",
        "Show how many songs a feature cache holds, their lengths, languages and bytes.",
    ),
    "prune": (
        "acestep_ray.cache.maintenance:prune_cache",
        "Delete what killed runs have left in a feature cache; not while precompute runs on it.",
    ),
}
CACHE_HELP = "Verify a feature cache, show what it holds, or delete what killed runs have left in it."
EXPORT_HELP = "Write a LoRA for other programs (`lora`, may be left out), or merge, extract or mix LoRAs."
INFO_HELP = "Show what a LoRA file holds: rank, alpha, targets, size, metadata, norm of each layer."
CHECKPOINT_HELP = "Write a tiny checkpoint with random weights, or download the released one (8.3 GB)."


# Where torchao is installed, these warn of it whatever is imported.
_TALKATIVE = ("torch.utils._pytree", "diffusers.quantizers.torchao")


def entry_point() -> None:
    """`acestep-ray …`: run and exit."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code: 0 done, 1 a fault, 2 a mistake in the input, 130 interrupted."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    parser = build_parser()
    arguments = with_export_action([with_underscores(argument) for argument in arguments])
    arguments = with_switches_on(arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        check_environment(os.environ)
        check_settings_files(arguments)
        run(parser.parse_args(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except AceStepError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        # The last resort: a fault of ours or of the machine, told in a line; the traceback is for who asks.
        if debug:
            traceback.print_exc()
        print(
            f"fault: {type(error).__name__}: {error}\n  → run again with --debug for the traceback",
            file=sys.stderr,
        )
        return EXIT_FAULT
    return EXIT_DONE


def run_pipeline(job: str) -> None:
    """What a file in `pipelines/` does: the flags of `acestep-ray JOB`, and its exit code."""
    sys.exit(main([job, *sys.argv[1:]]))


class Parser(ArgumentParser):
    """A parser that takes no shortened flags, and that names the flag which a mistyped one is nearest to."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, allow_abbrev=False, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        for name in re.findall(r"(?:arguments: |option ')-*(\w+)", message):
            if near := nearest_setting(name, [*JOBS, *EXPORT_ACTIONS]):
                message += f"\n  → did you mean {near}?"
        super().error(message, ex)


def nearest_setting(name: str, jobs: Iterable[str]) -> str | None:
    """The setting of these jobs that a mistyped name is most like."""
    known = {field.name for job in jobs for field in fields({**JOBS, **EXPORT_ACTIONS}[job].config)}
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise InputError for a variable `ACESTEP_JOB__NAME` that names no setting of that job."""
    for variable in environment:
        *path, name = variable.removeprefix("ACESTEP_").lower().split("__")
        job = path[-1] if path[:-1] in ([], ["export"]) and path else None
        known = EXPORT_ACTIONS if path[:-1] else JOBS
        if not variable.startswith("ACESTEP_") or job not in known:
            continue
        if name not in {*(field.name for field in fields(known[job].config)), "config"}:
            near = nearest_setting(name, [job])
            prefix = "__".join(["ACESTEP_" + path[0], *path[1:]]).upper()
            raise InputError(
                f"`{' '.join(path)}` has no setting {name!r}",
                where=f"${variable}",
                fix=f"did you mean {prefix}__{near.upper()}?" if near else "unset it",
            )


def build_parser() -> Parser:
    """The parser of the whole command."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        prog="acestep-ray",
        description="Training for the ACE-Step v1 music model, on Ray.",
        default_env=True,
        env_prefix="ACESTEP",  # ACESTEP_TRAIN__LEARNING_RATE
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subcommands(required=True, dest="command")
    for name, job in JOBS.items():
        subparser = new_parser(name, job.config.__doc__.splitlines()[0])
        subparser.add_class_arguments(job.config, as_group=False, skip=set(job.decides))
        commands.add_subcommand(name, subparser, help=job.config.__doc__.splitlines()[0])
    export = Parser(prog="acestep-ray export", description=EXPORT_HELP)
    commands.add_subcommand("export", export, help=EXPORT_HELP)
    actions = export.add_subcommands(required=True, dest="action")
    for name, job in EXPORT_ACTIONS.items():
        action = new_parser(f"export {name}", job.config.__doc__.splitlines()[0])
        action.add_class_arguments(job.config, as_group=False)
        actions.add_subcommand(name, action, help=job.config.__doc__.splitlines()[0])
    info = Parser(prog="acestep-ray info", description=INFO_HELP)
    info.add_argument("file", type=str, help="LoRA file or directory, training checkpoint or experiment.")
    info.add_argument("--json", action="store_true", help="Print one JSON object.")
    commands.add_subcommand("info", info, help=INFO_HELP)
    checkpoint = Parser(prog="acestep-ray checkpoint", description=CHECKPOINT_HELP)
    checkpoint.add_argument("action", choices=list(CHECKPOINT_ACTIONS), help="What to do.")
    checkpoint.add_argument("dir", type=str, help="Checkpoint directory to write.")
    commands.add_subcommand("checkpoint", checkpoint, help=CHECKPOINT_HELP)
    cache = Parser(prog="acestep-ray cache", description=CACHE_HELP)
    commands.add_subcommand("cache", cache, help=CACHE_HELP)
    actions = cache.add_subcommands(required=True, dest="action")
    for name, (_, description) in CACHE_ACTIONS.items():
        action = Parser(prog=f"acestep-ray cache {name}", description=description)
        action.add_argument("dir", type=str, help="Feature cache: a directory, or a URL such as s3://….")
        if name == "prune":
            action.add_argument("--dry_run", action="store_true", help="Only list the files.")
        actions.add_subcommand(name, action, help=description)
    return parser


def new_parser(name: str, description: str) -> Parser:
    """A job's parser: settings come from the environment, `--config FILE` and flags, the later winning."""
    parser = Parser(usage=f"acestep-ray {name} [--flag VALUE ...]", description=description)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings.")
    return parser


def run(parsed: Namespace) -> None:
    """Call the job that was asked for and print its summary."""
    settings = parsed[parsed.command]
    if parsed.command == "checkpoint":
        load(CHECKPOINT_ACTIONS[settings.action])(settings.dir)
        print(f"checkpoint written to {settings.dir}")
        return
    if parsed.command == "cache":
        target, _ = CACHE_ACTIONS[settings.action]
        values = settings[settings.action].as_dict()
        print(load(target)(values.pop("dir"), **values).render())
        return
    if parsed.command == "info":
        print(load("acestep_ray.export.info:info")(settings.file, as_json=settings.json).render())
        return
    job = JOBS.get(parsed.command)
    if parsed.command == "export":
        job, settings = EXPORT_ACTIONS[settings.action], settings[settings.action]
    values = {name: value for name, value in settings.as_dict().items() if name != "config"}
    print(load(job.target)(job.config(**values)).render())


def check_settings_files(arguments: Sequence[str]) -> None:
    """Raise InputError for a `--config` file that is missing or no YAML mapping; the parser would not name the file."""
    for flag, value in pairwise([*arguments, ""]):
        path = value if flag == "--config" else flag.removeprefix("--config=")
        if not flag.startswith("--config") or path in ("", flag):
            continue
        try:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"cannot read the settings file ({reason})", where=f"--config {path}") from None
        if not isinstance(settings, dict):
            raise InputError(
                "the settings file holds no settings, `name: value` a line", where=f"--config {path}"
            )


def load(target: str) -> Callable:
    """Import `module:function`."""
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


def with_underscores(argument: str) -> str:
    """`--learning-rate=1e-4` → `--learning_rate=1e-4`; values are left as they are."""
    match = re.fullmatch(r"(--[a-z][a-z-]*[a-z])(=.*)?", argument, re.DOTALL)
    return match[1][:2] + match[1][2:].replace("-", "_") + (match[2] or "") if match else argument


def with_switches_on(arguments: list[str]) -> list[str]:
    """`--allow_changes` of a job → `--allow_changes=true`, where no value follows."""
    jobs = EXPORT_ACTIONS if arguments[:1] == ["export"] else JOBS
    job = next((jobs[argument] for argument in arguments[:2] if argument in jobs), None)
    switches = {f"--{field.name}" for field in fields(job.config) if field.type == "bool"} if job else ()
    return [
        f"{argument}=true" if argument in switches and (not value or value.startswith("--")) else argument
        for argument, value in pairwise([*arguments, ""])
    ]


def with_export_action(arguments: list[str]) -> list[str]:
    """`export --input_path …` → `export lora --input_path …`."""
    if arguments[:1] == ["export"] and arguments[1:2] and arguments[1].startswith("--"):
        return arguments if arguments[1] == "--help" else ["export", "lora", *arguments[1:]]
    return arguments
