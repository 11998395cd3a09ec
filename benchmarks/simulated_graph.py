"""The graph of precompute with workers that sleep, on many nodes, for `scale.py`: what time and memory it takes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from measured import MEGABYTE, timed_calls

# Of a 240 s song (RESULTS.md): of one core, of which a GPU asks for nine, and of an H100.
DECODE_SECONDS, ENCODE_SECONDS = 0.7 / 9, 0.088


class Watch:
    """What processes of this machine's Ray take, and its object store, while the block runs."""

    def __init__(self) -> None:
        self.store_bytes = 0.0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _sample(self) -> None:
        import ray

        while not self.ended.wait(0.5):
            total = ray.cluster_resources().get("object_store_memory", 0)
            held = total - ray.available_resources().get("object_store_memory", 0)
            self.store_bytes = max(self.store_bytes, held)


@dataclass(frozen=True)
class Receipt:
    """When so many songs are stored, and maybe the CPU time that each process has taken until then."""

    time: float
    songs: int
    taken: dict[psutil.Process, float] | None


def processes_of_ray() -> dict[psutil.Process, str]:
    """This process, and those of Ray, which it has started, each with its kind."""
    kinds = {psutil.Process(): "driver"}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title, name = " ".join(process.cmdline()), process.name()
            if name in ("raylet", "gcs_server"):
                kinds[process] = {"raylet": "raylets", "gcs_server": "gcs"}[name]
            elif title.startswith("ray::"):
                known = (kind for kind in ("Attempts", "Agent") if kind in title)
                kinds[process] = {"Attempts": "attempts", "Agent": "agents"}.get(next(known, ""), "workers")
            else:
                kinds[process] = "other"
    return kinds


def cpu_seconds() -> dict[psutil.Process, float]:
    """CPU time that each of these processes has taken."""
    seconds = {}
    for process in processes_of_ray():
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            seconds[process] = times.user + times.system
    return seconds


def memory_mb() -> dict[str, float]:
    """Memory of each kind of process that it shares with no other, and how many workers there are."""
    memory: dict[str, float] = defaultdict(float)
    for process, kind in processes_of_ray().items():
        with contextlib.suppress(psutil.Error):
            memory[f"{kind}_mb"] += process.memory_full_info().uss / MEGABYTE
            memory["workers"] += kind == "workers"
    return memory


def measure_graph(work: str, songs: int, nodes: int, speedup: float, wave_mb: float) -> dict[str, Any]:
    """One run of precompute over a table of songs, from nothing to a cache.

    Rates and CPU time are those between a fifth and nine tenths of the songs.
    """
    from simulated import Simulation, write_table
    from simulated_nodes import cluster_of

    from acestep_ray.cache import commit, graph, precompute
    from acestep_ray.config import PrecomputeConfig

    simulation = Simulation(DECODE_SECONDS / speedup, ENCODE_SECONDS / speedup, int(wave_mb * MEGABYTE))
    table = Path(work, f"songs-{songs}.jsonl")
    write_table(table, songs)
    # The files of songs of 8 MB are not joined; these few bytes would be.
    commit.PART_BYTES = 1
    # The object store of a node is as much smaller than a real one as the songs are.
    graph._BYTES_PER_SECOND = simulation.wave_bytes / 240
    figures: dict[str, Any] = {"songs": songs, "nodes": nodes, "speedup": round(speedup, 4)}
    count = max(nodes, 1)
    timed_calls(figures, precompute, "check_complete", "plan_commit", "commit")
    timed_calls(figures, graph.Graph, "_write_lists")
    receipts: list[Receipt] = []
    run = graph.Graph.run

    def noted(*arguments):
        stored = 0
        for ledger, rejects in run(*arguments):
            is_first = stored < songs / 5 <= stored + len(ledger)
            is_last = stored < songs * 0.9 <= stored + len(ledger)
            stored += len(ledger)
            taken = cpu_seconds() if is_first or is_last else None
            receipts.append(Receipt(time.perf_counter(), stored, taken))
            yield ledger, rejects

    graph.Graph.run = noted
    config = PrecomputeConfig(
        dataset_path=str(table),
        checkpoint_dir=str(Path(work, "checkpoint")),
        output_dir=str(Path(work, f"cache-{songs}-{nodes}")),
        device="cuda",
        encoder_workers=count,
        decode_workers=count,
    )
    began = time.perf_counter()
    with cluster_of(count, simulation.environment()):
        started = time.perf_counter()
        with Watch() as watch:
            summary = precompute.precompute(config)
            ended = time.perf_counter()
        kinds, memory = processes_of_ray(), memory_mb()
    assert summary.samples == songs
    first, last = (receipt for receipt in receipts if receipt.taken is not None)
    steady, counted = last.time - first.time, last.songs - first.songs
    seconds: dict[str, float] = defaultdict(float)
    for process in last.taken.keys() & kinds.keys():
        seconds[kinds[process]] += last.taken[process] - first.taken.get(process, 0)
    names = ("driver", "gcs", "attempts", "raylets", "agents", "workers")
    return figures | {
        "start_nodes_s": round(started - began, 1),
        "first_receipt_s": round(receipts[0].time - started, 1),
        "steady_s": round(steady, 1),
        "wall_s": round(ended - started, 1),
        "songs_s": round(counted / steady, 1),
        "of_sleeping": round(counted / steady * simulation.encode_seconds / count, 2),
        **{f"{name}_ms_a_song": round(1000 * seconds[name] / counted, 2) for name in names},
        "cores_busy": round(sum(seconds.values()) / steady, 1),
        "gcs_mb": round(memory["gcs_mb"]),
        "ray_mb": round(sum(memory[name] for name in memory if name.endswith("_mb"))),
        "object_store_mb": round(watch.store_bytes / MEGABYTE, 1),
        "workers": round(memory["workers"]),
    }
