"""The fused blocks in Triton's interpreter against the plain ones; run with TRITON_INTERPRET=1, prints JSON.

TRITON_INTERPRET=1 python -m tests.models.fused_cases
"""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from torch import Tensor, nn

from acestep_ray.diffusion.objective import TrainingBatch, flow_matching_losses
from acestep_ray.models import (
    block_kernels,
    cross_attention_kernels,
    linear_attention_kernels,
    projection_kernels,
)
from acestep_ray.models.fused import fuse
from acestep_ray.models.lyric_encoder import LyricEncoderConfig
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.models.transformer_config import TransformerConfig
from acestep_ray.training.lora import add_lora

CONFIG = TransformerConfig(
    num_layers=2,
    inner_dim=32,
    num_attention_heads=2,
    attention_head_dim=16,
    speaker_embedding_dim=8,
    text_embedding_dim=12,
    ssl_encoder_depths=(0,),
    ssl_names=("mert",),
    ssl_latent_dims=(8,),
    lyric_encoder_vocab_size=30,
    lyric_hidden_size=32,
    lyric_encoder=LyricEncoderConfig(attention_heads=2, linear_units=16, num_blocks=1),
)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LORAS = {
    "LoRA": {"r": 4, "lora_alpha": 8, "target_modules": ["speaker_embedder", "linear_q", *ATTENTION]},
    "LoRA of some layers": {"r": 3, "lora_alpha": 2, "target_modules": ["attn.to_v", "point_conv.conv"]},
    "LoRA of the feed-forward": {
        "r": 4,
        "use_rslora": True,
        "target_modules": ["inverted_conv.conv", "to_k"],
    },
    "two adapters": {
        "adapters": {
            "one": {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_out.0"]},
            "two": {"r": 2, "lora_alpha": 1, "target_modules": ["attn.to_q", "to_k"]},
        }
    },
    "DoRA": {"r": 4, "use_dora": True, "target_modules": ["attn.to_q", "cross_attn.to_q", "point_conv.conv"]},
}
# More frames than one run of the convolution and one chunk of the attention have, see `main`.
FRAMES = (18, 5)


def made_batch(frames: tuple[int, ...]) -> TrainingBatch:
    """Songs of different lengths, one without lyrics; what lies outside the masks is not zero."""
    songs, longest = len(frames), max(frames)

    def mask(*lengths: int) -> Tensor:
        return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]

    text_mask, lyric_mask = mask(*(5, 2, 3)[:songs]), mask(*(7, 0, 4)[:songs])
    return TrainingBatch(
        latents=torch.randn(songs, 8, 16, longest),
        noise=torch.randn(songs, 8, 16, longest),
        sigmas=torch.rand(songs),
        frame_mask=mask(*frames),
        text=torch.randn(*text_mask.shape, CONFIG.text_embedding_dim),
        text_mask=text_mask,
        speaker=torch.randn(songs, CONFIG.speaker_embedding_dim),
        lyric_ids=torch.randint(1, 30, lyric_mask.shape),
        lyric_mask=lyric_mask,
        lyric_start=1 + text_mask.sum(dim=1),
    )


def losses_and_gradients(model: nn.Module, batch: TrainingBatch) -> dict[str, Tensor]:
    model.zero_grad()
    losses = flow_matching_losses(model, batch).denoising
    losses.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": losses.detach(), **grads}


def largest_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Over all tensors, relative to each one's norm. Keys' biases move no softmax: their gradients are rounding."""
    assert found.keys() == wanted.keys()
    scale = max(value.norm() for value in wanted.values())
    return max(
        ((found[name] - value).norm() / value.norm().clamp(min=1e-3 * scale)).item()
        for name, value in wanted.items()
    )


def fused_error(
    lora: dict | None,
    frames: tuple[int, ...],
    *,
    layers: int = 1,
    checkpointing: float = 0.0,
    steps: int = 1,
) -> float:
    """Of losses and gradients, after some steps that change the LoRA."""
    torch.manual_seed(0)
    model = ACEStepTransformer(replace(CONFIG, num_layers=layers))
    if lora is not None:
        add_lora(model, lora)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.05)
    batch = made_batch(frames)
    wanted = []
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for is_fused in (False, True):
        model.load_state_dict(start)
        if is_fused:
            fuse(model, torch.float32)
            model.activation_checkpointing = checkpointing
        for _ in range(steps):
            result = losses_and_gradients(model, batch)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
        wanted.append(result)
    return largest_error(wanted[1], wanted[0])


def copies_error() -> float:
    """Of small matrices that one launch writes, scaled, into parts of larger ones, also transposed ones."""
    first, second, scales = torch.randn(3, 7), torch.randn(5, 2), torch.rand(5, 1) + 0.5
    places = torch.zeros(2, 20, 20)
    projection_kernels.CopyTable(
        [(first, places[0, 2:5, 4:11], 2.0, None), (second, places[1, 3:5, 2:7].t(), 0.5, scales)]
    ).run()
    wanted = torch.zeros_like(places)
    wanted[0, 2:5, 4:11] = 2 * first
    wanted[1, 3:5, 2:7] = (second / 2 / scales).t()
    return (places - wanted).abs().max().item()


def main() -> None:
    torch.set_num_threads(1)
    block_kernels._BACKWARD_RUN = 8
    linear_attention_kernels._CHUNK, linear_attention_kernels._ROWS = 16, 16
    tile = cross_attention_kernels.Tile(16, 16, 1, 1)
    cross_attention_kernels._TILES_32_BITS = cross_attention_kernels.Tiles(tile, tile, tile)
    errors = {name: fused_error(lora, (2, 1)) for name, lora in LORAS.items()}
    errors["all weights"] = fused_error(None, FRAMES, layers=2)
    errors["long songs"] = fused_error(LORAS["LoRA"], FRAMES, layers=2)
    errors["recomputed"] = fused_error(LORAS["LoRA"], (3,), layers=2, checkpointing=0.5)
    errors["second step"] = fused_error(LORAS["LoRA"], (2, 3), steps=2)
    errors["copies"] = copies_error()
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
