"""The `acestep-ray` command: one subcommand a job, `checkpoint`, `cache`, `doctor` and `info`.

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
    EvaluateConfig,
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
from acestep_ray.plain_yaml import load_yaml


@dataclass(frozen=True)
class Job:
    """A subcommand: its settings and the function that does the work, `module:function`."""

    config: type
    target: str
    decides: frozenset[str] = frozenset()
    """Settings that the job makes itself, and that are no flags of it."""

    @property
    def help(self) -> str:
        """The first line that the settings' docstring has."""
        return (self.config.__doc__ or "").partition("\n")[0]


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
    "evaluate": Job(EvaluateConfig, "acestep_ray.evaluation.job:evaluate"),
    "quickstart": Job(QuickstartConfig, "acestep_ray.quickstart:quickstart"),
}
EXPORT_ACTIONS = {
    "lora": Job(ExportConfig, "acestep_ray.export.job:export"),
    "merge": Job(MergeConfig, "acestep_ray.export.merge:merge"),
    "extract": Job(ExtractConfig, "acestep_ray.export.extract:extract"),
    "mix": Job(MixConfig, "acestep_ray.export.mix:mix"),
}
CHECKPOINT_ACTIONS = {
    "tiny": (
        "acestep_ray.tiny_checkpoint:write_tiny_checkpoint",
        "Write a complete tiny checkpoint with random weights.",
    ),
    "fetch": (
        "acestep_ray.fetch.job:fetch_checkpoint",
        "Download the released checkpoint and the SSL models, 10 GB; goes on where it was broken off.",
    ),
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
DOCTOR_HELP = "Check this machine, a cluster and what jobs read and write: a line each, with what to do."
REPORT_HELP = (
    "Write one HTML page of a run, a search or a quickstart: curves, samples to play, songs, speed, settings."
)
CHECKPOINT_HELP = "Write a tiny checkpoint with random weights, or download the released one."


# Settings that say where results go.
_RESULTS = ("output_dir", "output_path", "exp_dir", "logger_dir", "checkpoints_dir")
# Folder in which Ray unpacks what `ray job submit --working-dir` has uploaded.
_RAY_COPIES = "working_dir_files"
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
    set_parsing_settings(docstring_parse_attribute_docstrings=True, config_read_mode_fsspec_enabled=True)
    parser = Parser(
        prog="acestep-ray",
        description="Training for the ACE-Step v1 music model, on Ray.",
        default_env=True,
        env_prefix="ACESTEP",  # ACESTEP_TRAIN__LEARNING_RATE
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subcommands(required=True, dest="command")
    for name, job in JOBS.items():
        subparser = new_parser(name, job.help)
        subparser.add_class_arguments(job.config, as_group=False, skip=set(job.decides))
        commands.add_subcommand(name, subparser, help=job.help)
    export = Parser(prog="acestep-ray export", description=EXPORT_HELP)
    commands.add_subcommand("export", export, help=EXPORT_HELP)
    actions = export.add_subcommands(required=True, dest="action")
    for name, job in EXPORT_ACTIONS.items():
        action = new_parser(f"export {name}", job.help)
        action.add_class_arguments(job.config, as_group=False)
        actions.add_subcommand(name, action, help=job.help)
    info = Parser(prog="acestep-ray info", description=INFO_HELP)
    info.add_argument("file", type=str, help="LoRA file or directory, training checkpoint or experiment.")
    info.add_argument("--json", action="store_true", help="Print one JSON object.")
    commands.add_subcommand("info", info, help=INFO_HELP)
    report = Parser(prog="acestep-ray report", description=REPORT_HELP)
    report.add_argument("experiment", type=str, help="Folder of a run, a search (exps/NAME) or a quickstart.")
    report.add_argument(
        "--output", type=str | None, help="HTML file to write; EXPERIMENT/report.html by default."
    )
    commands.add_subcommand("report", report, help=REPORT_HELP)
    commands.add_subcommand("doctor", doctor_parser(), help=DOCTOR_HELP)
    checkpoint = Parser(prog="acestep-ray checkpoint", description=CHECKPOINT_HELP)
    commands.add_subcommand("checkpoint", checkpoint, help=CHECKPOINT_HELP)
    actions = checkpoint.add_subcommands(required=True, dest="action")
    for name, (_, description) in CHECKPOINT_ACTIONS.items():
        action = Parser(prog=f"acestep-ray checkpoint {name}", description=description)
        action.add_argument("dir", type=str, help="Checkpoint directory to write.")
        if name == "fetch":
            add_fetch_arguments(action)
        actions.add_subcommand(name, action, help=description)
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


def add_fetch_arguments(parser: Parser) -> None:
    """The flags of `checkpoint fetch`."""
    parser.add_argument(
        "--mirror",
        type=str | None,
        help="Server to take the place of huggingface.co; $HF_ENDPOINT is read too. It gets no token.",
    )
    parser.add_argument(
        "--only",
        type=str | None,
        help="Parts with commas between them: transformer, codec, vocoder, text_encoder, mert, m-hubert, lyric_vocab.",
    )
    parser.add_argument("--jobs", type=int, default=4, help="Files that are downloaded at a time.")


def doctor_parser() -> Parser:
    """The parser of `doctor`."""
    parser = Parser(prog="acestep-ray doctor", description=DOCTOR_HELP)
    for name, description in (
        ("checkpoint_dir", "Checkpoint directory that should be whole."),
        ("dataset_path", "Dataset, folder or table of songs of which some should open."),
        ("cache", "Feature cache of which some songs should read."),
        ("exp_dir", "Directory or URL of runs, that this machine and every node should read and write."),
        ("tracking_uri", "MLflow server or database that should answer."),
        ("address", "Ray cluster, HOST:PORT; $RAY_ADDRESS by default."),
    ):
        parser.add_argument(f"--{name}", type=str | None, help=description)
    parser.add_argument(
        "--fingerprint",
        action="store_true",
        help="Also read the checkpoint's weights: are they the released ones, and the cache's? Takes minutes.",
    )
    parser.add_argument("--json", dest="as_json", action="store_true", help="Print one JSON object.")
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
        target, _ = CHECKPOINT_ACTIONS[settings.action]
        values = settings[settings.action].as_dict()
        done = load(target)(values.pop("dir"), **values)
        print(done.render() if settings.action == "fetch" else f"checkpoint written to {done.path}")
        return
    if parsed.command == "cache":
        target, _ = CACHE_ACTIONS[settings.action]
        values = settings[settings.action].as_dict()
        print(load(target)(values.pop("dir"), **values).render())
        return
    if parsed.command == "info":
        print(load("acestep_ray.export.info:info")(settings.file, as_json=settings.json).render())
        return
    if parsed.command == "report":
        print(load("acestep_ray.reporting.job:report")(settings.experiment, settings.output).render())
        return
    if parsed.command == "doctor":
        report = load("acestep_ray.doctor.job:doctor")(**settings.as_dict())
        print(report.render())
        if report.unfinished:
            raise AceStepError(report.unfinished)
        return
    if parsed.command == "export":
        job, settings = EXPORT_ACTIONS[settings.action], settings[settings.action]
    else:
        job = JOBS[parsed.command]
    values = {name: value for name, value in settings.as_dict().items() if name != "config"}
    check_places(values, Path.cwd())
    summary = load(job.target)(job.config(**values))
    print(summary.render())
    if unfinished := getattr(summary, "unfinished", None):
        raise AceStepError(unfinished)


def check_places(values: Mapping[str, Any], working_dir: Path) -> None:
    """Raise InputError for results in the working directory of a Ray job, a copy that Ray deletes some day."""
    if _RAY_COPIES not in working_dir.parts:
        return
    for name in _RESULTS:
        place = values.get(name)
        if place is not None and "://" not in place and not Path(place).is_absolute():
            raise InputError(
                "a Ray job's working directory is a copy that does not last",
                where=f"--{name} {place}",
                fix="give an absolute path that all nodes share, or a URL",
            )


def check_settings_files(arguments: Sequence[str]) -> None:
    """Raise InputError for a `--config` file that is missing or no YAML mapping; the parser would not name the file."""
    for flag, value in pairwise([*arguments, ""]):
        path = value if flag == "--config" else flag.removeprefix("--config=")
        if not flag.startswith("--config") or path in ("", flag):
            continue
        try:
            settings = load_yaml(read_settings(path))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"cannot read the settings file ({reason})", where=f"--config {path}") from None
        if not isinstance(settings, dict):
            raise InputError(
                "the settings file holds no settings, `name: value` a line", where=f"--config {path}"
            )


def read_settings(path: str) -> str:
    """The text of a settings file, a path or a URL."""
    if "://" not in path:
        return Path(path).read_text(encoding="utf-8")
    from acestep_ray.storage import StoredFile

    return StoredFile.at(path).read_bytes().decode()


def load(target: str) -> Callable[..., Any]:
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
    switches = (
        {f"--{field.name}" for field in fields(job.config) if field.type.startswith("bool")} if job else ()
    )
    return [
        f"{argument}=true" if argument in switches and (not value or value.startswith("--")) else argument
        for argument, value in pairwise([*arguments, ""])
    ]


def with_export_action(arguments: list[str]) -> list[str]:
    """`export --input_path …` → `export lora --input_path …`."""
    if arguments[:1] == ["export"] and arguments[1:2] and arguments[1].startswith("--"):
        return arguments if arguments[1] == "--help" else ["export", "lora", *arguments[1:]]
    return arguments
