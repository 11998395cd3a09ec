"""Sampling with guidance at the released sizes, random weights: the plain path in two precisions, and the fused one.

    python benchmarks/generate.py --device cuda --json generate.json

Time of a step is that of the sampler's steps after the first; `× realtime` is for --steps steps, without decoding. The
original publishes 12.3 × realtime for 60 steps on an A100.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from train_step import LYRIC_TOKENS, PROMPT_TOKENS, TINY

from acestep_ray.diffusion.sampler import sample
from acestep_ray.models.codec import SAMPLE_RATE, latent_frames
from acestep_ray.models.fusing import fuse_where_possible
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.models.transformer_config import TransformerConfig

PATHS = ("plain float32", "plain bfloat16", "fused bfloat16")


def condition_of(config: TransformerConfig, device: torch.device) -> dict[str, Tensor]:
    """Of one song."""
    return {
        "text": torch.randn(1, PROMPT_TOKENS, config.text_embedding_dim, device=device),
        "text_mask": torch.ones(1, PROMPT_TOKENS, dtype=torch.bool, device=device),
        "speaker": torch.zeros(1, config.speaker_embedding_dim, device=device),
        "lyric_ids": torch.randint(1, config.lyric_encoder_vocab_size, (1, LYRIC_TOKENS), device=device),
        "lyric_mask": torch.ones(1, LYRIC_TOKENS, dtype=torch.bool, device=device),
    }


def seconds_of_a_step(
    model: ACEStepTransformer, noise: Tensor, condition: dict[str, Tensor], steps: int, *, bfloat16: bool
) -> tuple[float, Tensor]:
    """Seconds of a guided step, and the latents after `steps` of them."""
    device = noise.device
    times = []

    def note(step: int) -> None:
        if step in (1, steps):
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        latents = sample(model, noise, condition, steps=steps, on_step=note)
    return (times[1] - times[0]) / (steps - 1), latents.float()


def main() -> None:
    """Measure each path and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--seconds", type=int, default=240, help="length of the music")
    parser.add_argument("--steps", type=int, default=60, help="steps of the sampler")
    parser.add_argument("--plain_steps", type=int, default=8, help="steps that are timed of the plain paths")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    config = TINY if arguments.tiny else TransformerConfig()
    seconds = 3 if arguments.tiny else arguments.seconds
    noise = torch.randn(1, 8, 16, latent_frames(seconds * SAMPLE_RATE), device=device)
    condition = condition_of(config, device)
    rows, wanted = [], None
    for path in PATHS:
        torch.manual_seed(0)
        with device:
            model = ACEStepTransformer(config).requires_grad_(False).eval()
        fused = path.startswith("fused")
        if fused:
            fuse_where_possible(model, device)
        steps = arguments.steps if fused else arguments.plain_steps
        in_bfloat16 = path.endswith("bfloat16")
        seconds_of_a_step(model, noise, condition, 3, bfloat16=in_bfloat16)
        took, _ = seconds_of_a_step(model, noise, condition, steps, bfloat16=in_bfloat16)
        _, latents = seconds_of_a_step(model, noise, condition, 4, bfloat16=in_bfloat16)
        wanted = latents if wanted is None else wanted
        rows.append(
            {
                "path": path,
                "step_ms": round(1000 * took, 1),
                "times_realtime": round(seconds / (took * arguments.steps), 1),
                "times_plain_float32": round(
                    (rows[0]["step_ms"] if rows else 1000 * took) / (1000 * took), 1
                ),
                "difference": f"{((latents - wanted).norm() / wanted.norm()).item():.1e}",
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        del model
        gc.collect()
    if arguments.json:
        report = {"torch": torch.__version__, "seconds": seconds, "steps": arguments.steps, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
