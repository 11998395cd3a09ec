"""Training on 1, 2, 4, 8 GPUs of one host through Ray Train: LoRA (DDP) and all weights (FSDP2), random weights.

    python benchmarks/scaling.py --workers 1,2 --json scaling.json
    python benchmarks/scaling.py --device cpu --workers 1,2 --tiny

Every worker has a batch of the same size, so that efficiency is songs a second over those of as many single workers.
A step is forward, backward, the exchange of gradients, clipping and AdamW.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed
from train_step import TINY, build_model, random_batch, step_flops

from acestep_ray.config import TrainConfig
from acestep_ray.diffusion.objective import flow_matching_losses
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.models.transformer_config import TransformerConfig
from acestep_ray.training.model import choose_trained, fuse_passes, share_among_workers
from acestep_ray.training.optim import build_optimizer, clip_gradients, set_learning_rate
from acestep_ray.training.throughput import peak_flops

MODES = {"lora": "LoRA, DDP", "full": "all weights, FSDP2"}
WARM_UP_STEPS = 3


def measure(options: dict) -> dict:
    """What one worker measures; the same on all of them."""
    import ray.train
    import ray.train.torch

    device = ray.train.torch.get_device()
    rank, workers = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    on_gpu = device.type == "cuda"
    config = TINY if options["tiny"] else TransformerConfig()
    rows = {}
    for mode in options["modes"]:
        settings = TrainConfig(
            dataset_path="", checkpoint_dir="", precision="bf16-mixed" if on_gpu else "32", devices=workers
        )
        if mode == "lora":
            model = build_model(config, "fused", device)
        else:
            torch.manual_seed(0)
            with device:
                model = ACEStepTransformer(config)
            choose_trained(model, None, with_ssl=True)
            fuse_passes(model, settings, device, is_lora=False)
            model.activation_checkpointing = options["checkpointing"]
        shared = share_among_workers(model, settings, is_lora=mode == "lora", workers=workers, device=device)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = build_optimizer(trained, 0.01)
        set_learning_rate(optimizer, 1e-5)
        torch.manual_seed(rank)
        batch = random_batch(config, options[mode], options["seconds"], device)

        def step(shared=shared, batch=batch, trained=trained, optimizer=optimizer):
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                loss = flow_matching_losses(shared, batch).total(1.0).mean()
            loss.backward()
            clip_gradients(trained, 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for _ in range(WARM_UP_STEPS):
            step()
        took = timed(step, options["steps"], workers, device)
        flops = step_flops(model, batch) if workers == 1 else None
        rows[mode] = {
            "step_ms": round(1000 * took, 1),
            "songs_per_second": round(workers * options[mode] / took, 2),
            "times_realtime": round(workers * options[mode] * options["seconds"] / took),
            "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if on_gpu else None,
            "flops": flops,
            "peak": peak_flops(device),
        }
        del model, shared, optimizer, trained, batch, step
        if on_gpu:
            import gc

            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return rows


def timed(step, steps: int, workers: int, device: torch.device) -> float:
    """Seconds of a step, of the slowest worker."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if workers > 1:
        torch.distributed.barrier()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = torch.tensor((time.perf_counter() - started) / steps, device=device)
    if workers > 1:
        torch.distributed.all_reduce(took, torch.distributed.ReduceOp.MAX)
    return took.item()


def run(workers: int, options: dict, use_gpu: bool) -> dict:
    """Measure with that many of Ray Train's workers."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        measure,
        train_loop_config=options,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=RunConfig(storage_path=tempfile.mkdtemp()),
    )
    return trainer.fit().return_value


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--workers", default="1,2", help="numbers of workers, with commas")
    parser.add_argument("--modes", default=",".join(MODES), help=", ".join(MODES))
    parser.add_argument("--lora_songs", type=int, default=8, help="songs in a worker's batch")
    parser.add_argument("--full_songs", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=240, help="length of a song")
    parser.add_argument("--checkpointing", type=float, default=0.0, help="share of blocks, for all weights")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    options = {
        "modes": arguments.modes.split(","),
        "lora": arguments.lora_songs,
        "full": arguments.full_songs,
        "seconds": 3 if arguments.tiny else arguments.seconds,
        "checkpointing": arguments.checkpointing,
        "steps": arguments.steps,
        "tiny": arguments.tiny,
    }
    # What the workers import lies beside this script.
    import os

    import ray

    here = str(Path(__file__).parent)
    paths = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": paths}}, log_to_driver=False)
    report: dict = {"torch": torch.__version__, "options": options, "rows": []}
    for workers in map(int, arguments.workers.split(",")):
        for mode, row in run(workers, options, arguments.device == "cuda").items():
            report["rows"].append({"mode": mode, "workers": workers, **row})
            add_ratios(report["rows"])
            print(json.dumps(report["rows"][-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def add_ratios(rows: list[dict]) -> None:
    """Efficiency and MFU of the last row, from the row of one worker."""
    row = rows[-1]
    one = next((r for r in rows if r["mode"] == row["mode"] and r["workers"] == 1), None)
    if one is None:
        return
    row["efficiency"] = round(one["step_ms"] / row["step_ms"], 3)
    if one["peak"]:
        row["mfu"] = round(one["flops"] / (row["step_ms"] / 1000) / one["peak"], 3)


if __name__ == "__main__":
    main()
