"""Precompute and training's reading at sizes that no machine here has: up to a million made songs and 64 logical nodes.

    python benchmarks/scale.py
    python benchmarks/scale.py --sections precompute --songs 1000,4000 --nodes 0 --speedup 20
    python benchmarks/scale.py --sections precompute --songs 300 --nodes 8,16 --rate 4
    python benchmarks/scale.py --sections inputs,sampler --songs 1000,10000,100000,1000000 --json scale.json

`precompute` runs the real graph; its decoders and encoders sleep for the times that were measured (RESULTS.md), divided
by `--speedup`. A node is a Ray node of its own with CPUs and a GPU that are only numbers, and one process decodes for
the nine cores that a GPU asks for; 0 nodes are one node in all. `of_sleeping` is the share of the time that encoders
sleep. It is true where `--speedup` is below 0.3: Ray Data looks every 0.1 s for what has ended, which the one decoder
waits for after every task, as nine would in turn. Above it, only CPU time counts. `inputs` opens tables and folders,
and runs precompute over what a killed run has left of so many songs, and over the cache that comes of it: everything
but the graph. `sampler` and `loader` are what a worker of training does before and between its steps. Every case has a
process of its own, whose memory is told as its largest resident size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

SECTIONS = ("precompute", "inputs", "sampler", "loader")
# Of a 240 s song (RESULTS.md): of one core, of which a GPU asks for nine, and of an H100.
DECODE_SECONDS, ENCODE_SECONDS = 0.7 / 9, 0.088
# An encoder, what decodes for nine, some planning and storing, and a CPU to spare: where a part of one is left on a
# node, Ray Data counts it as nothing, and with two a decoder finds no place.
CPUS_OF_NODE = 3
# Processes that a node keeps while they have nothing to do. Ray ends those beyond its CPUs after a second, and starting
# them again takes seconds of a core; a GPU's share of a real host has ten CPUs or more.
WORKERS_OF_NODE = 10
# Several agents of Ray start with each node, and a node gives up where they take long.
_CORES_PER_START = 4
WORKERS = 64
MEGABYTE = 1e6


def resident_mb() -> float:
    """The most memory that this process has had; Linux."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / MEGABYTE


@contextmanager
def timed(figures: dict[str, Any], name: str) -> Iterator[None]:
    """Adds the seconds of the block to `figures`, under `name`."""
    started = time.perf_counter()
    yield
    figures[name] = round(figures.get(name, 0) + time.perf_counter() - started, 2)


def timed_calls(figures: dict[str, Any], owner: Any, *names: str) -> None:
    """Let functions of a module, or of a class, add their seconds to `figures`."""

    def timing(name: str) -> Callable[..., Any]:
        function = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with timed(figures, f"{name.removeprefix('_')}_s"):
                return function(*arguments, **options)

        return call

    for name in names:
        setattr(owner, name, timing(name))


def in_process(measure: Callable[..., dict], *arguments: Any) -> dict[str, Any]:
    """What `measure` returns in a process of its own, and the most memory that it had."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        figures = pool.submit(measure, *arguments).result()
        return {**figures, "rss_mb": round(pool.submit(resident_mb).result())}


# --- precompute ----------------------------------------------------------------------------------------------


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


@contextmanager
def cluster_of(nodes: int, environment: dict[str, str]) -> Iterator[None]:
    """A cluster of so many nodes on this machine, and its head, which this process is the driver of."""
    import ray
    from ray._private.node import Node
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_MODE"] = "disabled"
    head = {
        "num_cpus": 0,
        "include_dashboard": False,
        "object_store_memory": 300_000_000,
        "_system_config": {
            "num_workers_soft_limit": WORKERS_OF_NODE,
            # Those would be without the stand-ins, and take memory for nothing.
            "prestart_worker_first_driver": False,
        },
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    sockets = cluster.head_node._sockets_dir
    # Only a main thread may set signals. What ends the nodes is below.
    Node._register_shutdown_hooks = lambda node: None

    def add_node(number: int) -> None:
        cluster.add_node(
            wait=False,
            num_cpus=CPUS_OF_NODE,
            num_gpus=1,
            object_store_memory=1_000_000_000 if nodes == 1 else 150_000_000,
            # Ray would count up, which several threads cannot do at a time.
            raylet_socket_name=f"{sockets}/raylet-{number}",
            plasma_store_socket_name=f"{sockets}/store-{number}",
        )

    try:
        # A node ends with the thread that has started it.
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // _CORES_PER_START)) as pool:
            list(pool.map(add_node, range(nodes)))
            cluster.wait_for_nodes(timeout=120)
            ray.init(
                address=cluster.address,
                log_to_driver=False,
                logging_level="error",
                runtime_env={"env_vars": environment, "worker_process_setup_hook": "simulated.sleep_instead"},
            )
            yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def measure_graph(work: str, songs: int, nodes: int, speedup: float, wave_mb: float) -> dict[str, Any]:
    """One run of precompute over a table of songs, from nothing to a cache.

    Rates and CPU time are those between a fifth and nine tenths of the songs.
    """
    from simulated import Simulation, write_table

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


# --- inputs --------------------------------------------------------------------------------------------------


def measure_table(work: str, songs: int) -> dict[str, Any]:
    """Opening a table of songs."""
    from simulated import write_table

    from acestep_ray.data.songs import SongTable

    table = Path(work, f"songs-{songs}.jsonl")
    write_table(table, songs)
    figures: dict[str, Any] = {"case": "open a table", "songs": songs, "imported_mb": round(resident_mb())}
    with timed(figures, "seconds"):
        found = SongTable.open(table)
    assert len(found) == songs
    return figures


def measure_folder(work: str, songs: int) -> dict[str, Any]:
    """Opening a folder of songs, with a prompt and lyrics beside each."""
    from simulated import write_folder

    from acestep_ray.data.songs import SongTable

    folder = Path(work, f"folder-{songs}")
    write_folder(folder, songs)
    figures: dict[str, Any] = {"case": "open a folder", "songs": songs, "imported_mb": round(resident_mb())}
    with timed(figures, "seconds"):
        found = SongTable.open(folder)
    assert len(found) == songs
    shutil.rmtree(folder)
    return figures


def make_stored(work: str, songs: int, state: str) -> dict[str, Any]:
    """Make a cache, or what a run leaves that is killed before it commits; told is the time to make it."""
    import simulated

    from acestep_ray.cache.precompute import check_settings, make_recipe
    from acestep_ray.data.songs import SongTable
    from acestep_ray.models.checkpoint import CheckpointDir
    from acestep_ray.storage import Store

    config = _config_of_inputs(work, songs)
    recipe = make_recipe(config, CheckpointDir.open(config.checkpoint_dir), check_settings(config), "cpu")
    figures: dict[str, Any] = {"case": f"(made: {state})", "songs": songs}
    write = getattr(simulated, f"write_{state}")
    with timed(figures, "seconds"):
        write(Store.at(config.output_dir), SongTable.open(config.dataset_path), recipe)
    return figures


def measure_driver(work: str, songs: int, case: str) -> dict[str, Any]:
    """Precompute where every song is stored already: all that the driver does but run the graph."""
    import ray
    from simulated import SONG_BYTES, Simulation

    from acestep_ray.cache import commit, precompute

    figures: dict[str, Any] = {"case": case, "songs": songs}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": Simulation(0, 0, 0).environment()},
    )
    timed_calls(figures, precompute.SongTable, "open")
    timed_calls(
        figures, precompute, "claim_output_dir", "find_rows", "check_complete", "plan_commit", "commit"
    )
    timed_calls(figures, precompute, "_fingerprint")
    timed_calls(figures, precompute._Run, "find_unchanged")
    timed_calls(figures, commit, "_move_parts", "delete_leftovers")
    # The parts are empty.
    precompute.read_dims = lambda cache, rows: {"text_dim": 768, "ssl": {"mert": 1024, "m-hubert": 768}}
    before = resident_mb()
    with timed(figures, "seconds"):
        summary = precompute.precompute(_config_of_inputs(work, songs))
    assert (summary.unchanged, summary.num_bytes) == (songs, songs * SONG_BYTES)
    ray.shutdown()
    return {**figures, "imported_mb": round(before)}


def _config_of_inputs(work: str, songs: int) -> Any:
    from acestep_ray.config import PrecomputeConfig

    return PrecomputeConfig(
        dataset_path=str(Path(work, f"songs-{songs}.jsonl")),
        checkpoint_dir=str(Path(work, "checkpoint")),
        output_dir=str(Path(work, f"stored-{songs}")),
        device="cpu",
    )


# --- sampler and loader --------------------------------------------------------------------------------------


def measure_sampler(work: str, songs: int, batch_frames: int | None) -> dict[str, Any]:
    """What a worker of 64 does before its first step, in the first epoch and far into the run."""
    from acestep_ray.cache.index import CacheIndex
    from acestep_ray.training.holdout import hold_out, recordings_of_cache
    from acestep_ray.training.sampler import BatchPlan

    figures: dict[str, Any] = {
        "songs": songs,
        "batch_frames": batch_frames,
        "imported_mb": round(resident_mb()),
    }
    with timed(figures, "open_index_s"):
        index = CacheIndex.open(Path(work, f"stored-{songs}"))
    figures["index_mb"] = round(resident_mb()) - figures["imported_mb"]
    frames = np.random.default_rng(0).integers(32, 2584, len(index)).astype(np.int32)

    def plan() -> BatchPlan:
        return BatchPlan(frames, seed=1, micro_batches_per_step=WORKERS, batch_frames=batch_frames)

    first = plan()
    with timed(figures, "first_step_s"):
        whole = first.step(0)
    with timed(figures, "steps_of_10_epochs_s"):
        steps = plan().steps_in_epochs(10)
    resumed = plan()
    with timed(figures, "resume_in_epoch_10_s"):
        resumed.step(steps - 1)
    with timed(figures, "next_1000_steps_s"):
        for step in range(min(1000, steps)):
            first.step(step)
    figures["worker_mb"] = round(resident_mb()) - figures["imported_mb"]
    # Each worker takes its share of a step from a plan of its own.
    shares = [plan().step(0)[rank::WORKERS] for rank in (0, WORKERS - 1)]
    assert shares == [whole[:1], whole[-1:]]
    with timed(figures, "driver_hold_out_s"):
        hold_out(recordings_of_cache(index), None)
    return figures


def measure_loader(work: str, songs: int, threads: int) -> dict[str, Any]:
    """Batches that a worker reads from a cache of short songs, and the time of the first after a resume."""
    from cache import write_cache

    from acestep_ray.cache.index import CacheIndex
    from acestep_ray.training.sampler import BatchPlan
    from acestep_ray.training.streaming import CacheSource

    folder = Path(work, f"loader-{songs}")
    if not folder.exists():
        write_cache(folder, songs, 3.0)
    index = CacheIndex.open(folder)
    plan = BatchPlan(index.latent_frames, seed=1, micro_batches_per_step=WORKERS, batch_size=1)
    figures: dict[str, Any] = {"songs": songs, "threads": threads, "imported_mb": round(resident_mb())}
    steps = plan.steps_in_epochs(4)
    mine = [item for step in range(steps) for item in plan.step(step)[::WORKERS]]
    batches = CacheSource(index).read_ahead(iter(mine), lambda item, songs: songs, threads)
    with timed(figures, "first_batch_s"):
        next(batches)
    with timed(figures, "seconds"):
        count = sum(1 for _ in batches)
    figures["batches_s"] = round(count / figures["seconds"])
    return figures


def main() -> None:
    """Measure the sections that are asked for and print a table of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="no case uses a GPU")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="with commas between them")
    parser.add_argument("--songs", default="1000", help="numbers of songs, with commas between them")
    parser.add_argument(
        "--folder_songs", type=int, default=100_000, help="at most, where each is three files"
    )
    parser.add_argument(
        "--killed_songs",
        type=int,
        default=100_000,
        help="at most, of a killed run: its files take long to make",
    )
    parser.add_argument("--nodes", default="0", help="numbers of nodes of `precompute`; 0 is one in all")
    parser.add_argument(
        "--speedup", type=float, default=20, help="how much faster than real workers these are"
    )
    parser.add_argument(
        "--rate", type=float, help="songs a second that all encoders together have time for; for `--speedup`"
    )
    parser.add_argument("--wave_mb", type=float, default=0.01, help="of a decoded song; a real one has 92")
    arguments = parser.parse_args()
    sections = arguments.sections.split(",")
    sizes = [int(size) for size in arguments.songs.split(",")]
    work = tempfile.mkdtemp(prefix="scale-benchmark-")
    import pyarrow
    import ray

    from acestep_ray.tiny_checkpoint import write_tiny_checkpoint

    write_tiny_checkpoint(Path(work, "checkpoint"))
    results: dict[str, Any] = {
        "host": f"{os.cpu_count()} cores, python {platform.python_version()}, ray {ray.__version__}, "
        f"pyarrow {pyarrow.__version__}"
    }

    def note(section: str, measure: Callable[..., dict], *options: Any) -> None:
        row = in_process(measure, work, *options)
        results.setdefault(section, []).append(row)
        print(f"{section}: {json.dumps(row)}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")

    try:
        for songs in sizes:
            if "precompute" in sections:
                for nodes in map(int, arguments.nodes.split(",")):
                    speedup = arguments.speedup
                    if arguments.rate is not None:
                        speedup = arguments.rate * ENCODE_SECONDS / max(nodes, 1)
                    note("precompute", measure_graph, songs, nodes, speedup, arguments.wave_mb)
            if {"inputs", "sampler"} & set(sections):
                note("inputs", measure_table, songs)
                was_killed = songs <= arguments.killed_songs
                note("inputs", make_stored, songs, "incoming" if was_killed else "committed")
                if "inputs" in sections and songs <= arguments.folder_songs:
                    note("inputs", measure_folder, songs)
                if was_killed:
                    note("inputs", measure_driver, songs, "finish a killed run")
                note("inputs", measure_driver, songs, "nothing to do")
            if "sampler" in sections:
                note("sampler", measure_sampler, songs, None)
                note("sampler", measure_sampler, songs, 8 * 2584)
            if "loader" in sections:
                for threads in (0, 2):
                    note("loader", measure_loader, songs, threads)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
