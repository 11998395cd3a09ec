"""The flags of the `acestep-ray` command: its parsers, and how what a user types is read."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from typing import Any, NoReturn

import yaml
from jsonargparse import set_parsing_settings

from acestep_ray import __version__
from acestep_ray.errors import EXIT_INPUT, InputError
from acestep_ray.hints import nearest, setting_hints
from acestep_ray.jobs import (
    CACHE_ACTIONS,
    CACHE_HELP,
    CHECKPOINT_ACTIONS,
    CHECKPOINT_HELP,
    COMMAND_GROUPS,
    DOCTOR_HELP,
    EXPORT_ACTIONS,
    EXPORT_HELP,
    INFO_HELP,
    JOBS,
    REPORT_HELP,
    Job,
)
from acestep_ray.parser import GROUPS, Parser, read_settings
from acestep_ray.plain_yaml import load_yaml
from acestep_ray.terminal import show_error

_SETTINGS_HELP = (
    "Settings also come from a YAML file (--config FILE) and from the environment (%s). A flag goes before the file, "
    "the file before the environment."
)
OLD_VARIABLES = {"ACESTEP_REPORT__OUTPUT": ("report", "output_path")}
"""Variables under the earlier name of a setting: the command and the name now. Old flags are aliases of new ones."""
_PAGES = {
    "checkpoint": "doctor.md",
    "cache": "precompute.md",
    "info": "export.md",
    "report": "report.md",
    "doctor": "doctor.md",
}


@dataclass(frozen=True)
class Switches:
    """What goes with every command, wherever in it it stands."""

    verbose: bool
    debug: bool

    @classmethod
    def taken_from(cls, arguments: Sequence[str]) -> tuple[Switches, list[str]]:
        """The switches, and the arguments without them."""
        verbose, debug = ("-v", "--verbose"), ("--debug",)
        rest = [argument for argument in arguments if argument not in (*verbose, *debug)]
        given = set(arguments)
        return cls(not given.isdisjoint(verbose), not given.isdisjoint(debug)), rest


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise InputError for a variable `ACESTEP_JOB__NAME` that names no setting of that job, or no command."""
    for variable in environment:
        *path, name = variable.removeprefix("ACESTEP_").lower().split("__")
        if not variable.startswith("ACESTEP_") or not path:
            continue
        words = " ".join(path)
        job = _job_of(words)
        if job is None:  # of a command that is no job the parser looks at the names it knows
            _check_command_of_variable(variable, path, name)
        elif name not in {*_settings_of(job), "config"}:
            commands = build_parser().commands()
            hints = setting_hints(name, words, commands, instead=job.instead, flag="")
            prefix = "__".join(["ACESTEP_" + path[0], *path[1:]]).upper()
            if hints and (near := re.match(r"did you mean (\w+)\?", hints[0])):
                hints[0] = f"did you mean {prefix}__{near[1].upper()}?"
            raise InputError(
                f"`{words}` has no setting {name!r}",
                where=f"${variable}",
                fix="\n  → ".join(hints) or f"unset it; `acestep-ray {words} --help` lists the settings",
            )


def _check_command_of_variable(variable: str, path: list[str], name: str) -> None:
    """Raise InputError where the variable names a command that is none, by a mistyped name."""
    if path[0] in (*JOBS, *GROUPS, *_PAGES):
        return
    if near := nearest(path[0], (*JOBS, *GROUPS, *_PAGES)):
        raise InputError(
            f"there is no command {path[0]!r}",
            where=f"${variable}",
            fix=f"did you mean ACESTEP_{'__'.join([near, *path[1:], name]).upper()}?",
        )


def _job_of(words: str) -> Job | None:
    """The job of a command such as `train` or `export merge`."""
    return (
        EXPORT_ACTIONS.get(words.removeprefix("export ")) if words.startswith("export ") else JOBS.get(words)
    )


def _settings_of(job: Job) -> list[str]:
    return [field.name for field in fields(job.config) if field.name not in job.decides]


def build_parser() -> Parser:
    """The parser of the whole command."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True, config_read_mode_fsspec_enabled=True)
    parser = Parser(
        usage="acestep-ray COMMAND [--flag VALUE ...]",
        description="Training for the ACE-Step v1 music model, on Ray.",
        epilog="`acestep-ray COMMAND --help` lists the flags of a command. "
        + _SETTINGS_HELP % "ACESTEP_TRAIN__LEARNING_RATE=1e-4"
        + "\nDocs: README.md, docs/guide.md (step by step), docs/troubleshooting.md (what a message means).",
        sections=COMMAND_GROUPS,
        default_env=True,
        env_prefix="ACESTEP",  # ACESTEP_TRAIN__LEARNING_RATE
    )
    parser.add_argument("--version", action="version", version=__version__, help="Show the version and end.")
    commands = parser.add_subcommands(required=True, dest="command")
    for name, job in JOBS.items():
        commands.add_subcommand(name, job_parser(name, job), help=job.help)
    export = group_parser("export", EXPORT_HELP)
    commands.add_subcommand("export", export, help=EXPORT_HELP)
    actions = export.add_subcommands(required=True, dest="action")
    for name, job in EXPORT_ACTIONS.items():
        actions.add_subcommand(name, job_parser(f"export {name}", job), help=job.help)
    info = action_parser("info", INFO_HELP, "FILE")
    info.add_argument("file", type=str, help="LoRA file or directory, training checkpoint or experiment.")
    info.add_argument("--json", action="store_true", help="Print one JSON object.")
    commands.add_subcommand("info", info, help=INFO_HELP)
    report = action_parser("report", REPORT_HELP, "EXPERIMENT")
    report.add_argument("experiment", type=str, help="Folder of a run, a search (exps/NAME) or a quickstart.")
    report.add_argument(
        "--output_path",
        "--output",  # its name until 0.1.0
        type=str | None,
        help="HTML file to write; EXPERIMENT/report.html by default.",
    )
    commands.add_subcommand("report", report, help=REPORT_HELP)
    commands.add_subcommand("doctor", doctor_parser(), help=DOCTOR_HELP)
    checkpoint = group_parser("checkpoint", CHECKPOINT_HELP)
    commands.add_subcommand("checkpoint", checkpoint, help=CHECKPOINT_HELP)
    actions = checkpoint.add_subcommands(required=True, dest="action")
    for name, (_, description) in CHECKPOINT_ACTIONS.items():
        action = action_parser(f"checkpoint {name}", description, "DIR")
        action.add_argument("dir", type=str | None, nargs="?", help="Checkpoint directory to write.")
        action.add_argument("--output_dir", type=str | None, help="The same, as a flag.")
        if name == "fetch":
            add_fetch_arguments(action)
        actions.add_subcommand(name, action, help=description)
    cache = group_parser("cache", CACHE_HELP)
    commands.add_subcommand("cache", cache, help=CACHE_HELP)
    actions = cache.add_subcommands(required=True, dest="action")
    for name, (_, description) in CACHE_ACTIONS.items():
        action = action_parser(f"cache {name}", description, "DIR")
        action.add_argument("dir", type=str, help="Feature cache: a directory, or a URL such as s3://….")
        if name == "prune":
            action.add_argument("--dry_run", action="store_true", help="Only list the files.")
        actions.add_subcommand(name, action, help=description)
    parser.adopt()
    return parser


def job_parser(name: str, job: Job) -> Parser:
    """A job's parser: settings come from the environment, `--config FILE` and flags, the later winning."""
    first = next(field.name for field in fields(job.config) if field.name not in job.decides)
    variable = "__".join(["ACESTEP", *name.split(), first]).upper().replace("ACESTEP__", "ACESTEP_")
    parser = Parser(
        name,
        usage=f"acestep-ray {name} [--flag VALUE ...]",
        description=job.help,
        epilog=f"{_SETTINGS_HELP % f'{variable}=…'}\nDocs: docs/{job.page}.",
        sections=job.config.GROUPS,
        required=[f.name for f in fields(job.config) if f.default is f.default_factory is MISSING],
        instead=job.instead,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings.")
    parser.add_class_arguments(job.config, as_group=False, skip=set(job.decides))
    return parser


def action_parser(name: str, description: str, positional: str = "") -> Parser:
    """The parser of a command that is no job."""
    usage = " ".join(word for word in ("acestep-ray", name, positional, "[--flag VALUE ...]") if word)
    page = _PAGES[name.split()[0]]
    return Parser(name, usage=usage, description=description, epilog=f"Docs: docs/{page}.")


def group_parser(name: str, description: str) -> Parser:
    """The parser of a command that has actions."""
    return Parser(
        name,
        usage=f"acestep-ray {name} ACTION [--flag VALUE ...]",
        description=description,
        epilog=f"`acestep-ray {name} ACTION --help` lists the flags of an action.",
    )


def checkpoint_to_write(values: dict[str, Any]) -> str:
    """The directory that `checkpoint tiny` or `fetch` writes, taken out of its settings. Raises InputError for none."""
    given = [place for place in (values.pop("dir"), values.pop("output_dir")) if place is not None]
    if len(set(given)) != 1 or not given[0]:
        raise InputError(
            "the directory to write is given twice"
            if len(set(given)) > 1
            else "no directory to write is given",
            where="DIR or --output_dir",
            fix="give one, such as `acestep-ray checkpoint tiny DIR`",
        )
    return str(given[0])


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
    parser = action_parser("doctor", DOCTOR_HELP)
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


# --- what is typed -----------------------------------------------------------------------------------------


def check_settings_files(arguments: Sequence[str]) -> None:
    """Raise InputError for a `--config` file that is missing or no YAML mapping; the parser would not name the file."""
    for flag, value in pairwise([*arguments, ""]):
        path = value if flag == "--config" else flag.removeprefix("--config=")
        if not flag.startswith("--config") or path in ("", flag):
            continue
        try:
            settings = load_yaml(read_settings(path))
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"cannot read the settings file ({reason})", where=f"--config {path}") from None
        if not isinstance(settings, dict):
            raise InputError(
                "the settings file holds no settings, `name: value` a line", where=f"--config {path}"
            )
        words = " ".join(arguments[: 2 if arguments[:1] == ["export"] else 1])
        job = _job_of(words)
        unknown = [str(name) for name in settings if job and name not in {*_settings_of(job), "config"}]
        if job and unknown:
            _refuse_setting(words, job, unknown[0], path)


def _refuse_setting(words: str, job: Job, name: str, path: str) -> NoReturn:
    """End the command over a settings file with a name that is no setting of its job."""
    hints = setting_hints(name, words, build_parser().commands(), instead=job.instead, flag="")
    lines = [f"`{words}` has no setting {name!r}: --config {path}", *hints]
    show_error("error", "\n  → ".join([*lines, f"acestep-ray {words} --help tells what it takes"]))
    sys.exit(EXIT_INPUT)


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


def with_old_variables(arguments: list[str], environment: Mapping[str, str]) -> list[str]:
    """The arguments with what variables under a setting's old name say, unless the new name is given."""
    for old, (command, name) in OLD_VARIABLES.items():
        new = f"ACESTEP_{command}__{name}".upper()
        is_given = any(
            re.match(rf"--({name}|{old.rpartition('__')[2].lower()})(=|$)", one) for one in arguments
        )
        if arguments[:1] == [command] and old in environment and new not in environment and not is_given:
            arguments = [*arguments, f"--{name}={environment[old]}"]
    return arguments


def with_export_action(arguments: list[str]) -> list[str]:
    """`export --input_path …` → `export lora --input_path …`."""
    if arguments[:1] == ["export"] and arguments[1:2] and arguments[1].startswith("--"):
        return arguments if arguments[1] == "--help" else ["export", "lora", *arguments[1:]]
    return arguments
