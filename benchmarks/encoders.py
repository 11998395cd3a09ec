"""Checks and times the frozen encoders of the feature cache: codec, MERT, m-HuBERT and prompts, random weights.

    python benchmarks/encoders.py --device cuda --json encoders.json
    python benchmarks/encoders.py --device cpu            # tiny models, to try the script

First every Triton kernel and every fast path against float32 in plain torch, then milliseconds of each stage for
batches of songs that lie on the device as waves at 48 kHz. The reference for one song of 240 s on one H100 80 GB,
bfloat16, one song at a time: 124 ms for the codec, 126 ms for both SSL encoders.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import platform
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from released_sizes import AUTOENCODER, HUBERT, UMT5
from torch import Tensor, nn
from torchaudio.transforms import Resample
from transformers import HubertConfig, HubertModel, UMT5Config, UMT5EncoderModel

from acestep_ray.models import kernels
from acestep_ray.models.codec import LATENT_SCALE, LATENT_SHIFT, SAMPLE_RATE, MusicCodec
from acestep_ray.models.hubert import strided_convolution
from acestep_ray.models.mel import LogMelSpectrogram
from acestep_ray.models.ssl import SETTINGS, SSLEncoder
from acestep_ray.models.text_encoder import TextEncoder
from acestep_ray.tiny_checkpoint import AUTOENCODER_CONFIG, SSL_CONFIGS

ORIGINAL_MS = {"codec": 124, "ssl": 126}
# Bounds of the relative (Frobenius) error against float32, by dtype of what is stored.
BOUNDS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
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


class Report:
    """What was found, printed as it comes and kept for the table and the JSON file."""

    def __init__(self, device: torch.device):
        self.device = device
        self.rows: list[dict] = []
        self.checks: list[dict] = []
        self.failures: list[str] = []
        self.started = time.perf_counter()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """One failure does not lose the rest."""
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                yield
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            print(f"FAILED {name}")
            traceback.print_exc(limit=-6)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"[{time.perf_counter() - self.started:5.1f} s] {name}: {time.perf_counter() - started:.1f} s")

    def check(self, name: str, error: float, bound: float) -> None:
        passed = error <= bound  # False for NaN
        self.checks.append({"name": name, "error": error, "bound": bound, "passed": passed})
        if not passed:
            self.failures.append(f"{name}: error {error:.2e} over {bound:.0e}")
        print(f"  {'ok  ' if passed else 'WRONG'} {name}: {error:.2e}")

    def time(self, name: str, function: Callable, *arguments, repeats: int = 7) -> float:
        """Median milliseconds of a call, the first and a second apart."""
        started = time.perf_counter()
        function(*arguments)
        self.synchronize()
        first = time.perf_counter() - started
        function(*arguments)
        self.synchronize()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            function(*arguments)
            self.synchronize()
            times.append((time.perf_counter() - started) * 1000)
        median = sorted(times)[len(times) // 2]
        row = {"name": name, "ms": round(median, 3), "first_s": round(first, 2)}
        if self.device.type == "cuda":
            row["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        self.rows.append(row)
        return median

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm()).item()


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Without Triton."""
    chosen = kernels.runs_triton
    kernels.runs_triton = lambda x: False
    try:
        yield
    finally:
        kernels.runs_triton = chosen


# --- kernels -----------------------------------------------------------------------------------------------


def check_kernels(report: Report) -> None:
    """Every kernel on small random images, with and without padded songs, against plain float32."""
    for dtype in BOUNDS:
        for height, width, channels, padded in (
            (16, 33, 192, True),
            (16, 33, 192, False),
            (5, 130, 80, True),
        ):
            # Each case is compiled on its own: float16 has them all.
            if dtype == torch.float16 or (channels == 192 and padded == (dtype == torch.float32)):
                check_images(report, dtype, height, width, channels, padded)
        check_waves(report, dtype)


def check_images(
    report: Report, dtype: torch.dtype, height: int, width: int, channels: int, padded: bool
) -> None:
    device, batch = report.device, 3
    widths = torch.tensor([width, width - 1, 4], device=device) if padded else None

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, y = random(batch, height, width, channels), random(batch, height, width, channels)
    gain, bias = random(channels), random(channels)
    qkv, wide_qkv = random(batch, height, width, 288), random(batch, height, width, 288)
    scales = [(qkv, None), (wide_qkv, 0.2 * random(288, 32, 1, 1))]
    image, halved = random(batch, 2 * height, 2 * width, channels), random(batch, height, width, 2 * channels)
    mel = random(batch, 2, height, width, dtype=torch.float32)
    cases = {
        "gated depthwise 3": (kernels.gated_depthwise, x, random(channels, 1, 3, 3), bias, widths),
        "depthwise 5": (kernels.depthwise, x, random(channels, 1, 5, 5), None, widths),
        "attention": (kernels.linear_attention, scales, 32, widths),
        "bias and SiLU": (kernels.bias_silu_, x, bias, widths),
        "RMSNorm and residual": (kernels.add_rms_norm_, x, y, gain, bias, 1e-5, widths),
        "down": (kernels.add_halved_, image, halved, random(2 * channels), 2, widths),
        "first convolution": (kernels.first_convolution, mel, random(48, 2, 3, 3), random(48), widths),
    }
    for name, (function, *arguments) in cases.items():
        with plain_torch():
            wanted = function(*convert(arguments, torch.float32))
        found = function(*convert(arguments, None))
        if name == "attention":  # what it gives past a song's end is not defined
            found, wanted = kernels.masked(found, widths), kernels.masked(wanted, widths)
        bound = BOUNDS[dtype] * (2 if name == "attention" else 1)
        what = f"{name}, {str(dtype)[6:]}, {height}×{width}×{channels}{', padded' if padded else ''}"
        report.check(what, relative_error(found, wanted), bound)


def check_waves(report: Report, dtype: torch.dtype) -> None:
    device = report.device
    x, gain, bias = (torch.randn(*shape, device=device).to(dtype) for shape in ((77, 512), (512,), (512,)))
    wave, taps = torch.randn(2, 4005, device=device), torch.randn(512, 10, device=device)
    parameters = (taps, gain.float(), bias.float(), gain.float(), 1e-5, 5)
    for option in (False, True):
        with plain_torch():
            wide = convert([x, gain, bias], torch.float32)
            wanted = kernels.layer_norm(*wide, 1e-5, added=gain.float(), gelu=option)
        found = kernels.layer_norm(x, gain, bias, 1e-5, added=gain, gelu=option)
        report.check(
            f"layer norm, {str(dtype)[6:]}, GELU {option}", relative_error(found, wanted), BOUNDS[dtype]
        )
        with plain_torch():
            wanted = kernels.wave_layer(wave, *parameters, over_time=option, dtype=torch.float32)
        found = kernels.wave_layer(wave, *parameters, over_time=option, dtype=dtype)
        what = f"wave layer, {str(dtype)[6:]}, over time {option}"
        report.check(what, relative_error(found, wanted), BOUNDS[dtype])
    if dtype == torch.float32:
        mel = LogMelSpectrogram().to(device)
        fading = torch.randn(2, 2, 512 * 70, device=device) * torch.logspace(-5, 0, 512 * 70, device=device)
        with plain_torch():
            wanted = mel(fading)
        report.check("log-mel, absolute", (mel(fading) - wanted).abs().max().item(), 1e-4)


def convert(values, dtype: torch.dtype | None):
    """A copy of nested arguments, their floating-point tensors in `dtype` if one is given."""
    if isinstance(values, (list, tuple)):
        return type(values)(convert(value, dtype) for value in values)
    if not isinstance(values, Tensor):
        return values
    return values.to(dtype, copy=True) if dtype and values.is_floating_point() else values.clone()


class Stopwatch:
    """Times one GPU pass at a time and says what share of the memory's bandwidth it reaches."""

    def __init__(self, report: Report):
        self.report = report

    def __call__(self, name: str, gigabytes: float, function: Callable, *arguments, **options) -> None:
        try:
            function(*arguments, **options)
            times = []
            for _ in range(12):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function(*arguments, **options)
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
        except Exception as error:
            print(f"  {name}: {type(error).__name__}: {str(error)[:150]}")
            return
        ms = sorted(times)[6]
        self.report.rows.append(
            {"name": f"kernel: {name}", "ms": round(ms, 3), "gb_per_s": round(gigabytes / ms * 1e3)}
        )
        print(f"  {name}: {ms:.3f} ms, {gigabytes / ms * 1e3:.0f} GB/s")


def time_kernels(report: Report) -> None:
    """Each pass over memory at the sizes of one song of 240 s."""
    device, width, clock = report.device, 2584, Stopwatch(report)
    if not kernels.runs_triton(torch.empty(0, device=device)):
        raise RuntimeError("no Triton here")
    from acestep_ray.models import codec_attention_kernels, codec_kernels, mel_kernels

    def random(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    x, taps, bias = random(1, 16, width, 8192), random(8192, 1, 3, 3), random(8192)
    full = torch.tensor([width], device=device)
    size = x.numel() * 3 / 1e9
    for run, block, warps in ((4, 256, 4), (4, 512, 8), (4, 128, 2), (2, 256, 4), (6, 256, 4), (8, 128, 4)):
        options = {"run": run, "block": block, "warps": warps}
        clock(f"gated 3×3 {options}", size, codec_kernels.depthwise, x, taps, bias, None, True, **options)
    clock("gated 3×3, padded", size, codec_kernels.depthwise, x, taps, bias, full, True)
    del x
    x, taps = random(1, 16, width, 3072), random(3072, 1, 5, 5)
    size = x.numel() * 4 / 1e9
    for run, block, warps in ((4, 256, 4), (8, 256, 4), (8, 128, 4), (4, 512, 8), (4, 128, 2), (6, 256, 4)):
        options = {"run": run, "block": block, "warps": warps}
        clock(
            f"depthwise 5×5 {options}", size, codec_kernels.depthwise, x, taps, None, None, False, **options
        )
    scales = [(x, None), (x, random(3072, 32, 1, 1))]
    size = (2 * x.numel() + 16 * width * 2048) * 2 / 1e9
    for widths in (None, full):
        clock(
            f"attention{'' if widths is None else ', padded'}",
            size,
            codec_attention_kernels.linear_attention,
            scales,
            32,
            widths,
        )
    del x, scales
    for level, channels in enumerate((128, 256, 512, 1024)):
        x = random(1, 128 >> level, 8 * width >> level, channels)
        y, gain = torch.randn_like(x), random(channels)
        size = x.numel() * 2 / 1e9
        for widths in (None, torch.tensor([x.shape[2]], device=device)):
            padded = "" if widths is None else ", padded"
            clock(
                f"RMSNorm {channels}{padded}",
                3 * size,
                codec_kernels.add_rms_norm_,
                x,
                y,
                gain,
                gain,
                1e-5,
                widths,
            )
            if channels < 1024:
                clock(
                    f"bias and SiLU {channels}{padded}", 2 * size, codec_kernels.bias_silu_, x, gain, widths
                )
        if channels < 1024:
            half, bias = random(1, 64 >> level, 4 * width >> level, 2 * channels), random(2 * channels)
            clock(f"down {channels}", 2 * size, codec_kernels.add_halved_, x, half, bias, 2, None)
            del half
        del x, y
    mel, weight, bias = random(1, 2, 128, 8 * width, dtype=torch.float32), random(128, 2, 3, 3), random(128)
    clock(
        "first convolution",
        128 * 8 * width * 256 / 1e9,
        codec_kernels.first_convolution,
        mel,
        weight,
        bias,
        None,
    )
    spectrum = torch.view_as_complex(random(2, 8 * width, 1025, 2, dtype=torch.float32))
    filters = torch.rand(128, 1025, device=device)
    size = spectrum.numel() * 8 * 744 / 1025 / 1e9
    for per_program, block, warps in ((32, 32, 8), (32, 16, 8), (16, 32, 8), (64, 32, 8)):
        options = {"per_program": per_program, "block": block, "warps": warps}
        clock(f"log-mel {options}", size, mel_kernels.log_mel, spectrum, filters, 744, 1e-5, 1e-6, **options)
    del spectrum
    time_hubert_kernels(clock, random)


def time_hubert_kernels(clock: Stopwatch, random: Callable) -> None:
    """MERT's passes for one song of 240 s, and alternatives to the products that it uses."""
    from acestep_ray.models import hubert_kernels

    wave, taps, gain = (random(*shape, dtype=torch.float32) for shape in ((48, 120_000), (512, 10), (512,)))
    size = 48 * 23_999 * 1024 / 1e9
    for per_program, warps in ((32, 8), (16, 4), (32, 4), (64, 8)):
        options = {"per_program": per_program, "warps": warps}
        arguments = (wave, taps, gain, gain, gain, 1e-5, 5, True, torch.bfloat16)
        clock(f"wave layer {options}", size, hubert_kernels.wave_layer, *arguments, **options)
    arguments = (wave, taps, None, gain, gain, 1e-5, 5)
    clock("wave layer over time", size, kernels.wave_layer, *arguments, over_time=True, dtype=torch.bfloat16)
    x = random(48, 23_999, 512, dtype=torch.bfloat16)
    gain, weight = random(512, dtype=torch.bfloat16), random(512, 512, 3, dtype=torch.bfloat16)
    size = 1.5 * x.numel() * 2 / 1e9
    clock("strided convolution", size, strided_convolution, x, weight, None, 2)

    def products(rows: Tensor, weights: Tensor) -> Tensor:
        result = torch.matmul(rows[:, :-1], weights[:1024])
        return result.baddbmm_(rows[:, 1:, :512], weights[1024:].expand(len(rows), -1, -1))

    rows = x[:, :23_998].unflatten(1, (-1, 2)).flatten(2)
    clock(
        "strided convolution, as products",
        size,
        products,
        rows,
        weight.transpose(1, 2).flatten(1).T.contiguous(),
    )
    half = rows[..., :512].contiguous()
    clock(
        "layer norm and GELU",
        half.numel() * 4 / 1e9,
        hubert_kernels.layer_norm,
        half,
        gain,
        gain,
        gain,
        1e-5,
        True,
    )
    del x, rows, half
    x, wide = random(17_952, 1024, dtype=torch.bfloat16), random(17_952, 4096, dtype=torch.bfloat16)
    up, down = random(4096, 1024, dtype=torch.bfloat16), random(1024, 4096, dtype=torch.bfloat16)
    bias = random(4096, dtype=torch.bfloat16)
    size = (x.numel() + wide.numel()) * 2 / 1e9
    clock("product with GELU", size, torch._addmm_activation, bias, x, up.T, use_gelu=True)
    clock("product with bias", size, F.linear, x, up, bias)
    clock("GELU", wide.numel() * 4 / 1e9, F.gelu, wide)
    clock("product", size, F.linear, wide, down)
    clock("product onto a residual", size, torch.Tensor.addmm_, x, wide, down.T)
    clock("layer norm 1024", x.numel() * 4 / 1e9, hubert_kernels.layer_norm, x, None, x[0], x[0], 1e-5, False)


# --- songs -------------------------------------------------------------------------------------------------


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
