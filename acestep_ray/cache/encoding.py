"""Decoded songs → columns of the cache's rows, by the frozen models. No Ray.

A song that cannot be encoded becomes a `Reject` with its reason. A fault that is not the song's is raised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from acestep_ray.cache.schema import array_to_bytes, quantise_directions
from acestep_ray.cache.songs import (
    DecodedSong,
    Recipe,
    Reject,
    Song,
    build_row,
    encode_lyrics,
    first_line,
)
from acestep_ray.data.prompts import PromptVariant, prompt_variants
from acestep_ray.data.schema import RejectReason

if TYPE_CHECKING:
    from acestep_ray.data.lyrics import LyricTokenizer
    from acestep_ray.models.checkpoint import CheckpointDir
    from acestep_ray.models.codec import MusicCodec
    from acestep_ray.models.ssl import SSLEncoder
    from acestep_ray.models.text_encoder import TextEncoder

_PROMPTS_PER_PASS = 64


class Encoder:
    """The frozen models, or some of them, which turn decoded songs into columns of the cache's rows."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        codec: MusicCodec | None = None,
        text_encoder: TextEncoder | None = None,
        lyric_tokenizer: LyricTokenizer | None = None,
        ssl_encoders: Mapping[str, SSLEncoder] | None = None,
        device: str = "cpu",
    ):
        """Models that are None are another encoder's part; `text_encoder` and `lyric_tokenizer` go together."""
        self.recipe = recipe
        self.codec = codec
        self.text_encoder = text_encoder
        self.lyric_tokenizer = lyric_tokenizer
        self.ssl_encoders = ssl_encoders
        self.device = device

    @classmethod
    def load(
        cls, checkpoint: CheckpointDir, recipe: Recipe, device: str, features: Sequence[str] | None = None
    ) -> Encoder:
        """The encoders of these groups of features on `device`, by default all that the recipe asks for.

        Raises InputError where a part of the checkpoint is broken.
        """
        features = recipe.settings.features if features is None else features
        precision = recipe.settings.precision
        models: dict[str, Any] = {}
        if "latents" in features:
            models["codec"] = checkpoint.load_codec(device, precision=precision)
        if "text" in features:
            # Imported here: the workers that only decode need no lyric front end.
            from acestep_ray.data.lyrics import LyricTokenizer

            models["text_encoder"] = checkpoint.load_text_encoder(device, precision=precision)
            models["lyric_tokenizer"] = LyricTokenizer.from_file(checkpoint.lyric_vocab_path())
        if "ssl" in features:
            models["ssl_encoders"] = checkpoint.load_ssl_encoders(device, precision=precision)
        return cls(recipe, **models, device=device)

    def encode(self, songs: Sequence[DecodedSong]) -> list[dict[str, Any] | Reject]:
        """For each song the columns of `SAMPLE_SCHEMA` that these models give, or why it cannot be used.

        Songs go through a GPU together; one that fails costs itself, not the others, and where the memory is too
        small for all, they go by halves. On a CPU each goes alone: that is as fast, and a row's last bit then does
        not depend on its neighbours.

        Raises what the models raise when the machine or the program is to blame rather than a song.
        """
        outcomes: dict[int, dict[str, Any] | Reject] = {}
        for i, decoded in enumerate(songs):
            outcomes[i] = {}
            if self.lyric_tokenizer is not None:
                outcomes[i] = encode_lyrics(decoded, self.lyric_tokenizer, self.recipe)
        usable = [i for i, outcome in outcomes.items() if not isinstance(outcome, Reject)]
        per_pass = 1 if self.device == "cpu" else max(1, len(usable))
        for start in range(0, len(usable), per_pass):
            batch = usable[start : start + per_pass]
            for i, features in zip(batch, self._encode_together([songs[i] for i in batch]), strict=True):
                outcomes[i] = features if isinstance(features, Reject) else {**outcomes[i], **features}
        return [outcomes[i] for i in range(len(songs))]

    def encode_song(self, decoded: DecodedSong) -> pa.Table | Reject:
        """One song's row, if this encoder has all the models of the recipe."""
        (columns,) = self.encode([decoded])
        return columns if isinstance(columns, Reject) else build_row(decoded, columns, self.recipe)

    def _encode_together(self, songs: Sequence[DecodedSong]) -> list[dict[str, Any] | Reject]:
        try:
            features = self._features(
                [decoded.wave for decoded in songs], [self._prompts(d.song) for d in songs]
            )
        except torch.OutOfMemoryError:
            if len(songs) == 1:
                raise
            torch.cuda.empty_cache()
            half = len(songs) // 2
            return [*self._encode_together(songs[:half]), *self._encode_together(songs[half:])]
        except RuntimeError as error:
            if len(songs) > 1:
                return [outcome for decoded in songs for outcome in self._encode_together([decoded])]
            # The song is to blame only if noise of the same length passes.
            noise = np.random.default_rng(0).uniform(-0.5, 0.5, songs[0].wave.shape).astype(np.float32)
            self._features([noise], [[PromptVariant("tags", "music")]])
            message = f"{type(error).__name__}: {first_line(error)}"
            return [songs[0].reject(self.recipe, RejectReason.ENCODER, message)]
        return [
            self._columns(song_features)
            if _are_finite(song_features)
            else decoded.reject(
                self.recipe, RejectReason.ENCODER, "an encoder gave values that are not finite"
            )
            for decoded, song_features in zip(songs, features, strict=True)
        ]

    def _prompts(self, song: Song) -> list[PromptVariant]:
        settings = self.recipe.settings
        return prompt_variants(
            song.tags, song.recaption, key=song.key, shuffles=settings.tag_shuffles, seed=settings.seed
        )

    @torch.inference_mode()
    def _features(
        self, waves: Sequence[np.ndarray], prompts: Sequence[Sequence[PromptVariant]]
    ) -> list[dict[str, Any]]:
        """Of each song: latents float16 (8, 16, W), prompts with a float16 (T, D) each, float (F, dim) by SSL model."""
        features: list[dict[str, Any]] = [{} for _ in waves]
        if self.codec is not None or self.ssl_encoders is not None:
            lengths = torch.tensor([wave.shape[1] for wave in waves])
            audio = self._upload(waves, int(lengths.max()))
            if self.codec is not None:
                latents, frames = self.codec.encode(audio, lengths)
                for song, song_latents, n in zip(features, latents, frames.tolist(), strict=True):
                    song["latents"] = _half(song_latents[..., :n])
            for name, encoder in (self.ssl_encoders or {}).items():
                songs = [wave[:, :n] for wave, n in zip(audio, lengths.tolist(), strict=True)]
                for song, directions in zip(features, encoder.encode_batch(songs), strict=True):
                    song.setdefault("ssl", {})[name] = directions.float().cpu().numpy()
        if self.text_encoder is not None:
            for song, song_prompts, embeddings in zip(features, prompts, self._embed(prompts), strict=True):
                song["prompts"], song["text_embeddings"] = song_prompts, embeddings
        return features

    def _upload(self, waves: Sequence[np.ndarray], samples: int) -> torch.Tensor:
        """Waves padded to (B, 2, samples) on the device."""
        # What lies in another process's memory is read-only and not pinned.
        host = torch.zeros(len(waves), 2, samples, pin_memory=self.device != "cpu")
        for row, wave in zip(host, waves, strict=True):
            row.numpy()[:, : wave.shape[1]] = wave
        return host.to(self.device, non_blocking=True)

    def _embed(self, prompts: Sequence[Sequence[PromptVariant]]) -> list[list[np.ndarray]]:
        texts = [prompt.text for song in prompts for prompt in song]
        embeddings: list[np.ndarray] = []
        for start in range(0, len(texts), _PROMPTS_PER_PASS):
            hidden, mask = self.text_encoder.encode(texts[start : start + _PROMPTS_PER_PASS])
            tokens = mask.sum(dim=1).int().tolist()
            embeddings += [_half(prompt[:n]) for prompt, n in zip(hidden, tokens, strict=True)]
        remaining = iter(embeddings)
        return [[next(remaining) for _ in song] for song in prompts]

    def _columns(self, features: dict[str, Any]) -> dict[str, Any]:
        """Features as values of `SAMPLE_SCHEMA`."""
        columns: dict[str, Any] = {}
        if "latents" in features:
            columns["latents"] = array_to_bytes(features["latents"])
            columns["latent_frames"] = features["latents"].shape[-1]
        if "text_embeddings" in features:
            columns["prompts"] = [asdict(prompt) for prompt in features["prompts"]]
            columns["text_embeddings"] = [
                array_to_bytes(embedding) for embedding in features["text_embeddings"]
            ]
            columns["text_dim"] = features["text_embeddings"][0].shape[1]
        if "ssl" in features:
            columns["ssl"] = [self._ssl_entry(name, array) for name, array in features["ssl"].items()]
        return columns

    def _ssl_entry(self, name: str, features: np.ndarray) -> dict[str, Any]:
        kept = features[:: self.recipe.settings.ssl_frame_stride]
        return {
            "name": name,
            "frames": len(features),
            "dim": features.shape[1],
            "directions": array_to_bytes(quantise_directions(kept)),
        }


def _are_finite(features: Mapping[str, Any]) -> bool:
    arrays = [
        features.get("latents"),
        *features.get("text_embeddings", ()),
        *features.get("ssl", {}).values(),
    ]
    return all(array is None or np.isfinite(array).all() for array in arrays)


def _half(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float16).cpu().numpy()
