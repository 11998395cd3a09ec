"""Trials an hour of a search: a process for each trial against trials that share one base model, and their memory.

    python benchmarks/tune.py --device cpu
    python benchmarks/tune.py --device cuda --released --trials 16 --at_once 8 --json tune.json

Every trial trains all of its steps (no scheduler), so that both ways do the same work, and both find the same losses.
`--released` takes a transformer of the released size with random weights; the memory is the most that nvidia-smi shows,
or on a CPU the most that the processes of the search hold together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import ray
import soundfile
import torch
from safetensors.torch import save_file

from acestep_ray.cache.precompute import precompute
from acestep_ray.config import PrecomputeConfig, TuneConfig
from acestep_ray.models.checkpoint import TRANSFORMER, CheckpointDir
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.models.transformer_config import TransformerConfig
from acestep_ray.tiny_checkpoint import TRANSFORMER_CONFIG, write_tiny_checkpoint
from acestep_ray.tuning.job import tune

SAMPLED_EVERY = 0.2
SONGS = 12
WAYS = {"processes": False, "shared": True}


def write_released_size(checkpoint: Path) -> None:
    """Put a transformer of the released size in place of the tiny one; it reads the tiny encoders' features."""
    tiny = TransformerConfig.from_dict(TRANSFORMER_CONFIG)
    config = replace(
        TransformerConfig(),
        text_embedding_dim=tiny.text_embedding_dim,
        ssl_latent_dims=tiny.ssl_latent_dims,
        lyric_encoder_vocab_size=tiny.lyric_encoder_vocab_size,
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in ACEStepTransformer(config).state_dict().items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU takes half a minute
    weights = {
        name: (torch.randn(shape, device=device) / max(1, shape[1:].numel()) ** 0.5).to(torch.bfloat16).cpu()
        for name, shape in shapes.items()
    }
    if device == "cuda":
        torch.cuda.empty_cache()  # the trials' memory is what counts
    folder = checkpoint / TRANSFORMER
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(config)), encoding="utf-8")
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")


def write_cache(folder: Path, checkpoint: Path, seconds: float, device: str) -> None:
    """Precompute `SONGS` songs of noise into `folder / "cache"`."""
    (folder / "songs").mkdir()
    for number in range(SONGS):
        wave = 0.1 * np.random.default_rng(number).standard_normal(int(48_000 * seconds))
        soundfile.write(folder / "songs" / f"song{number:02d}.wav", wave, 48_000)
        (folder / "songs" / f"song{number:02d}_prompt.txt").write_text("noise, slow", encoding="utf-8")
    precompute(
        PrecomputeConfig(
            dataset_path=str(folder / "songs"),
            checkpoint_dir=str(checkpoint),
            output_dir=str(folder / "cache"),
            device=device,
        )
    )


def gpu_memory() -> float:
    """GB that the first GPU holds."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return float(subprocess.check_output(command, text=True)) * 2**20 / 1e9


def process_memory() -> float:
    """GB that Ray's workers on this machine hold together, what they share counted once."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("ray::"):
                total += process.memory_full_info().uss
    return total / 1e9


@contextlib.contextmanager
def most(measure: Callable[[], float]) -> Iterator[list[float]]:
    """The largest value so far, as the only item of a list."""
    found, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLED_EVERY):
            found[0] = max(found[0], measure())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def search(
    way: str, arguments: argparse.Namespace, folder: Path
) -> tuple[dict[str, float | str], dict[str, float]]:
    """One way's row of the table, and the validation loss of each trial."""
    on_gpu = arguments.device == "cuda"
    config = TuneConfig(
        dataset_path=str(folder / "cache"),
        checkpoint_dir=str(folder / "checkpoint"),
        exp_name=way,
        exp_dir=str(folder),
        logger_dir=str(folder / "logs"),
        tracking_uri="none",
        device=arguments.device,
        precision=arguments.precision,
        max_steps=arguments.steps,
        val_songs=2,
        val_check_interval=arguments.steps // 2,
        num_workers=1,
        trials=arguments.trials,
        scheduler="none",
        share_base=WAYS[way],
        allow_changes=True,
        search_rank="log2int(4, 32)",
        gpus_per_trial=1 / arguments.at_once if on_gpu else None,
        cpus_per_trial=1.0 if on_gpu else os.cpu_count() / arguments.at_once,
    )
    started = time.perf_counter()
    with most(gpu_memory if on_gpu else process_memory) as memory:
        summary = tune(config)
    seconds = time.perf_counter() - started
    row = {
        "way": way,
        "trials": len(summary.trials),
        "failed": sum(row["state"] == "failed" for row in summary.trials),
        "seconds": round(seconds, 1),
        "trials_an_hour": round(3600 * len(summary.trials) / seconds, 1),
        "memory_gb": round(memory[0], 2),
    }
    return row, {row["trial"]: row["validation"] for row in summary.trials}


def largest_difference(losses: dict[str, dict[str, float]]) -> float | None:
    """How far a trial's losses in the two ways are apart, as a share; None where only one way ran."""
    shared = losses.get("shared", {})
    pairs = [(loss, shared.get(trial)) for trial, loss in losses.get("processes", {}).items()]
    return max((abs(a / b - 1) for a, b in pairs if a is not None and b is not None), default=None)


def main() -> None:
    """Measure both ways and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path, help="file to write the figures to, anew after each way")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--at_once", type=int, default=2, help="trials at a time")
    parser.add_argument("--steps", type=int, default=24, help="steps of a trial")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the songs")
    parser.add_argument("--precision", default="bf16-true", help="of the trials")
    parser.add_argument("--released", action="store_true", help="a transformer of the released size")
    parser.add_argument(
        "--folder", type=Path, help="where checkpoint and cache are kept, and taken from if there"
    )
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="tune-"))
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        write_tiny_checkpoint(checkpoint)
    if not (folder / "cache").exists():
        write_cache(folder, checkpoint, arguments.seconds, arguments.device)
    if arguments.released:
        write_released_size(checkpoint)
    CheckpointDir.open(checkpoint).fingerprint(
        "transformer"
    )  # the first search would read the weights for it
    rows, losses = [], {}
    for way in arguments.ways:
        row, losses[way] = search(way, arguments, folder)
        rows.append(row)
        report = {
            "chip": torch.cuda.get_device_name()
            if arguments.device == "cuda"
            else platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "ray": ray.__version__,
            "at_once": arguments.at_once,
            "steps": arguments.steps,
            "song_seconds": arguments.seconds,
            "largest_difference": largest_difference(losses),
            "rows": rows,
            "losses": losses,
        }
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(str(value).rjust(len(name)) for name, value in row.items()))
    print(f"largest relative difference of a trial's loss: {report['largest_difference']}")
    ray.shutdown()
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
