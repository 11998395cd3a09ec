"""The `acestep-ray` command: one subcommand a job, `checkpoint`, `cache`, `doctor`, `report` and `info`.

A job's module is imported when its subcommand is called, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace

from acestep_ray.config.paths import OUTPUTS, expanded_setting, is_path_setting
from acestep_ray.errors import EXIT_DONE, EXIT_FAULT, EXIT_INTERRUPTED, AceStepError, InputError
from acestep_ray.flags import (
    Switches,
    build_parser,
    check_environment,
    check_settings_files,
    checkpoint_to_write,
    with_export_action,
    with_old_variables,
    with_switches_on,
    with_underscores,
)
from acestep_ray.hidden_secrets import fit_to_print
from acestep_ray.jobs import CACHE_ACTIONS, CHECKPOINT_ACTIONS, EXPORT_ACTIONS, JOBS, Job
from acestep_ray.terminal import VERBOSE, guard_streams, replace_unencodable, show_error, show_summary

# Folder in which Ray unpacks what `ray job submit --working-dir` has uploaded.
_RAY_COPIES = "working_dir_files"
# Where torchao is installed, these warn of it whatever is imported.
_TALKATIVE = ("torch.utils._pytree", "diffusers.quantizers.torchao")


def entry_point() -> None:
    """`acestep-ray …`: run and exit."""
    _exit_with(sys.argv[1:])


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code: 0 done, 1 a fault, 2 a mistake in the input, 130 interrupted."""
    replace_unencodable()
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    switches, arguments = Switches.taken_from(arguments)
    parser = build_parser()
    arguments = with_export_action([with_underscores(argument) for argument in arguments])
    arguments = with_old_variables(with_switches_on(arguments), os.environ)
    try:
        with shown_logs(switches.verbose):
            check_environment(os.environ)
            check_settings_files(arguments)
            run(parser.parse_args(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except AceStepError as error:
        if switches.debug:
            show_traceback()
        show_error("error", str(error))
        return error.exit_code
    except SystemExit as end:
        if switches.debug and end.code:
            show_traceback()  # with what the parser has met
        raise
    except Exception as error:
        # The last resort: a fault of ours or of the machine, told in a line; the traceback is for who asks.
        if switches.debug:
            show_traceback()
        from acestep_ray.storage.disk import disk_is_full, full_disk_of

        number = full_disk_of(error)
        if number is not None:
            place = getattr(error, "filename", None) or ""
            show_error("error", str(disk_is_full(number, os.fsdecode(place))))
            return EXIT_FAULT
        advice = "run again with --debug for the traceback, with -v for what Ray and its workers say"
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for its name
            advice = "look with nvidia-smi for other programs on the GPU, or give --device cpu"
        show_error("fault", f"{type(error).__name__}: {error}\n  → {advice}")
        return EXIT_FAULT
    return EXIT_DONE


@contextmanager
def shown_logs(verbose: bool) -> Iterator[None]:
    """Let Ray's logs be shown, where that is asked for; the workers that Ray starts meanwhile know of it too."""
    before = os.environ.get(VERBOSE)
    if verbose:
        os.environ[VERBOSE] = "1"
    try:
        yield
    finally:
        if verbose and before is None:
            del os.environ[VERBOSE]
        elif before is not None:
            os.environ[VERBOSE] = before


def run_pipeline(job: str) -> None:
    """What a file in `pipelines/` does: the flags of `acestep-ray JOB`, and its exit code."""
    _exit_with([job, *sys.argv[1:]])


def _exit_with(arguments: Sequence[str]) -> None:
    """Run a command and end this process with its exit code; a second Ctrl-C ends it at once."""
    guard_streams()
    # Scripts start background commands with SIGINT ignored; `kill -INT` should end them as Ctrl-C does.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main(arguments)
    except KeyboardInterrupt:  # a second one, while the first was handled
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        _end_interrupted()
    sys.exit(code)


def _end_interrupted() -> NoReturn:
    """End Ray's processes and this one, also where threads are still at work."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(EXIT_INTERRUPTED))
    try:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(EXIT_INTERRUPTED)


def show_traceback() -> None:
    """Print the traceback of the error at hand; the messages in it may repeat what clients were given."""
    print(fit_to_print(traceback.format_exc()), end="", file=sys.stderr)


def run(parsed: Namespace) -> None:
    """Call what was asked for and print its summary."""
    settings = parsed[parsed.command]
    if parsed.command == "checkpoint":
        target, _ = CHECKPOINT_ACTIONS[settings.action]
        values = settings[settings.action].as_dict()
        done = load(target)(checkpoint_to_write(values), **values)
        show_summary(done.render() if settings.action == "fetch" else f"checkpoint written to {done.path}")
    elif parsed.command == "cache":
        target, _ = CACHE_ACTIONS[settings.action]
        values = settings[settings.action].as_dict()
        show_summary(load(target)(values.pop("dir"), **values).render())
    elif parsed.command == "info":
        show_summary(load("acestep_ray.export.info:info")(settings.file, as_json=settings.json).render())
    elif parsed.command == "report":
        show_summary(
            load("acestep_ray.reporting.job:report")(settings.experiment, settings.output_path).render()
        )
    elif parsed.command == "doctor":
        finish(load("acestep_ray.doctor.job:doctor")(**settings.as_dict()))
    elif parsed.command == "export":
        run_job(EXPORT_ACTIONS[settings.action], settings[settings.action])
    else:
        run_job(JOBS[parsed.command], settings)


def run_job(job: Job, settings: Namespace) -> None:
    """Call a job with its settings."""
    given = {name: value for name, value in settings.as_dict().items() if name != "config"}
    values = {name: expanded_setting(name, value) for name, value in given.items()}
    check_filled(job, values)
    check_places(values, Path.cwd())
    finish(load(job.target)(job.config(**values)))


def finish(summary: Any) -> None:
    """Print what was made. Raises AceStepError where something is left to do."""
    show_summary(summary.render())
    if unfinished := getattr(summary, "unfinished", None):
        raise AceStepError(unfinished)


def check_filled(job: Job, values: Mapping[str, Any]) -> None:
    """Raise InputError for what the parser lets through empty: a number of a settings file, and a path anywhere.

    An empty path, as an unset variable of a shell makes it, would mean the working directory.
    """
    for field in fields(job.config):
        value, flag = values.get(field.name, field.default), f"--{field.name}"
        if value is None and not field.type.endswith("None"):
            raise InputError(
                f"has to be of type {field.type}, and is null",
                where=flag,
                fix="give a value in the settings file, or leave the line out",
            )
        if value == "" and is_path_setting(field.name):
            raise InputError("the path is empty", where=flag, fix="give one; . is the working directory")


def check_places(values: Mapping[str, Any], working_dir: Path) -> None:
    """Raise InputError for results in the working directory of a Ray job, a copy that Ray deletes some day."""
    if _RAY_COPIES not in working_dir.parts:
        return
    for name in OUTPUTS:
        place = values.get(name)
        if place is not None and "://" not in place and not Path(place).is_absolute():
            raise InputError(
                "a Ray job's working directory is a copy that does not last",
                where=f"--{name} {place}",
                fix="give an absolute path that all nodes share, or a URL",
            )


def load(target: str) -> Callable[..., Any]:
    """Import `module:function`."""
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)
