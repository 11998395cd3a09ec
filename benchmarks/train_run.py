"""Training runs of the 3.5B configuration from a feature cache, random weights and features: rate, and wait for data.

    python benchmarks/train_run.py --device cuda --json run.json
    python benchmarks/train_run.py --device cpu --tiny

The loop is the one that every worker of a run goes through, with its reading ahead, its draws, its optimizer and its
logging; what it logs is what is shown, as means over the steps after the first twenty. Songs have features of the sizes
that real ones have and lie in a cache on the local disk. A case is SONGSxSECONDS, songs being those of a step; `mixed`
is songs of 3 to 240 s in batches under a budget of frames.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache import write_cache
from train_step import MIXED, MIXED_FRAMES, TINY

from acestep_ray.config import TrainConfig
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.models.transformer_config import TransformerConfig
from acestep_ray.storage import Store
from acestep_ray.training import worker
from acestep_ray.training.frozen import store_frozen
from acestep_ray.training.lora import add_lora
from acestep_ray.training.lora_config import DEFAULT_LORA
from acestep_ray.training.model import fuse_passes
from acestep_ray.training.settings import WorkerPlace, WorkerSettings

LEFT_OUT = 20
COLUMNS = ("case", "step_ms", "times_realtime", "data_wait_percent", "mfu", "memory_gb", "last_loss")
LOGGED = {
    "throughput/audio_seconds_per_second": "times_realtime",
    "throughput/steps_per_second": "steps_per_second",
    "throughput/data_wait": "data_wait",
    "throughput/mfu": "mfu",
    "memory/allocated_gb": "memory_gb",
}


class Notes:
    """Takes what a run logs, in the place of its trackers."""

    def __init__(self, *_: object, **__: object):
        self.by_step: dict[int, dict[str, float]] = {}
        notes.append(self)

    def log(self, metrics: Mapping[int, Mapping[str, float]]) -> None:
        """By step."""
        for step, values in metrics.items():
            self.by_step.setdefault(step, {}).update(values)

    def close(self) -> None:
        """Nothing is on its way."""


notes: list[Notes] = []


def measure(case: str, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The means of what a run logs."""
    device = torch.device(arguments.device)
    longest = 3.0 if arguments.tiny else 240.0
    if case == MIXED:
        seconds = np.random.default_rng(0).uniform(3.0, longest, arguments.songs).tolist()
        batches: dict[str, int] = {"batch_frames": MIXED_FRAMES}
    else:
        songs, length = (int(part) for part in case.split("x"))
        seconds = [float(length)] * max(arguments.songs, 2 * songs)
        batches = {"batch_size": songs}
    cache = work / case
    write_cache(cache, len(seconds), seconds)
    config = TrainConfig(
        dataset_path=str(cache),
        checkpoint_dir="",
        device=device.type,
        precision="bf16-mixed" if device.type == "cuda" else "32",
        max_steps=arguments.steps,
        every_n_train_steps=arguments.steps,
        every_plot_step=arguments.steps,
        num_workers=arguments.threads,
        float8=arguments.float8,
        **batches,
    )
    settings = WorkerSettings(
        config=config,
        lora=DEFAULT_LORA,
        checkpoints=Store.at(work / f"checkpoints-{case}"),
        samples=None,
        log_dir=Store.at(work / "logs"),
        mlflow_run=None,
        total_steps=arguments.steps,
    )
    place = WorkerPlace(rank=0, workers=1, device=device, build=build_tiny if arguments.tiny else build)
    notes.clear()
    started = time.perf_counter()
    outcome = worker.train_worker(settings, place, lambda metrics, checkpoint: None)
    took = time.perf_counter() - started
    logged = [values for step, values in sorted(notes[0].by_step.items()) if step >= LEFT_OUT]
    means = {
        name: float(np.mean([values[key] for values in logged if key in values]))
        for key, name in LOGGED.items()
        if any(key in values for values in logged)
    }
    shutil.rmtree(cache)
    return {
        "case": case,
        "step_ms": round(1000 / means["steps_per_second"], 1),
        "times_realtime": round(means["times_realtime"]),
        "data_wait_percent": round(100 * means["data_wait"], 2),
        "mfu": round(means["mfu"], 3) if "mfu" in means else None,
        "memory_gb": round(means["memory_gb"], 1),
        "last_loss": round(outcome["last"], 4),
        "skipped": outcome.get("skipped", 0),
        "run_s": round(took, 1),
    }


def build(config: TrainConfig, lora: Mapping[str, Any] | None, device: torch.device) -> ACEStepTransformer:
    """A model of the released size as a run builds it from a checkpoint."""
    return _build(TransformerConfig(), config, lora, device)


def build_tiny(
    config: TrainConfig, lora: Mapping[str, Any] | None, device: torch.device
) -> ACEStepTransformer:
    """A tiny one that reads features of the released sizes."""
    return _build(TINY, config, lora, device)


def _build(
    sizes: TransformerConfig, config: TrainConfig, lora: Mapping[str, Any] | None, device: torch.device
) -> ACEStepTransformer:
    assert lora is not None
    torch.manual_seed(0)
    with device:
        transformer = ACEStepTransformer(sizes)
        add_lora(transformer, lora)
    store_frozen(transformer, config, device)
    fuse_passes(transformer, config, device, is_lora=True)
    return transformer


def main() -> None:
    """Measure every case and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--cases", help="with commas between them; default 1x240,8x240,32x30,mixed")
    parser.add_argument("--songs", type=int, default=48, help="songs of a cache, at least")
    parser.add_argument("--steps", type=int, default=60, help="steps of a run; the first twenty do not count")
    parser.add_argument("--threads", type=int, default=8, help="threads that read ahead")
    parser.add_argument("--float8", action="store_true", help="products with frozen weights in float8")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short songs, for a CPU")
    arguments = parser.parse_args()
    cases = arguments.cases or ("1x3,2x3,mixed" if arguments.tiny else "1x240,8x240,32x30,mixed")
    worker.Tracker = Notes
    on_gpu = arguments.device == "cuda"
    chip = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    print(f"{chip}, torch {torch.__version__}")
    print(" | ".join(COLUMNS))
    rows = []
    with tempfile.TemporaryDirectory(prefix="train-run-") as work:
        for case in cases.split(","):
            rows.append(measure(case, arguments, Path(work)))
            print(" | ".join(str(rows[-1][name]).rjust(len(name)) for name in COLUMNS), flush=True)
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
    report = {"chip": chip, "torch": torch.__version__, "float8": arguments.float8, "rows": rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
