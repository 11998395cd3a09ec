"""Counted operations are those that torch counts while the model runs."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from acestep_ray.models.flops import Lengths, Trained, model_flops
from acestep_ray.models.lyric_encoder import LyricEncoderConfig
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.models.transformer_config import TransformerConfig
from acestep_ray.training.lora import add_lora
from acestep_ray.training.lora_config import DEFAULT_LORA

CONFIG = TransformerConfig(
    num_layers=3,
    inner_dim=32,
    attention_head_dim=16,
    num_attention_heads=2,
    speaker_embedding_dim=16,
    text_embedding_dim=24,
    ssl_encoder_depths=(1, 0),
    ssl_latent_dims=(20, 12),
    lyric_encoder_vocab_size=64,
    lyric_hidden_size=40,
    lyric_encoder=LyricEncoderConfig(attention_heads=4, linear_units=72, num_blocks=2),
)
WIDER = replace(
    CONFIG, num_layers=2, inner_dim=96, attention_head_dim=24, num_attention_heads=4, mlp_ratio=1.5
)

# songs, frames, text tokens, lyric tokens
SIZES = [(1, 9, 1, 1), (2, 33, 7, 12), (3, 5, 4, 20)]
TARGETS = {
    "default": DEFAULT_LORA["target_modules"],
    "feed-forward": ["w_1", "w_2", "inverted_conv.conv", "point_conv.conv", "linear_pos", "genre_embedder"],
    "time": ["timestep_embedder.linear_1", "t_block.1"],
    "one layer": ["transformer_blocks.1.attn.to_v"],
    "the last layer": ["final_layer.linear"],
}
PARTS = [
    "transformer_blocks.*.attn.*",
    "transformer_blocks.*.bias",
    "speaker_embedder.*",
    "genre_embedder.*",
    "lyric_encoder.*.norm_mha.*",
    "lyric_encoder.encoders.1.norm_ff.*",
    "lyric_encoder.after_norm.*",
    "lyric_embs.*",
    "lyric_encoder.*.1.*",
    "*.pos_bias_u",
    "*.pos_bias_v",
    "proj_in.early_conv_layers.1.*",
    "transformer_blocks.1.scale_shift_table",
    "final_layer.scale_shift_table",
    "timestep_embedder.*",
    "transformer_blocks.2.ff.depth_conv.*",
    "projectors.*",
]


def batch(
    config: TransformerConfig, songs: int, frames: int, text: int, lyrics: int
) -> dict[str, torch.Tensor]:
    return {
        "latents": torch.randn(songs, 8, 16, frames),
        "timesteps": torch.linspace(1, 1000, songs),
        "text": torch.randn(songs, text, config.text_embedding_dim),
        "text_mask": torch.ones(songs, text).bool(),
        "speaker": torch.randn(songs, config.speaker_embedding_dim),
        "lyric_ids": torch.ones(songs, lyrics).long(),
        "lyric_mask": torch.ones(songs, lyrics).bool(),
        "dropout_seeds": torch.arange(songs),
    }


def equal_songs(songs: int, frames: int, text: int, lyrics: int) -> Lengths:
    return Lengths.of([frames] * songs, [text] * songs, [lyrics] * songs)


def torch_counts(model: ACEStepTransformer, sizes: tuple[int, ...], *, with_ssl: bool) -> tuple[int, int]:
    """Operations of a forward and of a backward pass, attention as the plain products that it is."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            output = model(**batch(model.config, *sizes), with_ssl=with_ssl)
        loss = output.velocity.sum() + sum(y.sum() for y in output.ssl_projections.values())
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def check_against_torch(model: ACEStepTransformer, sizes: tuple[int, ...], *, with_ssl: bool) -> None:
    forward, backward = torch_counts(model, sizes, with_ssl=with_ssl)
    flops = model_flops(model.config, equal_songs(*sizes), with_ssl=with_ssl, trained=Trained.of(model))
    assert flops.forward == forward
    assert flops.activation_gradients + flops.weight_gradients == backward
    assert flops.total == forward + backward


@pytest.mark.parametrize("with_ssl", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("config", [CONFIG, WIDER], ids=["narrow", "wide"])
def test_the_operations_of_full_training_are_those_that_torch_counts(config, sizes, with_ssl):
    check_against_torch(ACEStepTransformer(config), sizes, with_ssl=with_ssl)


@pytest.mark.parametrize("with_ssl", [False, True])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_the_operations_of_lora_are_those_that_torch_counts(targets, with_ssl):
    model = ACEStepTransformer(CONFIG)
    add_lora(model, {"r": 3, "target_modules": targets, "rank_pattern": {targets[0]: 5}})
    check_against_torch(model, SIZES[1], with_ssl=with_ssl)


@pytest.mark.parametrize("trained", PARTS)
def test_the_operations_of_training_a_part_are_those_that_torch_counts(trained):
    model = ACEStepTransformer(CONFIG)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(fnmatchcase(name, trained))
    check_against_torch(model, SIZES[1], with_ssl=True)


@pytest.fixture(scope="module")
def everything() -> Trained:
    return Trained.of(ACEStepTransformer(CONFIG))


def test_a_batch_takes_the_operations_of_its_songs_alone(everything):
    songs = [(9, 3, 0), (24, 7, 12), (17, 1, 5)]
    together = model_flops(CONFIG, Lengths.of(*zip(*songs, strict=True)), with_ssl=True, trained=everything)
    alone = [model_flops(CONFIG, equal_songs(1, *song), with_ssl=True, trained=everything) for song in songs]
    assert together.total == sum(flops.total for flops in alone)


def test_operations_grow_linearly_with_the_frames(everything):
    totals = [
        model_flops(CONFIG, equal_songs(1, frames, 5, 20), with_ssl=True, trained=everything).total
        for frames in (100, 200, 300)
    ]
    assert totals[2] - totals[1] == totals[1] - totals[0] > 0


def test_a_song_without_lyrics_takes_nothing_of_the_lyric_encoder(everything):
    large = replace(CONFIG, lyric_encoder=LyricEncoderConfig(linear_units=4096, num_blocks=6))
    flops = [
        model_flops(config, equal_songs(2, 30, 5, 0), with_ssl=False, trained=everything)
        for config in (CONFIG, large)
    ]
    assert flops[0] == flops[1]


def test_where_nothing_is_trained_there_is_only_the_forward_pass(everything):
    arguments = {"config": CONFIG, "lengths": equal_songs(2, 30, 5, 20), "with_ssl": True}
    flops = model_flops(**arguments, trained=Trained.of(ACEStepTransformer(CONFIG).requires_grad_(False)))
    assert flops.total == flops.forward == model_flops(**arguments, trained=everything).forward


def test_lora_on_the_released_model_takes_23_teraflop_for_a_song_of_240_seconds():
    layers = [f"{kind}.to_{part}" for kind in ("attn", "cross_attn") for part in ("q", "k", "v", "out.0")]
    adapters = {f"transformer_blocks.{block}.{layer}": 16 for block in range(24) for layer in layers}
    flops = model_flops(
        TransformerConfig(),
        Lengths.of([2584], [50], [100]),
        with_ssl=False,
        trained=Trained(adapters=adapters),
    )
    assert flops.forward + flops.activation_gradients == pytest.approx(23e12, rel=0.15)
    assert flops.weight_gradients < 0.02 * flops.forward
