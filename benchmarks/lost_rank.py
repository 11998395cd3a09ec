"""A worker of a run is killed: how long until training goes on, and whether the losses are those of a run in peace.

    python benchmarks/lost_rank.py --device cpu --workers 8
    python benchmarks/lost_rank.py --device cuda --released --workers 8 --json lost_rank.json

Both runs train the same LoRA from the same seed through Ray Train, one worker a GPU or a core. The process of the last
rank is killed as soon as the second checkpoint is there. The time is from the kill to the first step that had not been
logged before it; it includes what Ray Train takes to notice, to start all workers again, and the steps since the last
checkpoint, which are done again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import ray
import torch
from tune import write_cache, write_released_size

from acestep_ray.config import TrainConfig
from acestep_ray.reporting.curves import read_events
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
from acestep_ray.training.job import train

LOGGED_EVERY = 0.05


def rank_processes() -> list[int]:
    """Process ids of Ray Train's workers below this process, in the order in which they were started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append((process.create_time(), process.pid))
        except psutil.Error:
            continue
    return [pid for _, pid in sorted(found)]


def kill_one(checkpoints: Path, saved_every: int, killed: list[float]) -> None:
    """Kill the last rank once the second checkpoint is there; notes when."""
    while not (checkpoints / f"step={2 * saved_every}" / "state.json").exists():
        time.sleep(LOGGED_EVERY)
    os.kill(rank_processes()[-1], signal.SIGKILL)
    killed.append(time.time())


def step_times(logs: Path) -> list[tuple[float, int]]:
    """When each step was logged, steps that were done twice twice."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(logs), size_guidance={SCALARS: 0}).Reload()
    return sorted((event.wall_time, event.step) for event in events.Scalars("loss"))


def main() -> None:
    """Run in peace, run with a kill, compare, print one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--saved_every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the songs")
    parser.add_argument("--released", action="store_true", help="a transformer of the released size")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    # Whatever the machine has: eight workers on two cores are slow, and lose nothing but time.
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, 2 * arguments.workers),
        include_dashboard=False,
        logging_level="error",
        log_to_driver=False,
    )
    folder = Path(tempfile.mkdtemp(prefix="lost-rank-"))
    checkpoint = write_tiny_checkpoint(folder / "checkpoint").path
    cache = write_cache(folder, checkpoint, arguments.seconds, arguments.device)
    if arguments.released:
        write_released_size(checkpoint)
    config = TrainConfig(
        dataset_path=str(cache),
        checkpoint_dir=str(checkpoint),
        lora_config_path=str(Path(__file__).parents[1] / "lora_config.json"),
        exp_name="peace",
        exp_dir=str(folder),
        logger_dir=str(folder / "logs"),
        tracking_uri="none",
        device=arguments.device,
        devices=arguments.workers,
        precision="bf16-mixed" if on_gpu else "32",
        num_workers=1,
        max_steps=arguments.steps,
        every_n_train_steps=arguments.saved_every,
        every_plot_step=10 * arguments.steps,
        plot_seconds=0.5,
        val_songs=0,
        allow_changes=True,
    )
    train(config)
    killed: list[float] = []
    watcher = threading.Thread(
        target=kill_one, args=(folder / "killed" / "checkpoints", arguments.saved_every, killed), daemon=True
    )
    watcher.start()
    train(replace(config, exp_name="killed"))
    times = step_times(folder / "logs" / "killed")
    reached = max(step for at, step in times if at < killed[0])
    losses = {name: read_events(folder / "logs" / name)["loss"] for name in ("peace", "killed")}
    after = [step for step in losses["peace"] if step > reached]
    before = [at for at, _ in times if at < killed[0]]
    report = {
        "chip": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "workers": arguments.workers,
        "step_seconds": round((before[-1] - before[0]) / max(1, len(before) - 1), 3),
        "last_step_before": reached,
        "seconds_to_go_on": round(min(at for at, step in times if step > reached) - killed[0], 1),
        "steps_compared": len(after),
        "largest_difference_after": max(
            abs(losses["killed"][step] / losses["peace"][step] - 1) for step in after
        ),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    ray.shutdown()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
