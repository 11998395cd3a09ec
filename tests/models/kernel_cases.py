"""Every Triton kernel in Triton's interpreter against plain torch; run with TRITON_INTERPRET=1, prints JSON.

TRITON_INTERPRET=1 python -m tests.models.kernel_cases
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from acestep_ray.models import codec_attention_kernels, codec_kernels, hubert_kernels, kernels
from acestep_ray.models.mel import LogMelSpectrogram

BATCH, HEIGHT, WIDTH = 3, 3, 7
HEAD_DIM = 4


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def image_cases(dtype: torch.dtype, widths: Tensor | None) -> dict[str, float]:
    """Name → relative error, of images whose channels fill no block and whose columns fill no run."""
    channels = 20
    x, y = random(2, BATCH, HEIGHT, WIDTH, channels, dtype=dtype)
    gain, bias = random(2, channels, dtype=dtype)
    depth, wide_depth = random(channels, 1, 3, 3, dtype=dtype), random(channels, 1, 5, 5, dtype=dtype)
    small = {"run": 2, "block": 16}
    errors = {
        "gated depthwise": relative_error(
            codec_kernels.depthwise(x, depth, bias, widths, True, **small),
            kernels.gated_depthwise(x, depth, bias, widths),
        ),
        "depthwise": relative_error(
            codec_kernels.depthwise(x, wide_depth, None, widths, False, **small),
            kernels.depthwise(x, wide_depth, None, widths),
        ),
        "bias and SiLU": relative_error(
            codec_kernels.bias_silu_(x.clone(), bias, widths), kernels.bias_silu_(x.clone(), bias, widths)
        ),
        "RMSNorm and residual": relative_error(
            codec_kernels.add_rms_norm_(y, x.clone(), gain, bias, 1e-5, widths),
            kernels.add_rms_norm_(y, x.clone(), gain, bias, 1e-5, widths),
        ),
    }
    image = random(BATCH, 2 * HEIGHT, 2 * WIDTH, channels, dtype=dtype)
    for outputs in (2 * channels, channels, 16):
        halved, shift = random(BATCH, HEIGHT, WIDTH, outputs, dtype=dtype), random(outputs, dtype=dtype)
        group = 4 * channels // outputs
        errors[f"down, groups of {group}"] = relative_error(
            codec_kernels.add_halved_(image, halved.clone(), shift, group, widths),
            kernels.add_halved_(image, halved.clone(), shift, group, widths),
        )
    mel, weight = random(BATCH, 2, HEIGHT, WIDTH, dtype=torch.float32), random(20, 2, 3, 3, dtype=dtype)
    errors["first convolution"] = relative_error(
        codec_kernels.first_convolution(mel, weight, bias, widths),
        kernels.first_convolution(mel, weight, bias, widths),
    )
    qkv, wide = random(2, BATCH, HEIGHT, WIDTH, 2 * 3 * HEAD_DIM, dtype=dtype)
    scales = [(qkv, None), (wide, random(2 * 3 * HEAD_DIM, HEAD_DIM, 1, 1, dtype=dtype))]
    # What attention gives past a song's end is not defined.
    errors["linear attention"] = relative_error(
        kernels.masked(codec_attention_kernels.linear_attention(scales, HEAD_DIM, widths), widths),
        kernels.masked(kernels.linear_attention(scales, HEAD_DIM, widths), widths),
    )
    return errors


def wave_cases(dtype: torch.dtype) -> dict[str, float]:
    channels = 20
    x, gain, bias = random(5, channels, dtype=dtype), *random(2, channels, dtype=dtype)
    errors = {}
    for added in (None, gain):
        for gelu in (False, True):
            errors[f"layer norm, added {added is not None}, GELU {gelu}"] = relative_error(
                hubert_kernels.layer_norm(x, added, gain, bias, 1e-5, gelu),
                kernels.layer_norm(x, gain, bias, 1e-5, added=added, gelu=gelu),
            )
    wave, taps = random(2, 333, dtype=torch.float32), random(channels, 10, dtype=torch.float32)
    parameters = (taps, *random(3, channels, dtype=torch.float32), 1e-5, 5)
    for over_time in (False, True):
        options = {"over_time": over_time, "dtype": dtype}
        wanted = kernels.wave_layer(wave, *parameters, **options)
        found = with_kernels(kernels.wave_layer, wave, *parameters, **options)
        errors[f"wave layer, over time {over_time}"] = relative_error(found, wanted)
    return errors


def with_kernels(function, *arguments, **options):
    """As on a GPU."""
    chosen = kernels.runs_triton
    kernels.runs_triton = lambda x: True
    try:
        return function(*arguments, **options)
    finally:
        kernels.runs_triton = chosen


def long_attention() -> float:
    """More pixels than one chunk has, in songs of different lengths."""
    widths = torch.tensor([700, 90])
    scales = [(random(2, 2, 700, 3 * HEAD_DIM, dtype=torch.float32), None)]
    found = codec_attention_kernels.linear_attention(scales, HEAD_DIM, widths)
    wanted = kernels.linear_attention(scales, HEAD_DIM, widths)
    return relative_error(kernels.masked(found, widths), kernels.masked(wanted, widths))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    errors = {}
    for dtype in (torch.float32, torch.float16):
        for widths in (None, torch.tensor([WIDTH, 3, WIDTH - 1])):
            padded = "" if widths is None else ", padded"
            for name, error in image_cases(dtype, widths).items():
                errors[f"{name}, {str(dtype)[6:]}{padded}"] = error
        for name, error in wave_cases(dtype).items():
            errors[f"{name}, {str(dtype)[6:]}"] = error
    errors["long attention, float32"] = long_attention()
    mel = LogMelSpectrogram()
    waves = random(2, 5 * 512, dtype=torch.float32)
    errors["log-mel, float32"] = relative_error(with_kernels(mel, waves), mel(waves))
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
