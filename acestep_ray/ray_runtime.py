"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from acestep_ray.errors import InputError


def connect() -> None:
    """Join the cluster of $RAY_ADDRESS, which `ray job submit` sets, else start one here; joined already, do nothing.

    A cluster that happens to run on this machine is not joined unasked: it may be another job's, and end with it.
    Raises InputError when the cluster of $RAY_ADDRESS does not answer.
    """
    if ray.is_initialized():
        return
    # Ray's warnings about itself are noise to a user; what goes wrong is raised.
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, **quiet)
        except ConnectionError as error:
            raise InputError(
                "no Ray cluster answers",
                where=f"{address} (from $RAY_ADDRESS)",
                fix="start it, or unset $RAY_ADDRESS",
            ) from error
        return
    # Ray would write a token to the home directory, where every later `ray start` would find it and ask for it.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(address="local", include_dashboard=False, **quiet)


def has_gpus() -> bool:
    """Whether the joined cluster has GPUs."""
    return ray.cluster_resources().get("GPU", 0) > 0


def beside_driver(cls: type) -> Any:
    """`cls` as an actor class whose actors lie on the driver's node: another node's loss does not end them."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(cls)


class _Flag:
    """An actor that somebody raises once."""

    def __init__(self):
        self.is_raised = False

    def raise_it(self) -> None:
        self.is_raised = True

    def look(self) -> bool:
        return self.is_raised


class StopSignal:
    """The driver's wish that its workers come to an end, which they look for as often as they like."""

    INTERVAL_SECONDS = 1.0

    def __init__(self):
        self._flag = beside_driver(_Flag).remote()

    def request(self) -> None:
        """Ask the workers to stop."""
        self._flag.raise_it.remote()

    @property
    def asked(self) -> Callable[[], bool]:
        """Whether the driver has asked; can be sent to a worker. It answers at once, a second old at most."""
        return _Looker(self._flag, self.INTERVAL_SECONDS)


class _Looker:
    """Looks at a flag from a thread of its own, once it is asked for the first time."""

    def __init__(self, flag: ActorHandle, interval: float):
        self.flag = flag
        self.interval = interval
        self.is_raised = False
        self.thread: threading.Thread | None = None

    def __call__(self) -> bool:
        if self.thread is None:
            self.thread = threading.Thread(target=self._look, daemon=True)
            self.thread.start()
        return self.is_raised

    def _look(self) -> None:
        while not self.is_raised:
            try:
                self.is_raised = ray.get(self.flag.look.remote())
            except RayActorError:
                return  # the driver is gone, and Ray ends this process too
            time.sleep(self.interval)


class _Lines:
    """An actor that holds lines until the driver takes them."""

    def __init__(self):
        self.lines: list[str] = []

    def put(self, line: str) -> None:
        self.lines.append(line)

    def take(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


class Console:
    """Lines from workers to the driver's terminal, without the rest of their output.

    Workers call `say`; the driver prints what was said while it is inside `with console`.
    """

    INTERVAL_SECONDS = 0.5

    def __init__(self):
        self._lines = beside_driver(_Lines).remote()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._print_until_ended, daemon=True)

    @property
    def say(self) -> Callable[[str], None]:
        """Takes a line; can be sent to a worker."""
        lines = self._lines
        return lambda line: ray.get(lines.put.remote(line))

    def __enter__(self) -> Console:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()

    def _print_until_ended(self) -> None:
        ended = False
        while not ended:
            # Looked at before the lines are taken: what was said before the end is printed.
            ended = self._ended.wait(self.INTERVAL_SECONDS)
            for line in ray.get(self._lines.take.remote()):
                print(line, flush=True)
