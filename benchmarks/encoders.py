"""Checks and times the frozen encoders of the feature cache: codec, MERT, m-HuBERT and prompts, random weights.

    python benchmarks/encoders.py --device cuda --json encoders.json
    python benchmarks/encoders.py --device cpu            # tiny models, to try the script

First every Triton kernel and every fast path against float32 in plain torch, then milliseconds of each stage for
batches of songs that lie on the device as waves at 48 kHz. The reference for one song of 240 s on one H100 80 GB,
bfloat16, one song at a time: 124 ms for the codec, 126 ms for both SSL encoders.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from encoder_kernels import check_kernels, time_kernels
from encoder_report import Report, plain_torch, relative_error
from released_sizes import AUTOENCODER, HUBERT, UMT5
from torch import Tensor, nn
from torchaudio.transforms import Resample
from transformers import HubertConfig, HubertModel, UMT5Config, UMT5EncoderModel

from acestep_ray.models.codec import LATENT_SCALE, LATENT_SHIFT, SAMPLE_RATE, MusicCodec
from acestep_ray.models.ssl import SETTINGS, SSLEncoder
from acestep_ray.models.text_encoder import TextEncoder
from acestep_ray.tiny_checkpoint import AUTOENCODER_CONFIG, SSL_CONFIGS

ORIGINAL_MS = {"codec": 124, "ssl": 126}
WORKLOADS = {
    "1 × 240 s": [240.0],
    "2 × 240 s": [240.0] * 2,
    "8 × 30 s": [30.0] * 8,
    "80 × 3 s": [3.0] * 80,
    "4 × 232-240 s": [240.0, 237.3, 236.9, 232.0],
    "8 × 28-30 s": [30.0, 29.97, 29.9, 29.5, 29.0, 28.8, 28.5, 28.0],
    "1 × 30 s": [30.0],
}
TINY_WORKLOADS = {"1 × 4 s": [4.0], "3 × 3-4 s": [4.0, 3.3, 3.9]}


def songs(seconds: list[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """Noise with a beat (B, 2, N), and each song's samples (B,)."""
    generator = torch.Generator(device).manual_seed(0)
    samples = torch.tensor([int(s * SAMPLE_RATE) for s in seconds])
    longest = int(samples.max())
    waves = torch.randn(len(seconds), 2, longest, device=device, generator=generator)
    beat = torch.exp(-8 * torch.remainder(torch.arange(longest, device=device) / SAMPLE_RATE, 0.5))
    waves *= 0.02 + 0.2 * beat
    inside = torch.arange(longest, device=device) < samples.to(device)[:, None, None]
    return torch.where(inside, waves, 0), samples


def facts(kind: str, workload: str, seconds: list[float], ms: float) -> dict:
    total = sum(seconds)
    return {
        "stage": kind,
        "songs": workload,
        "times_realtime": round(total / ms * 1e3),
        "times_original": round(ORIGINAL_MS["codec" if kind == "codec" else "ssl"] * total / 240 / ms, 2)
        if kind in ("codec", "both SSL")
        else None,
    }


def build_codec(tiny: bool, device: torch.device) -> MusicCodec:
    with device:
        autoencoder = AutoencoderDC(**(AUTOENCODER_CONFIG if tiny else AUTOENCODER))
        autoencoder = autoencoder.eval().requires_grad_(False)
        # Decoding is not timed here.
        return MusicCodec(autoencoder, nn.Identity(), encoder_dtype=torch.float16).to(device).eval()


def float32_codec(codec: MusicCodec) -> MusicCodec:
    return MusicCodec(codec.autoencoder, nn.Identity()).to(codec.device).eval()


def check_codec(report: Report, codec: MusicCodec, tiny: bool) -> None:
    exact = float32_codec(codec)
    seconds = [4.0, 3.1, 3.97] if tiny else [60.0, 43.0, 59.95]
    waves, samples = songs(seconds, report.device)
    alone = []
    with plain_torch():
        for wave, n in zip(waves, samples.tolist(), strict=True):
            mel = codec.log_mel(wave[:, :n])[None]
            latents = codec.autoencoder.encode((mel + 11) / 14 * 2 - 1).latent
            alone.append((latents[0] - LATENT_SHIFT) * LATENT_SCALE)
    wave = waves[0, :, : 10 * SAMPLE_RATE].cpu()
    wanted = Resample(SAMPLE_RATE, 44_100)(wave)
    report.check("resampling", relative_error(codec.to_mel_rate(wave.to(report.device)).cpu(), wanted), 1e-6)
    for name, encoder, bound in (("float32", exact, 1e-4), ("float16", codec, 1e-2)):
        latents, _ = encoder.encode(waves, samples)
        for found, wanted, s in zip(latents, alone, seconds, strict=True):
            width = wanted.shape[-1]
            # Without the shift, which would flatter the error.
            error = relative_error(
                found[..., :width] / LATENT_SCALE + LATENT_SHIFT, wanted / LATENT_SCALE + LATENT_SHIFT
            )
            report.check(f"codec {name}, {s:g} s among others", error, bound)
            report.check(f"codec {name}, {s:g} s, past the end", found[..., width:].abs().sum().item(), 0)
        again, _ = encoder.encode(waves, samples)
        report.check(f"codec {name}, twice the same", (again - latents).abs().max().item(), 0)
    # A layer that overflows float16 and not float32.
    norm = codec.autoencoder.encoder.down_blocks[0][0].conv1
    half = codec.half_encoder.down_blocks[0][0].conv1
    kept = norm.bias[0].item()
    norm.bias[0], half.bias[0] = 1e5, float("inf")
    overflowed, _ = codec.encode(waves, samples)
    wanted, _ = exact.encode(waves, samples)
    report.check("codec, overflow", relative_error(overflowed, wanted), 1e-5)
    norm.bias[0], half.bias[0] = kept, kept


def time_codec(report: Report, codec: MusicCodec, workloads: dict[str, list[float]]) -> None:
    for workload, seconds in workloads.items():
        waves, samples = songs(seconds, report.device)
        ms = report.time(f"codec {workload}", codec.encode, waves, samples)
        report.rows[-1] |= facts("codec", workload, seconds, ms)
        print(f"  codec {workload}: {ms:.2f} ms, first {report.rows[-1]['first_s']} s")
    waves, samples = songs(next(iter(workloads.values())), report.device)
    mel = codec.log_mel(waves)
    parts = {
        "codec: resample": (codec.to_mel_rate, waves),
        "codec: resample and log-mel": (codec.log_mel, waves),
        "codec: mel to latents": (codec.mel_to_latents, mel),
    }
    for name, call in parts.items():
        print(f"  {name}: {report.time(name, *call):.2f} ms")
    exact = float32_codec(codec)
    print(f"  codec float32: {report.time('codec: float32', exact.encode, waves, samples, repeats=2):.1f} ms")


def build_ssl(name: str, tiny: bool, device: torch.device, dtype: torch.dtype) -> SSLEncoder:
    if tiny:
        common = {"num_hidden_layers": 2, "intermediate_size": 64, "conv_dim": [16] * 7}
        common |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
        skipped = ("model_type", "architectures")
        config = HubertConfig(**{k: v for k, v in SSL_CONFIGS[name].items() if k not in skipped}, **common)
    else:
        config = HubertConfig(**HUBERT[name])
    torch.manual_seed(1)
    with device:
        model = HubertModel(config).eval().requires_grad_(False)
    return SSLEncoder(name, *SETTINGS[name], model, dtype=dtype).to(device).eval()


def check_ssl(report: Report, tiny: bool) -> None:
    seconds = [4.0, 3.0] if tiny else [31.0, 12.3]
    waves, samples = songs(seconds, report.device)
    batch = [wave[:, :n] for wave, n in zip(waves, samples.tolist(), strict=True)]
    for name in SETTINGS:
        exact = build_ssl(name, tiny, report.device, torch.float32)
        normalised, _ = exact._normalised(batch[:1])
        size = exact.sample_rate * exact.chunk_seconds
        chunks = normalised[0].unflatten(0, (-1, size))
        wanted = exact.hubert.model(chunks).last_hidden_state
        with plain_torch():
            report.check(f"{name} float32 plain", relative_error(exact.hubert(chunks), wanted), 1e-4)
        report.check(f"{name} float32", relative_error(exact.hubert(chunks), wanted), 1e-4)
        reference = exact.encode_batch(batch)
        report.check(f"{name} alone", relative_error(exact.encode(batch[1]), reference[1]), 1e-5)
        for dtype in (torch.bfloat16, torch.float16):
            half = build_ssl(name, tiny, report.device, dtype)
            for found, full in zip(half.encode_batch(batch), reference, strict=True):
                similar = F.cosine_similarity(found, full, dim=-1)
                report.check(f"{name} {str(dtype)[6:]}, 1 - worst cosine", 1 - similar.min().item(), 1e-2)
                report.check(f"{name} {str(dtype)[6:]}, 1 - mean cosine", 1 - similar.mean().item(), 5e-4)


def time_ssl(report: Report, tiny: bool, workloads: dict[str, list[float]], profiled: bool) -> None:
    encoders = {name: build_ssl(name, tiny, report.device, torch.bfloat16) for name in SETTINGS}
    for workload, seconds in workloads.items():
        waves, samples = songs(seconds, report.device)
        batch = [wave[:, :n] for wave, n in zip(waves, samples.tolist(), strict=True)]
        total = 0.0
        for name, encoder in encoders.items():
            ms = report.time(f"{name} {workload}", encoder.encode_batch, batch)
            report.rows[-1] |= facts(name, workload, seconds, ms)
            total += ms
        report.rows.append(
            {"name": f"both {workload}", "ms": round(total, 3), **facts("both SSL", workload, seconds, total)}
        )
        print(f"  SSL {workload}: {total:.2f} ms")
    waves, samples = songs(next(iter(workloads.values())), report.device)
    for name, encoder in encoders.items():
        hubert = encoder.hubert
        normalised, _ = encoder._normalised(list(waves))
        chunks = normalised.flatten().unflatten(0, (-1, encoder.sample_rate * encoder.chunk_seconds))
        extracted = hubert.extract(chunks)
        projected = hubert.project(extracted)
        layers = hubert.encode_first_normed if hubert.norm_first else hubert.encode_last_normed
        parts = {
            "waves": (encoder._normalised, list(waves)),
            "extract": (hubert.extract, chunks),
            "project": (hubert.project, extracted),
            "positions": (hubert.positions, projected),
            "layers": (layers, projected),
        }
        for part, call in parts.items():
            print(f"  {name}: {part}: {report.time(f'{name}: {part}', *call):.2f} ms")
        if profiled:
            profile(report, f"{name}, {next(iter(workloads))}", encoder.encode_batch, list(waves))


def time_text(report: Report, tiny: bool) -> None:
    """5 prompts of 40 tokens for each of 8 songs."""
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 600}
    if not tiny:
        sizes = UMT5
    config = UMT5Config(**sizes)
    torch.manual_seed(2)
    with report.device:
        model = UMT5EncoderModel(config).eval().requires_grad_(False)
    ids = torch.randint(2, config.vocab_size, (40, 40)).tolist()
    prompts = [SimpleNamespace(ids=row, attention_mask=[1] * len(row)) for row in ids]
    encoder = TextEncoder(model, SimpleNamespace(encode_batch=lambda texts: prompts[: len(texts)]))
    wanted, _ = encoder.encode([""] * 40)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model.to(dtype)
        found, _ = encoder.encode([""] * 40)
        error = relative_error(found, wanted)
        for texts in (40, 5):
            ms = report.time(
                f"text {str(dtype)[6:]} {texts} prompts", lambda n=texts: encoder.encode([""] * n)
            )
            report.rows[-1]["error"] = error
            print(f"  text {str(dtype)[6:]}, {texts} prompts: {ms:.2f} ms, error {error:.1e}")


def profile(report: Report, name: str, function: Callable, *arguments) -> None:
    """The kernels that take the most time."""
    function(*arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function(*arguments)
        report.synchronize()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    print(f"--- {name}: {total / 1000:.2f} ms in {sum(e.count for e in events)} launches")
    for event in events[:24]:
        print(f"  {event.self_device_time_total / 1000:8.3f} ms {event.count:4d} × {event.key[:110]}")


def print_table(report: Report) -> None:
    columns = ["stage", "songs", "ms", "times_realtime", "times_original", "memory_gb"]
    rows = [
        ["" if row.get(c) is None else str(row[c]) for c in columns] for row in report.rows if "stage" in row
    ]
    widths = [max(len(c), *(len(row[i]) for row in rows)) if rows else len(c) for i, c in enumerate(columns)]
    for row in [columns, *rows]:
        print(" | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def main() -> None:
    """Check, measure, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--profile", action="store_true", help="list the GPU kernels that take the most time")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    tiny = device.type == "cpu"
    workloads = TINY_WORKLOADS if tiny else WORKLOADS
    # The reference is float32 in earnest.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.manual_seed(0)

    report = Report(device)
    with report.section("kernels, checked"):
        check_kernels(report)
    if not tiny:
        with report.section("kernels, timed"):
            time_kernels(report)
    with torch.inference_mode():
        codec = build_codec(tiny, device)
    with report.section("codec, checked"):
        check_codec(report, codec, tiny)
    with report.section("codec, timed"):
        time_codec(report, codec, workloads)
    if arguments.profile and not tiny:
        with report.section("codec, profiled"):
            for workload in ("1 × 240 s", "8 × 28-30 s"):
                waves, samples = songs(WORKLOADS[workload], device)
                profile(report, f"codec, {workload}", codec.encode, waves, samples)
    del codec
    with report.section("SSL, checked"):
        check_ssl(report, tiny)
    with report.section("SSL, timed"):
        time_ssl(report, tiny, workloads, arguments.profile and not tiny)
    with report.section("text"):
        time_text(report, tiny)

    chip = torch.cuda.get_device_name() if not tiny else platform.processor() or platform.machine()
    if arguments.json:
        content = {
            "chip": chip,
            "torch": torch.__version__,
            "rows": report.rows,
            "checks": report.checks,
            "failures": report.failures,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\n{chip}, torch {torch.__version__}, {time.perf_counter() - report.started:.0f} s in all")
    print_table(report)
    print(f"{sum(c['passed'] for c in report.checks)} of {len(report.checks)} checks passed")
    for failure in report.failures:
        print(f"  FAILED {failure}")


if __name__ == "__main__":
    main()
