"""How many trials run at a time, and what each reserves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from acestep_ray.config import TuneConfig
from acestep_ray.errors import InputError
from acestep_ray.ray_runtime import share_of
from acestep_ray.terminal.numbers import number_text

# What a trial's own process reserves where its training is done by others.
HEAD_CPUS = 0.01


@dataclass(frozen=True)
class Host:
    """A shared base model to be."""

    node: int
    """Which of the nodes it lies on."""
    cpus: float
    gpus: int
    seats: int
    """Trials that share it at a time."""


@dataclass(frozen=True)
class Reserved:
    """What a search takes of a cluster."""

    use_gpu: bool
    per_trial: dict[str, float]
    """What Tune reserves for a trial."""
    at_once: int
    worker_cpus: float
    """What each worker reserves, of a trial of several without GPUs."""
    hosts: tuple[Host, ...] = ()
    """Where trials share base models."""


def reserve(config: TuneConfig, nodes: Sequence[Mapping[str, float]], *, streamed: bool) -> Reserved:
    """What the trials take of these nodes, each the resources of one; `streamed` songs need CPUs to be decoded.

    Raises InputError for a trial that would wait for ever.
    """
    place = config.worker_resource
    if place is not None:
        nodes = [node if node.get(place) else {} for node in nodes]
        if not any(nodes):
            raise InputError(
                "no node of the cluster has this resource",
                where=f"--worker_resource {place}",
                fix="leave it out, or start nodes that have it",
            )
    for name in ("cpus_per_trial", "workers_per_trial"):
        if getattr(config, name) <= 0:
            raise InputError("must be above 0", where=f"--{name} {getattr(config, name)}")
    total_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    use_gpu = config.device != "cpu" and config.gpus_per_trial != 0 and total_gpus > 0
    if not use_gpu and (config.device == "cuda" or config.gpus_per_trial):
        asked = "--device cuda" if config.device == "cuda" else f"--gpus_per_trial {config.gpus_per_trial}"
        raise InputError("the cluster has no GPU for the trials", where=asked, fix="use --device cpu")
    workers = config.workers_per_trial
    gpus = float(workers) if config.gpus_per_trial is None else config.gpus_per_trial
    gpus = gpus if use_gpu else 0.0
    # Songs without a cache are decoded beside training.
    spare = 0.5 if streamed and not use_gpu else 1.0
    nodes = [{**node, "CPU": node.get("CPU", 0.0) * spare} for node in nodes]
    if workers > 1:
        return _several_workers(config, nodes, gpus)
    _check_one_process(config, nodes, gpus)
    if config.share_base:
        hosts = tuple(_hosts(nodes, gpus, config.cpus_per_trial))
        return Reserved(use_gpu, {"cpu": HEAD_CPUS}, sum(host.seats for host in hosts), 0.0, hosts)
    at_once = sum(_fitting(node, gpus, config.cpus_per_trial) for node in nodes)
    per_trial = {"cpu": config.cpus_per_trial, "gpu": gpus, **share_of(place)}
    return Reserved(use_gpu, per_trial, at_once, 0.0)


def _check_one_process(config: TuneConfig, nodes: Sequence[Mapping[str, float]], gpus: float) -> None:
    if gpus < 0:
        raise InputError("must be 0 or more", where=f"--gpus_per_trial {number_text(gpus, 6)}")
    if gpus > 1:
        raise InputError(
            "one process trains on one GPU",
            where=f"--gpus_per_trial {number_text(gpus, 6)}",
            fix=f"use --workers_per_trial {math.ceil(gpus)}, or at most 1",
        )
    most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in ("GPU", "CPU")}
    if not any(_fitting(node, gpus, config.cpus_per_trial) for node in nodes):
        flag, asked, there = "cpus_per_trial", config.cpus_per_trial, f"{number_text(most['CPU'], 6)} CPUs"
        if gpus > most["GPU"]:
            flag, asked, there = "gpus_per_trial", gpus, f"{number_text(most['GPU'], 6)} GPUs"
        raise InputError(
            f"a trial asks for more than any node has, which is {there} for trials",
            where=f"--{flag} {number_text(asked, 6)}",
            fix="ask for less, or use a larger cluster",
        )


def _several_workers(config: TuneConfig, nodes: Sequence[Mapping[str, float]], gpus: float) -> Reserved:
    workers = config.workers_per_trial
    if config.share_base:
        raise InputError(
            "trials that share a base model are of one worker each",
            where=f"--share_base --workers_per_trial {workers}",
            fix="leave one of them out",
        )
    if gpus not in (0, workers):
        raise InputError(
            f"each of a trial's {workers} workers takes one GPU",
            where=f"--gpus_per_trial {number_text(gpus, 6)}",
        )
    resource, each = ("GPU", 1.0) if gpus else ("CPU", config.cpus_per_trial / workers)
    if not gpus:  # the trial's own process takes a little
        each = math.floor((config.cpus_per_trial - HEAD_CPUS) / workers * 1000) / 1000
    places = sum(math.floor(node.get(resource, 0.0) / each) for node in nodes) if each > 0 else 0
    if places < workers:
        raise InputError(
            f"a trial's workers take {number_text(each, 6)} {resource}s each, and there is room for {places}",
            where=f"--workers_per_trial {workers}",
            fix="use fewer workers, or a larger cluster",
        )
    return Reserved(gpus > 0, {"cpu": HEAD_CPUS}, places // workers, each if not gpus else 1.0)


def _fitting(node: Mapping[str, float], gpus: float, cpus: float) -> int:
    """Trials that fit a node at a time."""
    by_cpu = math.floor(node.get("CPU", 0.0) / cpus + 1e-9)
    if gpus == 0:
        return by_cpu
    return min(by_cpu, _per_gpu(gpus) * int(node.get("GPU", 0.0)))


def _per_gpu(gpus: float) -> int:
    return math.floor(1 / gpus + 1e-9)


def _hosts(nodes: Sequence[Mapping[str, float]], gpus: float, cpus: float) -> list[Host]:
    """A host for each GPU, or for each node where there are none."""
    hosts = []
    for number, node in enumerate(nodes):
        if gpus:
            hosts += [Host(number, 1, 1, _per_gpu(gpus))] * int(node.get("GPU", 0.0))
        elif seats := _fitting(node, 0, cpus):
            # One CPU is left to the trials' own processes, which do nothing but wait.
            hosts.append(Host(number, max(0, math.floor(node["CPU"]) - 1), 0, seats))
    return hosts
