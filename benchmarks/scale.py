"""Precompute and training's reading at sizes that no machine here has: up to a million made songs and 64 logical nodes.

    python benchmarks/scale.py
    python benchmarks/scale.py --sections precompute --songs 1000,4000 --nodes 0 --speedup 20
    python benchmarks/scale.py --sections precompute --songs 400 --nodes 64 --rate 2
    python benchmarks/scale.py --sections inputs,sampler --songs 1000,10000,100000,1000000 --json scale.json

`precompute` runs the real graph; its decoders and encoders sleep for the times that were measured (RESULTS.md), divided
by `--speedup`. A node is a Ray node of its own with CPUs and a GPU that are only numbers (`simulated_nodes.py`), and
one process decodes for the nine cores that a GPU asks for; 0 nodes are one node in all. `of_sleeping` is the share of
the time that encoders sleep. It is true where `--speedup` is below 0.3: Ray Data looks every 0.1 s for what has ended,
which the one decoder waits for after every task, as nine would in turn. Above it, only CPU time counts. `inputs` opens
tables and folders, and runs precompute over what a killed run has left of so many songs, and over the cache that comes
of it: everything but the graph. `sampler` and `loader` are what a worker of training does before and between its steps.
Every case has a process of its own, whose memory is told as its largest resident size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measured import in_process, resident_mb, timed, timed_calls
from simulated_graph import ENCODE_SECONDS, measure_graph

SECTIONS = ("precompute", "inputs", "sampler", "loader")
WORKERS = 64


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
    started = time.perf_counter()
    count = sum(1 for _ in batches)
    seconds = time.perf_counter() - started
    figures |= {"seconds": round(seconds, 2), "batches_s": round(count / seconds)}
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
