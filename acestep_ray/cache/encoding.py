"""Decoded songs → columns of the cache's rows, by the frozen models. No Ray.

A song that cannot be encoded becomes a `Reject` with its reason. A fault that is not the song's is raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from acestep_ray.cache.schema import array_to_bytes
from acestep_ray.cache.songs import (
    DecodedSong,
    Recipe,
    Reject,
    Song,
    encode_lyrics,
    first_line,
)
from acestep_ray.data.prompts import PromptVariant, prompt_variants
from acestep_ray.data.schema import RejectReason
from acestep_ray.device import read_back, wait_for

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
        lyrics: dict[int, dict[str, Any]] = {}
        for i, decoded in enumerate(songs):
            tokenizer = self.lyric_tokenizer
            found = {} if tokenizer is None else encode_lyrics(decoded, tokenizer, self.recipe)
            if isinstance(found, Reject):
                outcomes[i] = found
            else:
                lyrics[i] = found
        usable = list(lyrics)
        per_pass = 1 if self.device == "cpu" else max(1, len(usable))
        for start in range(0, len(usable), per_pass):
            batch = usable[start : start + per_pass]
            for i, features in zip(batch, self._encode_together([songs[i] for i in batch]), strict=True):
                outcomes[i] = features if isinstance(features, Reject) else {**lyrics[i], **features}
        return [outcomes[i] for i in range(len(songs))]

    def _encode_together(self, songs: Sequence[DecodedSong]) -> list[dict[str, Any] | Reject]:
        waves, prompts = [song.wave for song in songs], [self._prompts(song.song) for song in songs]
        try:
            features = self._features(waves, prompts)
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
        columns = [song.columns(its_prompts) for song, its_prompts in zip(features, prompts, strict=True)]
        return [
            decoded.reject(self.recipe, RejectReason.ENCODER, "an encoder gave values that are not finite")
            if song_columns is None
            else song_columns
            for decoded, song_columns in zip(songs, columns, strict=True)
        ]

    def _prompts(self, song: Song) -> list[PromptVariant]:
        settings = self.recipe.settings
        return prompt_variants(
            song.tags, song.recaption, key=song.key, shuffles=settings.tag_shuffles, seed=settings.seed
        )

    @torch.inference_mode()
    def _features(
        self, waves: Sequence[np.ndarray], prompts: Sequence[Sequence[PromptVariant]]
    ) -> list[_Features]:
        """Of each song, in this process's memory.

        What waits for the device comes late: the prompts' lengths, the codec, which may have to go back to float32, and
        reading all of it.
        """
        features = [_Features() for _ in waves]
        stride = self.recipe.settings.ssl_frame_stride
        audio, lengths = torch.empty(0), torch.tensor([wave.shape[1] for wave in waves])
        if self.codec is not None or self.ssl_encoders is not None:
            audio = self._upload(waves, int(lengths.max()))
        for name, encoder in (self.ssl_encoders or {}).items():
            songs = [wave[:, :n] for wave, n in zip(audio, lengths.tolist(), strict=True)]
            for song, directions in zip(features, encoder.encode_batch(songs), strict=True):
                song.ssl_frames[name] = len(directions)
                song.ssl[name] = quantise_directions(directions[::stride])
                song.is_finite.append(torch.isfinite(directions).all())
        if self.text_encoder is not None:
            for song, embeddings in zip(features, _embed(prompts, self.text_encoder), strict=True):
                song.texts = embeddings
                song.is_finite += [torch.isfinite(embedding).all() for embedding in embeddings]
        if self.codec is not None:
            latents, frames = self.codec.encode(audio, lengths)
            for song, song_latents, n in zip(features, latents, frames.tolist(), strict=True):
                song.latents = song_latents[..., :n].half()
                song.is_finite.append(torch.isfinite(song.latents).all())
        here = iter(read_back([tensor for song in features for tensor in song.tensors()]))
        for song in features:
            song.take(here)
        return features

    def _upload(self, waves: Sequence[np.ndarray], samples: int) -> torch.Tensor:
        """Waves padded to (B, 2, samples) on the device."""
        # What lies in another process's memory is read-only and not pinned.
        host = torch.empty(len(waves), 2, samples, pin_memory=self.device != "cpu")
        for row, wave in zip(host.numpy(), waves, strict=True):
            row[:, : wave.shape[1]] = wave
            row[:, wave.shape[1] :] = 0
        return host.to(self.device, non_blocking=True)


@dataclass
class _Features:
    """What the models make of a song; models that are another encoder's part leave theirs empty."""

    latents: torch.Tensor | None = None
    """float16 (8, 16, W)."""
    texts: list[torch.Tensor] = field(default_factory=list)
    """By prompt, float16 (T, D)."""
    ssl: dict[str, torch.Tensor] = field(default_factory=dict)
    """By model, int8 (frames that are kept, dim)."""
    ssl_frames: dict[str, int] = field(default_factory=dict)
    """By model, how many it gave."""
    is_finite: list[torch.Tensor] = field(default_factory=list)
    """Bools () of what the models gave."""

    def tensors(self) -> list[torch.Tensor]:
        """All of them, in the order in which `take` takes them."""
        latents = [] if self.latents is None else [self.latents]
        return [*latents, *self.texts, *self.ssl.values(), *self.is_finite]

    def take(self, tensors: Iterator[torch.Tensor]) -> None:
        """Others in their places."""
        self.latents = None if self.latents is None else next(tensors)
        self.texts = [next(tensors) for _ in self.texts]
        self.ssl = {name: next(tensors) for name in self.ssl}
        self.is_finite = [next(tensors) for _ in self.is_finite]

    def columns(self, prompts: Sequence[PromptVariant]) -> dict[str, Any] | None:
        """As values of `SAMPLE_SCHEMA`, or None where one is not finite."""
        if not all(self.is_finite):
            return None
        columns: dict[str, Any] = {}
        if self.latents is not None:
            columns["latents"] = _to_bytes(self.latents)
            columns["latent_frames"] = self.latents.shape[-1]
        if self.texts:
            columns["prompts"] = [asdict(prompt) for prompt in prompts]
            columns["text_embeddings"] = [_to_bytes(embedding) for embedding in self.texts]
            columns["text_dim"] = self.texts[0].shape[1]
        if self.ssl:
            columns["ssl"] = [
                {
                    "name": name,
                    "frames": self.ssl_frames[name],
                    "dim": directions.shape[1],
                    "directions": _to_bytes(directions),
                }
                for name, directions in self.ssl.items()
            ]
        return columns


def quantise_directions(features: torch.Tensor) -> torch.Tensor:
    """Features (frames, dim), float32 → int8 of the same shape: each frame scaled so that its largest component is 127.

    The loss is 1 − cosine, which no scale changes. A frame of zeros stays zeros. Computed where the features are: a
    song's are 110 MB, what is left of them 7.
    """
    largest = features.abs().amax(dim=1, keepdim=True)
    # Divided before multiplied: 127 / tiny would overflow.
    return (features / torch.where(largest > 0, largest, 1) * 127).round().to(torch.int8)


def _embed(prompts: Sequence[Sequence[PromptVariant]], text_encoder: TextEncoder) -> list[list[torch.Tensor]]:
    """A float16 (tokens, text_dim) for each prompt of each song."""
    texts = [prompt.text for song in prompts for prompt in song]
    embeddings: list[torch.Tensor] = []
    for start in range(0, len(texts), _PROMPTS_PER_PASS):
        hidden, mask = text_encoder.encode(texts[start : start + _PROMPTS_PER_PASS])
        wait_for(mask.device)
        tokens = mask.sum(dim=1).int().tolist()
        embeddings += [prompt[:n].half() for prompt, n in zip(hidden, tokens, strict=True)]
    remaining = iter(embeddings)
    return [[next(remaining) for _ in song] for song in prompts]


def _to_bytes(tensor: torch.Tensor) -> bytes:
    return array_to_bytes(tensor.numpy())
