"""Operations of one pass of the transformer, from its sizes and the lengths of its songs.

Counted are matrix products with weights and with activations (attention), a multiply-add as two; element-wise work,
to which the depthwise convolutions of width 3 belong, is not (under 0.1 %).

For model FLOP utilisation (Chowdhery et al., 2022, Appendix B) only useful work counts: give each song's valid lengths,
without padding. Activations that are recomputed in the backward pass count once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from acestep_ray.models.transformer import PATCH_CHANNELS_PER_INPUT, TIMESTEP_CHANNELS
from acestep_ray.models.transformer_config import TransformerConfig


@dataclass(frozen=True)
class PassFlops:
    """Operations of a pass, by what they give."""

    forward: int
    activation_gradients: int
    """Of every product whose input depends on something trained: LoRA passes through frozen layers too."""
    weight_gradients: int
    """Of trained matrices."""

    @property
    def total(self) -> int:
        """Those of a training step."""
        return self.forward + self.activation_gradients + self.weight_gradients


@dataclass(frozen=True)
class Lengths:
    """Sums over the songs of a batch, of which every count is a linear function."""

    songs: int
    frames: int
    text_tokens: int
    lyric_tokens: int
    relative_positions: int
    """Of the lyric encoder: 2 L − 1 for L tokens."""
    cross_pairs: int
    """Pairs of a frame and a token of speaker, prompt and lyrics: W (1 + T + L)."""
    lyric_pairs: int
    """Pairs of lyric tokens: L²."""
    position_pairs: int
    """Pairs of a lyric token and a relative position: L (2 L − 1)."""

    @classmethod
    def of(cls, frames: Sequence[int], text_tokens: Sequence[int], lyric_tokens: Sequence[int]) -> Lengths:
        """From W, T and L of each song; a song without lyrics has L = 0."""
        positions = [max(2 * lyrics - 1, 0) for lyrics in lyric_tokens]
        return cls(
            songs=len(frames),
            frames=sum(frames),
            text_tokens=sum(text_tokens),
            lyric_tokens=sum(lyric_tokens),
            relative_positions=sum(positions),
            cross_pairs=sum(
                width * (1 + text + lyrics)
                for width, text, lyrics in zip(frames, text_tokens, lyric_tokens, strict=True)
            ),
            lyric_pairs=sum(lyrics**2 for lyrics in lyric_tokens),
            position_pairs=sum(lyrics * count for lyrics, count in zip(lyric_tokens, positions, strict=True)),
        )


@dataclass(frozen=True)
class Trained:
    """What is trained of a model."""

    parameters: frozenset[str] = frozenset()
    """Names of the model's own parameters."""
    adapters: Mapping[str, int] = field(default_factory=dict)
    """By the name of a linear layer, the rank of its LoRA adapter."""

    @classmethod
    def of(cls, model: nn.Module) -> Trained:
        """What has gradients in `model`, with adapters as PEFT puts them there; those of embeddings are left out."""
        parameters, adapters = set(), {}
        for name, parameter in model.named_parameters():
            layer, adapter, matrix = name.partition(".lora_")
            if matrix.startswith("A."):
                adapters[layer] = parameter.shape[0]
            elif parameter.requires_grad and not adapter:
                parameters.add(name)
        return cls(frozenset(parameters), adapters)


def model_flops(
    config: TransformerConfig, lengths: Lengths, *, with_ssl: bool, trained: Trained
) -> PassFlops:
    """Operations of one pass over songs of `lengths`, `with_ssl` with the SSL projectors.

    Gradients go back as far as something is trained, and no further. The relative positions of each song are projected
    on their own, as the lyric encoder's dropout on them demands.
    """
    count = _Count(trained)
    dim = config.inner_dim
    linear, songs, frames = count.linear, lengths.songs, lengths.frames

    time = linear("timestep_embedder.linear_1", songs, TIMESTEP_CHANNELS, dim, False)
    time = linear("timestep_embedder.linear_2", songs, dim, dim, time)
    block_time = linear("t_block.1", songs, dim, 6 * dim, time)

    speaker = linear("speaker_embedder", songs, config.speaker_embedding_dim, dim, False)
    text = linear("genre_embedder", lengths.text_tokens, config.text_embedding_dim, dim, False)
    lyrics = _lyric_encoder(count, config, lengths)
    lyrics = linear("lyric_proj", lengths.lyric_tokens, config.lyric_hidden_size, dim, lyrics)
    condition = speaker or text or lyrics

    channels = config.in_channels * PATCH_CHANNELS_PER_INPUT
    patch = config.in_channels * config.patch_size[0]
    x = linear("proj_in.early_conv_layers.0", frames, patch, channels, False)
    x = count.depends("proj_in.early_conv_layers.1", x)
    x = linear("proj_in.early_conv_layers.2", frames, channels, dim, x)
    after_block = []
    for depth in range(config.num_layers):
        x = _block(count, f"transformer_blocks.{depth}", config, lengths, x, block_time, condition)
        after_block.append(x)

    if with_ssl:
        widths_at_depths = zip(config.ssl_latent_dims, config.ssl_encoder_depths, strict=True)
        for i, (width, depth) in enumerate(widths_at_depths):
            y = linear(f"projectors.{i}.0", frames, dim, 2 * dim, after_block[depth])
            y = linear(f"projectors.{i}.2", frames, 2 * dim, 2 * dim, y)
            linear(f"projectors.{i}.4", frames, 2 * dim, width, y)
    x = count.depends("final_layer.scale_shift_table", x)
    linear("final_layer.linear", frames, dim, config.patch_size[0] * config.out_channels, x)
    return PassFlops(count.forward, count.activation_gradients, count.weight_gradients)


class _Count:
    """Adds up the products of a pass, told in the order of the forward pass.

    An activation is known by one bool: whether it depends on something trained, and so has a gradient.
    """

    def __init__(self, trained: Trained):
        self.parameters, self.adapters = trained.parameters, trained.adapters
        self.modules = {name.rpartition(".")[0] for name in trained.parameters}
        self.forward = self.activation_gradients = self.weight_gradients = 0

    def linear(self, name: str, rows: int, inputs: int, outputs: int, x: bool) -> bool:
        """The layer `name` with its adapter, over `rows` of the activation `x`; returns its output."""
        self._product(rows * inputs * outputs, x, f"{name}.weight" in self.parameters)
        rank = self.adapters.get(name)
        if rank is None:
            return self.depends(name, x)
        self._product(rows * inputs * rank, x, True)
        self._product(rows * rank * outputs, True, True)
        return True

    def depends(self, name: str, x: bool) -> bool:
        """The activation `x` behind element-wise work with the parameter, or with those of the module, `name`."""
        return x or name in self.parameters or name in self.modules

    def attention(self, multiply_adds: int, left: bool, right: bool) -> bool:
        """The product of two activations."""
        self.forward += 2 * multiply_adds
        self.activation_gradients += 2 * multiply_adds * (left + right)
        return left or right

    def _product(self, multiply_adds: int, x: bool, is_trained: bool) -> None:
        self.forward += 2 * multiply_adds
        self.activation_gradients += 2 * multiply_adds * x
        self.weight_gradients += 2 * multiply_adds * is_trained


def _block(
    count: _Count,
    name: str,
    config: TransformerConfig,
    lengths: Lengths,
    x: bool,
    time: bool,
    condition: bool,
) -> bool:
    """`TransformerBlock`. Linear attention grows as the frames, cross-attention as frames times tokens."""
    dim, frames, linear = config.inner_dim, lengths.frames, count.linear
    tokens = lengths.songs + lengths.text_tokens + lengths.lyric_tokens

    # Modulated and gated: whatever the timestep depends on, the stream does.
    x = count.depends(f"{name}.scale_shift_table", x or time)
    q, k, v = (linear(f"{name}.attn.to_{part}", frames, dim, dim, x) for part in ("q", "k", "v"))
    key_values = count.attention(frames * dim * config.attention_head_dim, k, v)
    attended = count.attention(frames * dim * config.attention_head_dim, q, key_values)
    count.attention(frames * dim, q, k)  # what it is divided by
    x = linear(f"{name}.attn.to_out.0", frames, dim, dim, attended) or x

    q = linear(f"{name}.cross_attn.to_q", frames, dim, dim, x)
    k, v = (linear(f"{name}.cross_attn.to_{part}", tokens, dim, dim, condition) for part in ("k", "v"))
    weights = count.attention(lengths.cross_pairs * dim, q, k)
    attended = count.attention(lengths.cross_pairs * dim, weights, v)
    x = linear(f"{name}.cross_attn.to_out.0", frames, dim, dim, attended) or x

    hidden = int(dim * config.mlp_ratio)
    y = linear(f"{name}.ff.inverted_conv.conv", frames, dim, 2 * hidden, x)
    y = count.depends(f"{name}.ff.depth_conv.conv", y)
    return linear(f"{name}.ff.point_conv.conv", frames, hidden, dim, y) or x


def _lyric_encoder(count: _Count, config: TransformerConfig, lengths: Lengths) -> bool:
    """`LyricEncoder` behind the embedding of its tokens, whose look-up is no product."""
    width, hidden = config.lyric_hidden_size, config.lyric_encoder.linear_units
    tokens, linear, depends = lengths.lyric_tokens, count.linear, count.depends
    x = linear("lyric_encoder.embed.out.0", tokens, width, width, depends("lyric_embs", False))
    x = depends("lyric_encoder.embed.out.1", x)
    for i in range(config.lyric_encoder.num_blocks):
        layer = f"lyric_encoder.encoders.{i}"
        name = f"{layer}.self_attn"
        y = depends(f"{layer}.norm_mha", x)
        q, k, v = (linear(f"{name}.linear_{part}", tokens, width, width, y) for part in ("q", "k", "v"))
        p = linear(f"{name}.linear_pos", lengths.relative_positions, width, width, False)
        by_content = count.attention(lengths.lyric_pairs * width, depends(f"{name}.pos_bias_u", q), k)
        by_position = count.attention(lengths.position_pairs * width, depends(f"{name}.pos_bias_v", q), p)
        attended = count.attention(lengths.lyric_pairs * width, by_content or by_position, v)
        x = linear(f"{name}.linear_out", tokens, width, width, attended) or x
        y = depends(f"{layer}.norm_ff", x)
        y = linear(f"{layer}.feed_forward.w_1", tokens, width, hidden, y)
        x = linear(f"{layer}.feed_forward.w_2", tokens, hidden, width, y) or x
    return depends("lyric_encoder.after_norm", x)
