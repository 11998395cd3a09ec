"""Time of one LoRA training step of the 3.5B configuration from cached features, random weights.

    python benchmarks/train_step.py --device cuda --json step.json
    python benchmarks/train_step.py --device cpu --tiny

A step is forward, backward, clipping and AdamW over one batch, SSL losses on, 64 prompt and 512 lyric tokens. The
reference is the original trainer's step for one song on one H100 80 GB, which runs the frozen models each time too.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch

from acestep_ray.diffusion.objective import SSLTarget, TrainingBatch, flow_matching_losses
from acestep_ray.models.codec import SAMPLE_RATE, latent_frames
from acestep_ray.models.lyric_encoder import LyricEncoderConfig
from acestep_ray.models.transformer import ACEStepTransformer, TransformerConfig
from acestep_ray.training.lora import DEFAULT_LORA, add_lora
from acestep_ray.training.optim import build_optimizer, clip_gradients, set_learning_rate

PROMPT_TOKENS, LYRIC_TOKENS = 64, 512
SSL_FRAMES_PER_SECOND = {"mert": 75, "m-hubert": 50}
# Seconds of song → milliseconds of the original's step, with activation checkpointing.
ORIGINAL_MS = {30: 680, 120: 717, 240: 844}
TINY = TransformerConfig(
    num_layers=4,
    inner_dim=64,
    num_attention_heads=2,
    attention_head_dim=32,
    ssl_encoder_depths=(1, 1),
    lyric_hidden_size=32,
    lyric_encoder=LyricEncoderConfig(attention_heads=2, linear_units=64, num_blocks=2),
)


def random_batch(config: TransformerConfig, songs: int, seconds: int, device: torch.device) -> TrainingBatch:
    """Songs of one length with features of the sizes that real ones have."""
    frames = latent_frames(seconds * SAMPLE_RATE)
    latents = torch.randn(songs, 8, 16, frames)
    ssl = {}
    for name, width in zip(config.ssl_names, config.ssl_latent_dims, strict=True):
        length = SSL_FRAMES_PER_SECOND[name] * seconds
        features = torch.randint(-127, 128, (songs, length, width), dtype=torch.int8)
        ssl[name] = SSLTarget(features, torch.full((songs,), length))
    batch = TrainingBatch(
        latents=latents,
        noise=torch.randn_like(latents),
        sigmas=torch.rand(songs),
        frame_mask=torch.ones(songs, frames, dtype=torch.bool),
        text=torch.randn(songs, PROMPT_TOKENS, config.text_embedding_dim),
        text_mask=torch.ones(songs, PROMPT_TOKENS, dtype=torch.bool),
        speaker=torch.zeros(songs, config.speaker_embedding_dim),
        lyric_ids=torch.randint(1, config.lyric_encoder_vocab_size, (songs, LYRIC_TOKENS)),
        lyric_mask=torch.ones(songs, LYRIC_TOKENS, dtype=torch.bool),
        dropout_seeds=torch.arange(songs),
        ssl=ssl,
    )
    return batch.to(device)


def measure(model: ACEStepTransformer, songs: int, seconds: int, steps: int, device: torch.device) -> dict:
    """Median milliseconds of a step, and the most memory that it took."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(trained, weight_decay=0.01)
    set_learning_rate(optimizer, 1e-4)
    batch = random_batch(model.config, songs, seconds, device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps + 3):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = flow_matching_losses(model, batch).total(1.0).mean()
        loss.backward()
        clip_gradients(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1000)
    milliseconds = sorted(times[3:])[steps // 2]
    return {
        "songs": songs,
        "seconds": seconds,
        "checkpointing": model.activation_checkpointing,
        "step_ms": round(milliseconds, 1),
        "times_realtime": round(songs * seconds * 1000 / milliseconds),
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if on_gpu else None,
        "loss_is_finite": bool(torch.isfinite(loss)),
        "times_original": round(ORIGINAL_MS[seconds] * songs / milliseconds, 2)
        if seconds in ORIGINAL_MS
        else None,
    }


def main() -> None:
    """Measure every case and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each case")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    torch.manual_seed(0)
    with device:
        model = ACEStepTransformer(replace(TINY) if arguments.tiny else TransformerConfig())
        add_lora(model, DEFAULT_LORA)
    cases = [(1, 3)] if arguments.tiny else [(1, 30), (1, 120), (1, 240), (4, 240)]
    rows = []
    for checkpointing in (True, False):
        model.activation_checkpointing = checkpointing
        for songs, seconds in cases:
            try:
                rows.append(measure(model, songs, seconds, arguments.steps, device))
            except torch.OutOfMemoryError:
                rows.append(
                    {
                        "songs": songs,
                        "seconds": seconds,
                        "checkpointing": checkpointing,
                        "step_ms": "no memory",
                    }
                )
            if device.type == "cuda":
                torch.cuda.empty_cache()
    chip = (
        torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    )
    report = {"chip": chip, "torch": torch.__version__, "rows": rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{chip}, torch {torch.__version__}")
    columns = [
        "songs",
        "seconds",
        "checkpointing",
        "step_ms",
        "times_realtime",
        "memory_gb",
        "times_original",
    ]
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(f"{row.get(column, '')}".rjust(len(column)) for column in columns))


if __name__ == "__main__":
    main()
