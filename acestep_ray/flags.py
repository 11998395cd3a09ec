"""The flags of the `acestep-ray` command: its parsers, and how what a user types is read."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TextIO

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from acestep_ray import __version__
from acestep_ray.config.groups import Groups
from acestep_ray.errors import EXIT_INPUT, InputError
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
from acestep_ray.paths import expand_home
from acestep_ray.plain_text import decode_text
from acestep_ray.plain_yaml import load_yaml
from acestep_ray.terminal import show_error
from acestep_ray.terminal.help import help_text, show_help

_SETTINGS_HELP = (
    "Settings also come from a YAML file (--config FILE) and from the environment (%s). A flag goes before the file, "
    "the file before the environment."
)
_PAGES = {
    "checkpoint": "doctor.md",
    "cache": "precompute.md",
    "info": "export.md",
    "report": "report.md",
    "doctor": "doctor.md",
}


class Parser(ArgumentParser):
    """A parser that takes no shortened flags, and that names the flag which a mistyped one is nearest to.

    Its help has the flags or commands in `sections`, by title, and those that are in none under "arguments".
    """

    def __init__(
        self,
        command: str = "",
        *,
        sections: Groups | None = None,
        required: Sequence[str] = (),
        **options: Any,
    ):
        """`command` is what is typed after the program's name; `required` flags are named so in its help."""
        self.sections: Groups = sections or {}
        self.required = frozenset(required)
        self.command = f"acestep-ray {command}".rstrip()
        super().__init__(prog=self.command, allow_abbrev=False, **options)

    def parse_path(self, path: Any, *arguments: Any, **options: Any) -> Namespace:
        """Settings of a file in any encoding that its byte order mark names; the base class takes the locale's."""
        return self.parse_string(read_settings(os.fspath(path)), os.fspath(path), *arguments, **options)

    def format_help(self, *_: Any) -> str:
        return help_text(self).plain

    def print_help(self, file: TextIO | None = None) -> None:  # type: ignore[override]  # asks whether it is a terminal
        show_help(self, file if file is not None else sys.stdout)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        for name in re.findall(r"(?:arguments: |option ')-*(\w+)", message):
            if near := nearest_setting(name, [*JOBS, *EXPORT_ACTIONS]):
                message += f"\n  → did you mean {near}?"
        parser: Parser = getattr(ex, "subcommand_parser", None) or self
        show_error("error", f"{_as_typed(message)}\n  → {parser.command} --help tells what it takes")
        sys.exit(EXIT_INPUT)


_ONE_OF_SEVERAL_TYPES = re.compile(
    r"Does not validate against any of the Union subtypes\s+Subtypes: \[(.*?)\]\n.*Given value: ", re.DOTALL
)


def _not_of_these_types(told: re.Match[str]) -> str:
    types = re.sub(r"<class '(\w+)'>", r"\1", told[1]).split(", ")
    return f"has to be of type {' or '.join(name for name in types if name != 'NoneType')}, and is "


def _as_typed(message: str) -> str:
    """A message of the parser in the words of who types."""
    message = re.sub(r'Parser key "([\w.]+)":\s*', r"--\1: ", message)
    message = re.sub(r"Expected an? <class '(\w+)'>\. Got value: ", r"has to be of type \1, and is ", message)
    message = _ONE_OF_SEVERAL_TYPES.sub(_not_of_these_types, message)
    message = re.sub(r"argument (command|action): invalid choice: ('.*?') .*", r"there is no \1 \2", message)
    if message.startswith("the following arguments are required: "):
        start, _, names = message.partition(": ")
        flags = (name.strip().rpartition(".")[2] for name in names.split(","))
        return f"{start}: {', '.join(f'--{name}' for name in flags)}"
    return message


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
        "--output", type=str | None, help="HTML file to write; EXPERIMENT/report.html by default."
    )
    commands.add_subcommand("report", report, help=REPORT_HELP)
    commands.add_subcommand("doctor", doctor_parser(), help=DOCTOR_HELP)
    checkpoint = group_parser("checkpoint", CHECKPOINT_HELP)
    commands.add_subcommand("checkpoint", checkpoint, help=CHECKPOINT_HELP)
    actions = checkpoint.add_subcommands(required=True, dest="action")
    for name, (_, description) in CHECKPOINT_ACTIONS.items():
        action = action_parser(f"checkpoint {name}", description, "DIR")
        action.add_argument("dir", type=str, help="Checkpoint directory to write.")
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


def read_settings(path: str) -> str:
    """The text of a settings file, a path or a URL. Raises OSError, and ValueError for what is no text."""
    if "://" not in path:
        return decode_text(Path(expand_home(path)).read_bytes())
    from acestep_ray.storage import StoredFile

    return decode_text(StoredFile.at(path).read_bytes())


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
