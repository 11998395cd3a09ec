"""`acestep-ray doctor`: one line for everything that a job may miss, with what to do about it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from acestep_ray.doctor import machine
from acestep_ray.doctor.finding import PROBLEM, WARNING, Finding, from_error, ok, problem
from acestep_ray.doctor.output import check_output
from acestep_ray.errors import InputError
from acestep_ray.paths import expand_home
from acestep_ray.storage import is_url

if TYPE_CHECKING:
    from acestep_ray.models.checkpoint import CheckpointDir

REMOTE_SECONDS = 60.0
"""After which storage or a server that does not answer is given up."""
_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class DoctorReport:
    """All findings, in the order of the checks."""

    findings: list[Finding]
    as_json: bool = False

    @property
    def unfinished(self) -> str | None:
        """The error that the command ends with; None where nothing is wrong."""
        problems = self._count(PROBLEM)
        return f"the doctor found {problems} problem{'s' * (problems > 1)}" if problems else None

    def render(self) -> str:
        """A line a finding and a count, or one JSON object."""
        if self.as_json:
            findings = [asdict(finding) for finding in self.findings]
            return json.dumps({"findings": findings, "problems": self._count(PROBLEM)}, indent=2)
        lines = [finding.render() for finding in self.findings]
        counts = f"{self._count(PROBLEM)} problems, {self._count(WARNING)} warnings"
        return "\n".join([*lines, f"{len(lines)} findings: {counts}"])

    def _count(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)


def doctor(
    *,
    checkpoint_dir: str | None = None,
    dataset_path: str | None = None,
    cache: str | None = None,
    exp_dir: str | None = None,
    tracking_uri: str | None = None,
    address: str | None = None,
    fingerprint: bool = False,
    as_json: bool = False,
) -> DoctorReport:
    """Look at this machine, and at each artefact and server that is named; `address` defaults to $RAY_ADDRESS.

    `fingerprint` reads the checkpoint's weights, minutes the first time. Nothing raises: what fails is a finding.
    """
    findings: list[Finding] = []
    checkpoint_dir, dataset_path, cache, exp_dir = (
        None if place is None else expand_home(place)
        for place in (checkpoint_dir, dataset_path, cache, exp_dir)
    )

    def look(name: str, check: Callable[[], Any], seconds: float | None = None) -> None:
        findings.extend(_guarded(name, check, seconds))

    def limit(place: str) -> float | None:
        return REMOTE_SECONDS if is_url(place) else None

    look("python", _check_python)
    look("packages", _check_packages)
    look("open files", lambda: machine.check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if os.path.isdir(_SHARED_MEMORY):
        look("/dev/shm", _check_shared_memory)
    look("audio", _check_decoders)
    checkpoint: list[CheckpointDir] = []
    if checkpoint_dir is not None:
        look("checkpoint", lambda: _check_checkpoint(checkpoint_dir, fingerprint, checkpoint))
    look("GPU", lambda: _check_gpus(checkpoint[0] if checkpoint else None))
    if dataset_path is not None:
        look("dataset", lambda: _artefacts().check_dataset(dataset_path), limit(dataset_path))
    if cache is not None:
        opened = checkpoint[0] if checkpoint else None
        look(
            "cache",
            lambda: _artefacts().check_cache(cache, opened, fingerprint=fingerprint),
            limit(cache),
        )
    for place, flag in ((cache, "--cache"), (exp_dir, "--exp_dir")):
        if place is not None and not is_url(place):
            look("disk", partial(machine.check_disk, place, flag))
    if tracking_uri is not None:
        look("tracking", lambda: _artefacts().check_tracking(tracking_uri), REMOTE_SECONDS)
    address = address or os.environ.get("RAY_ADDRESS")
    if address not in (None, "local"):
        look("cluster", lambda: _check_cluster(address, exp_dir))
    else:
        findings.append(
            ok("cluster", "none: jobs start Ray on this machine; --address or $RAY_ADDRESS names one")
        )
        if exp_dir is not None:
            look("output", lambda: check_output(exp_dir), limit(exp_dir))
    return DoctorReport(findings, as_json)


def _guarded(name: str, check: Callable[[], Any], seconds: float | None) -> list[Finding]:
    """What a check finds; that it fails, or takes longer than `seconds`, is a problem of its own."""
    found: list[Finding] = []

    def run() -> None:
        try:
            result = check()
            found.extend([result] if isinstance(result, Finding) else result)
        except InputError as error:
            found.append(from_error(name, error))
        except Exception as error:  # a doctor that stops at the first surprise is of no use
            found.append(
                problem(
                    name,
                    f"the check failed: {type(error).__name__}: {error}",
                    "a fault of this machine or of acestep-ray: report this line",
                )
            )

    # A daemon: what hangs does not keep the process.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return [problem(name, f"no answer in {seconds:g} s", "look at the network, proxies and the address")]
    return found


def _artefacts() -> Any:
    """The checks that import torch; a machine on which that fails is told of the rest."""
    from acestep_ray.doctor import artefacts

    return artefacts


def _check_python() -> Finding:
    requires = importlib.metadata.metadata(machine.PACKAGE)["Requires-Python"]
    return machine.check_python(platform.python_version(), requires)


def _check_packages() -> Iterable[Finding]:
    return machine.check_packages(importlib.metadata.requires(machine.PACKAGE) or [])


def _check_shared_memory() -> Finding:
    return machine.check_shared_memory(shutil.disk_usage(_SHARED_MEMORY).total, machine.machine_memory())


def _check_decoders() -> Finding:
    from acestep_ray.data.audio_decoders import why_no_torchcodec

    return machine.check_decoders(why_no_torchcodec())


def _check_checkpoint(directory: str, fingerprint: bool, opened: list[CheckpointDir]) -> Iterator[Finding]:
    """The findings; a directory that is whole goes to `opened`."""
    from acestep_ray.models.checkpoint import CheckpointDir

    opened.append(CheckpointDir.open(directory))
    yield from _artefacts().check_checkpoint(opened[0], fingerprint=fingerprint)


def _check_gpus(checkpoint: CheckpointDir | None) -> Iterator[Finding]:
    from acestep_ray.doctor import gpu
    from acestep_ray.models.transformer_config import TransformerConfig

    facts = gpu.look_at_gpus()
    yield gpu.check_torch(facts)
    yield from gpu.check_gpus(facts)
    config = TransformerConfig() if checkpoint is None else checkpoint.transformer_config
    yield from gpu.check_fast_path(facts, config.attention_head_dim)


def _check_cluster(address: str, place: str | None) -> Iterable[Finding]:
    from acestep_ray.doctor.cluster import check_cluster

    return check_cluster(address, place)
