"""The Triton kernels of the frozen encoders, for `encoders.py`: checked against plain torch, and timed one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from encoder_report import BOUNDS, Report, plain_torch, relative_error
from torch import Tensor

from acestep_ray.models import kernels
from acestep_ray.models.hubert import strided_convolution
from acestep_ray.models.mel import LogMelSpectrogram


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
