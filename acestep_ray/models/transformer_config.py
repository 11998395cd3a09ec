"""Sizes of the diffusion transformer: the released `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from acestep_ray.models.lyric_encoder import LyricEncoderConfig


@dataclass(frozen=True)
class TransformerConfig:
    """The released `config.json`, field for field; `lyric_encoder` is ours, for models of other sizes."""

    in_channels: int = 8
    num_layers: int = 24
    inner_dim: int = 2560
    attention_head_dim: int = 128
    num_attention_heads: int = 20
    mlp_ratio: float = 2.5
    out_channels: int = 8
    max_position: int = 32768
    rope_theta: float = 1_000_000.0
    speaker_embedding_dim: int = 512
    text_embedding_dim: int = 768
    ssl_encoder_depths: tuple[int, ...] = (8, 8)
    ssl_names: tuple[str, ...] = ("mert", "m-hubert")
    ssl_latent_dims: tuple[int, ...] = (1024, 768)
    lyric_encoder_vocab_size: int = 6693
    lyric_hidden_size: int = 1024
    patch_size: tuple[int, int] = (16, 1)
    max_height: int = 16
    max_width: int = 4096
    lyric_encoder: LyricEncoderConfig = field(default_factory=LyricEncoderConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TransformerConfig:
        """Read a `config.json`; entries that diffusers adds (`_class_name`, …) are left aside.

        Raises ValueError for sizes that do not fit each other.
        """
        known = {f.name for f in fields(cls)}
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if key in known and value is not None
        }
        given["lyric_encoder"] = LyricEncoderConfig(**values.get("lyric_encoder") or {})
        config = cls(**given)
        config.check()
        return config

    def to_dict(self) -> dict[str, Any]:
        """The same as a dict for `config.json`."""
        return asdict(self)

    def check(self) -> None:
        """Raise ValueError when sizes contradict each other."""
        if self.inner_dim != self.num_attention_heads * self.attention_head_dim:
            raise ValueError(
                f"inner_dim {self.inner_dim} is not num_attention_heads {self.num_attention_heads} "
                f"× attention_head_dim {self.attention_head_dim}"
            )
        if self.patch_size[0] != self.max_height or self.patch_size[1] != 1:
            raise ValueError(
                f"patch_size {self.patch_size}: a patch is one frame of full height {self.max_height}"
            )
        if self.lyric_hidden_size % self.lyric_encoder.attention_heads:
            raise ValueError(
                f"lyric_hidden_size {self.lyric_hidden_size} does not divide into "
                f"{self.lyric_encoder.attention_heads} heads"
            )
        lengths = {len(self.ssl_names), len(self.ssl_latent_dims), len(self.ssl_encoder_depths)}
        if len(lengths) != 1:
            raise ValueError("ssl_names, ssl_latent_dims and ssl_encoder_depths have different lengths")
        if any(depth >= self.num_layers for depth in self.ssl_encoder_depths):
            raise ValueError(
                f"ssl_encoder_depths {self.ssl_encoder_depths}: there are {self.num_layers} layers"
            )
