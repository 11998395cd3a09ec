"""The command line with jobs that are short: `python -m tests.terminal.commands KIND prepare --flag …`."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from acestep_ray import cli
from acestep_ray.errors import InputError
from acestep_ray.terminal import Progress, fact_table


class Summary:
    def render(self) -> str:
        return fact_table([("songs", 3), ("warning", "one is short")])


def long_job(config: Any) -> Summary:
    """Takes a second and a half."""
    with Progress("copying", 15, "songs") as progress:
        for done in range(16):
            progress.update(done, "0 rejected")
            time.sleep(0.1)
            if done == 7:
                print("a line of the job")
    return Summary()


def endless_job(config: Any) -> Summary:
    """Waits to be interrupted."""
    with Progress("copying", 15, "songs") as progress:
        progress.update(1)
        time.sleep(60)
    return Summary()


def mistaken_job(config: Any) -> Summary:
    """Ends as jobs do where the user has made a mistake."""
    raise InputError("there are no songs", where=config.data_dir, fix="give a folder of songs")


def ray_job(config: Any) -> Summary:
    """Prints in a worker."""
    import ray

    from acestep_ray.ray_runtime import connect

    def work() -> None:
        print("printed by a worker")
        sys.stdout.flush()

    connect()
    ray.get(ray.remote(work).remote())
    time.sleep(1.5)  # until Ray has brought what the worker printed
    return Summary()


JOBS: dict[str, Callable[[Any], Summary]] = {
    "long": long_job,
    "endless": endless_job,
    "mistaken": mistaken_job,
    "ray": ray_job,
}

if __name__ == "__main__":
    # A shell that runs tests in the background has its commands ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kind, *arguments = sys.argv[1:]
    cli.load = lambda target: JOBS[kind]
    sys.exit(cli.main(arguments))
