"""LoRA training steps of the 3.5B configuration from cached features, random weights: time, memory, float8's error.

    python benchmarks/train_step.py --device cuda --json step.json
    python benchmarks/train_step.py --device cuda --paths fused --cases 8x240 --floor 4000
    python benchmarks/train_step.py --device cpu --tiny

A step is forward, backward, clipping and AdamW over one batch, SSL losses on, 64 prompt and 512 lyric tokens a song. A
case is SONGSxSECONDS; `mixed` is songs of 3 to 240 s, each length as likely, in batches under a budget of frames. The
paths: `plain` is the one that the others are tested against, `fused` the one that trains on a GPU, `float8` with
products of frozen weights in float8, `int8` and `nf4` with quantised frozen weights; `+` recomputes activations. Small
batches are CUDA graphs there, as in training; `launched` is `fused` without them. The reference is the original's step
for one song on one H100 80 GB, which runs the frozen models each time too.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from acestep_ray.config import TrainConfig
from acestep_ray.diffusion.objective import SSLTarget, TrainingBatch, flow_matching_losses
from acestep_ray.models.codec import SAMPLE_RATE, latent_frames
from acestep_ray.models.flops import Lengths, Trained, model_flops
from acestep_ray.models.lyric_encoder import LyricEncoderConfig
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.models.transformer_config import TransformerConfig
from acestep_ray.training.frozen import store_frozen
from acestep_ray.training.lora import add_lora
from acestep_ray.training.lora_config import DEFAULT_LORA
from acestep_ray.training.model import fuse_passes
from acestep_ray.training.optim import build_optimizer, clip_gradients, set_learning_rate
from acestep_ray.training.passes import MAX_FRAMES, CapturedPasses, Recordings
from acestep_ray.training.sampler import BatchPlan
from acestep_ray.training.throughput import peak_flops

PROMPT_TOKENS, LYRIC_TOKENS = 64, 512
SSL_FRAMES_PER_SECOND = {"mert": 75, "m-hubert": 50}
SSL_STRIDE = 4
# Seconds of song → milliseconds of the original's step, with activation checkpointing.
ORIGINAL_MS = {30: 680, 120: 717, 240: 844}
WARM_UP_STEPS = 3
MIXED = "mixed"
MIXED_SONGS, MIXED_FRAMES = 96, 8 * 2584
COLUMNS = (
    "path", "case", "songs", "step_ms", "host_ms", "times_realtime", "tflops", "mfu", "memory_gb", "times_original",
)  # fmt: skip
DEFAULT_CASES = {
    "plain": ("1x240", "4x240"),
    "plain+": ("1x240",),
    "launched": ("1x30", "1x240", "2x240"),
    "fused": ("1x30", "1x240", "2x240", "4x240", "8x240", "32x30", "64x30", MIXED),
    "fused+": ("1x240", "8x240"),
    "float8": ("8x240", "32x30"),
    "int8+": ("1x240",),
    "nf4+": ("1x240",),
}
TINY = TransformerConfig(
    num_layers=4,
    inner_dim=64,
    num_attention_heads=2,
    attention_head_dim=32,
    ssl_encoder_depths=(1, 1),
    lyric_hidden_size=32,
    lyric_encoder=LyricEncoderConfig(attention_heads=2, linear_units=64, num_blocks=2),
)


def random_batch(
    config: TransformerConfig, songs: int, seconds: float | Sequence[float], device: torch.device
) -> TrainingBatch:
    """Songs of the given lengths with features of the sizes that real ones have."""
    lengths = [seconds] * songs if isinstance(seconds, int | float) else list(seconds)
    frames = torch.tensor([latent_frames(int(length * SAMPLE_RATE)) for length in lengths])
    latents = torch.randn(songs, 8, 16, int(frames.max()))
    ssl = {}
    for name, width in zip(config.ssl_names, config.ssl_latent_dims, strict=True):
        counts = torch.tensor([int(SSL_FRAMES_PER_SECOND[name] * length) for length in lengths])
        shape = (songs, -(-int(counts.max()) // SSL_STRIDE), width)
        features = torch.randint(-127, 128, shape, dtype=torch.int8)
        ssl[name] = SSLTarget(features, counts, SSL_STRIDE)
    batch = TrainingBatch(
        latents=latents,
        noise=torch.randn_like(latents),
        sigmas=torch.rand(songs),
        frame_mask=torch.arange(latents.shape[-1])[None] < frames[:, None],
        text=torch.randn(songs, PROMPT_TOKENS, config.text_embedding_dim),
        text_mask=torch.ones(songs, PROMPT_TOKENS, dtype=torch.bool),
        speaker=torch.zeros(songs, config.speaker_embedding_dim),
        lyric_ids=torch.randint(1, config.lyric_encoder_vocab_size, (songs, LYRIC_TOKENS)),
        lyric_mask=torch.ones(songs, LYRIC_TOKENS, dtype=torch.bool),
        dropout_seeds=torch.arange(songs),
        ssl=ssl,
    )
    return batch.to(device)


def build_model(config: TransformerConfig, path: str, device: torch.device) -> ACEStepTransformer:
    """A model with a LoRA whose weights do not depend on the path, prepared for it."""
    torch.manual_seed(0)
    quantised = path.rstrip("+") in ("int8", "nf4")
    with torch.device("cpu" if quantised else device):
        model = ACEStepTransformer(config)
        add_lora(model, DEFAULT_LORA)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.01)
    settings = TrainConfig(
        dataset_path="",
        checkpoint_dir="",
        precision="bf16-true" if device.type == "cuda" else "32",
        quantize_base=path.rstrip("+") if quantised else "none",
        fused=not path.startswith("plain"),
        float8=path.startswith("float8"),
        activation_checkpointing=1.0 if path.endswith("+") else 0.0,
    )
    store_frozen(model, settings, device)
    fuse_passes(model, settings, device, is_lora=True)
    model.activation_checkpointing = settings.activation_checkpointing
    return model


class Steps:
    """Training steps of one model."""

    def __init__(self, model: ACEStepTransformer, device: torch.device, *, captured: bool):
        self.model, self.device = model, device
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.trained, weight_decay=0.01)
        set_learning_rate(self.optimizer, 1e-5)
        self.model.draws_in_blocks = False
        self.captured = CapturedPasses(self.losses, self.trained, Recordings(print)) if captured else None

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """The loss of each song, (B,)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return {"loss": flow_matching_losses(self.model, batch).total(1.0)}

    def __call__(self, batch: TrainingBatch) -> Tensor:
        """One step; returns the loss."""
        loss = self.add_gradients(batch)
        clip_gradients(self.trained, 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def add_gradients(self, batch: TrainingBatch) -> Tensor:
        """Forward and backward pass of the mean, which is returned."""
        if self.captured is not None and batch.frame_mask.numel() <= MAX_FRAMES:
            self.captured.begin()
            return self.captured(batch, 1 / len(batch.sigmas))["loss"].mean()
        loss = self.losses(batch)["loss"].mean()
        loss.backward()
        return loss.detach()

    def bytes_of_graphs(self) -> int:
        """GPU memory that is counted as nobody's."""
        return 0 if self.captured is None else self.captured.recordings.bytes

    def seconds(self, batches: Sequence[TrainingBatch], rounds: int) -> tuple[float, float]:
        """Seconds of a round of steps over `batches`, and of that what the host took to start them."""
        self._wait()
        started = time.perf_counter()
        for _ in range(rounds):
            for batch in batches:
                self(batch)
        host = time.perf_counter() - started
        self._wait()
        return (time.perf_counter() - started) / rounds, host / rounds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(steps: Steps, case: str, rounds: int) -> dict:
    """Milliseconds of a step, × realtime, operations a second, and the most memory that it took."""
    device, config = steps.device, steps.model.config
    if case == MIXED:
        batches = mixed_batches(config, device)
    else:
        songs, length = (int(part) for part in case.split("x"))
        batches = [random_batch(config, songs, length, device)]
    on_gpu = device.type == "cuda"
    for batch in batches:
        for _ in range(WARM_UP_STEPS if len(batches) == 1 else 1):
            loss = steps(batch)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    took, host = steps.seconds(batches, rounds if len(batches) == 1 else 1)
    audio = sum(float(batch.frame_mask.sum()) for batch in batches) / latent_frames(SAMPLE_RATE * 240) * 240
    flops = sum(step_flops(steps.model, batch) for batch in batches)
    peak = peak_flops(device)
    return {
        "songs": sum(len(batch.sigmas) for batch in batches),
        "steps": len(batches),
        "step_ms": round(1000 * took / len(batches), 1),
        "host_ms": round(1000 * host / len(batches), 1),
        "times_realtime": round(audio / took),
        "tflops": round(flops / took / 1e12, 1),
        "mfu": None if peak is None else round(flops / took / peak, 3),
        "memory_gb": round((torch.cuda.max_memory_allocated() + steps.bytes_of_graphs()) / 1e9, 1)
        if on_gpu
        else None,
        "loss_is_finite": bool(torch.isfinite(loss)),
        "times_original": times_original(case, took),
    }


def step_flops(model: ACEStepTransformer, batch: TrainingBatch) -> int:
    """Operations of a step that are of use: of valid frames, without what is computed again."""
    masks = (batch.frame_mask, batch.text_mask, batch.lyric_mask)
    lengths = Lengths.of(*(mask.sum(dim=1).tolist() for mask in masks))
    return model_flops(model.config, lengths, with_ssl=True, trained=Trained.of(model)).total


def times_original(case: str, seconds: float) -> float | None:
    """How many times as many songs a second as the original's trainer."""
    if case == MIXED:
        return None
    songs, length = (int(part) for part in case.split("x"))
    if length not in ORIGINAL_MS:
        return None
    return round(ORIGINAL_MS[length] / 1000 * songs / seconds, 2)


def mixed_batches(config: TransformerConfig, device: torch.device) -> list[TrainingBatch]:
    """An epoch of songs of 3 to 240 s in the batches that training forms of them."""
    seconds = np.random.default_rng(0).uniform(3, 240, MIXED_SONGS)
    frames = np.array([latent_frames(int(length * SAMPLE_RATE)) for length in seconds])
    plan = BatchPlan(frames, seed=0, micro_batches_per_step=1, batch_frames=MIXED_FRAMES)
    steps = [plan.step(step)[0] for step in range(plan.steps_in_epochs(1))]
    return [random_batch(config, len(step.songs), seconds[list(step.songs)], device) for step in steps]


def losses_by_path(config: TransformerConfig, paths: Sequence[str], device: torch.device) -> dict[str, float]:
    """The loss of the same four songs with the same weights."""
    found = {}
    for path in paths:
        steps = Steps(build_model(config, path, device), device, captured=False)
        torch.manual_seed(1)
        batch = random_batch(config, 4, 120, device)
        with torch.no_grad():
            found[path] = steps.losses(batch)["loss"].mean().item()
        del steps
        free(device)
    return found


def errors_of_graphs(config: TransformerConfig, device: torch.device) -> dict[str, float]:
    """What CUDA graphs, used twice, make of the loss and of all gradients together, against launched kernels.

    Songs are shorter than what is recorded, which is filled up. Beside it two launches of the same, which differ where
    sums have no fixed order.
    """
    steps = Steps(build_model(config, "fused", device), device, captured=True)
    assert steps.captured is not None
    torch.manual_seed(2)
    batches = [
        random_batch(config, 2, [118.0, 97.0], device),
        random_batch(config, 2, [116.0, 120.0], device),
    ]
    found = {}
    for name, passes in (("graphs", steps.captured), ("launched", None), ("again", None)):
        steps.captured = passes
        for batch in batches:
            for _ in range(1 if passes is None else 3):
                steps.optimizer.zero_grad(set_to_none=True)
                loss = steps.add_gradients(batch)
        grads = torch.cat([p.grad.flatten() for p in steps.trained if p.grad is not None]).double()
        found[name] = grads.clone(), loss.double()
    wanted, wanted_loss = found["launched"]
    return {
        f"{name}_{what}": error.item()
        for name in ("graphs", "again")
        for what, error in (
            ("gradients", (found[name][0] - wanted).norm() / wanted.norm()),
            ("loss", (found[name][1] / wanted_loss - 1).abs()),
        )
    }


def free(device: torch.device) -> None:
    """Give memory back before the next model; a fused one refers to itself."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def show(row: dict) -> None:
    """One line of the table."""
    print(" | ".join(f"{row.get(column, '')}".rjust(max(7, len(column))) for column in COLUMNS), flush=True)


def run_cases(
    config: TransformerConfig, cases: dict[str, Sequence[str]], rounds: int, device: torch.device
) -> list[dict]:
    """A row for every path and case, printed as it comes."""
    rows = []
    show({column: column for column in COLUMNS})
    for path, names in cases.items():
        captured = device.type == "cuda" and not path.startswith(("plain", "launched"))
        steps = Steps(build_model(config, path, device), device, captured=captured)
        for case in names:
            try:
                row = measure(steps, case, rounds)
            except torch.OutOfMemoryError:
                row = {"step_ms": "no memory"}
            if steps.captured is not None:  # those of the next case need the memory
                steps.captured.recordings.forget()
            rows.append({"path": path, "case": case, **row})
            show(rows[-1])
            free(device)
        del steps
        free(device)
    return rows


def main() -> None:
    """Measure every case, print a table, compare the losses, and fail below the floor."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each case")
    parser.add_argument("--paths", help="only these, with commas")
    parser.add_argument("--cases", help="the same cases for all paths, with commas")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a CPU")
    parser.add_argument("--floor", type=float, help="least × realtime of the fused path with 8x240")
    parser.add_argument("--float8_floor", type=float, help="the same of float8")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    config = replace(TINY) if arguments.tiny else TransformerConfig()
    cases = {"plain": ("2x3",), "fused": ("2x3",)} if arguments.tiny else DEFAULT_CASES
    if arguments.paths:
        cases = {path: cases.get(path, ("8x240",)) for path in arguments.paths.split(",")}
    if arguments.cases:
        cases = dict.fromkeys(cases, tuple(arguments.cases.split(",")))
    chip = (
        torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    )
    print(f"{chip}, torch {torch.__version__}")
    rows = run_cases(config, cases, arguments.steps, device)
    losses = losses_by_path(config, list(cases), device)
    print("losses of the same songs and weights:", {path: round(loss, 5) for path, loss in losses.items()})
    report = {"chip": chip, "torch": torch.__version__, "rows": rows, "losses": losses}
    if device.type == "cuda":
        report["errors_of_graphs"] = errors_of_graphs(config, device)
        print(
            "graphs against launched kernels:", {k: f"{v:.1e}" for k, v in report["errors_of_graphs"].items()}
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    failed = False
    for path, floor in (("fused", arguments.floor), ("float8", arguments.float8_floor)):
        found = [row["times_realtime"] for row in rows if (row["path"], row["case"]) == (path, "8x240")]
        if floor is not None and max(found, default=0) < floor:
            print(
                f"{path}: {max(found, default=0)} × realtime, under the floor of {floor:g}", file=sys.stderr
            )
            failed = True
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
