"""What happens to one song on its way into the cache: decoded, encoded, made into a row. Plain Python, no Ray.

A song that cannot be used becomes a `Reject` with its reason. A fault that is not the song's is raised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from acestep_ray.cache.schema import (
    FORMAT_VERSION,
    SAMPLE_SCHEMA,
    hash_of,
    quantise_directions,
)
from acestep_ray.data.audio import (
    AudioError,
    audio_sha256,
    decode_window,
    silent_fraction,
    to_training_audio,
)
from acestep_ray.data.prompts import PromptVariant, prompt_variants
from acestep_ray.data.schema import RejectReason, resolve_audio_path, row_recaption, row_tags, row_text
from acestep_ray.data.speaker import SpeakerEmbeddingError, load_speaker_embedding
from acestep_ray.errors import InputError

if TYPE_CHECKING:
    from acestep_ray.data.lyrics import LyricTokenizer
    from acestep_ray.models.checkpoint import CheckpointDir
    from acestep_ray.models.codec import MusicCodec
    from acestep_ray.models.ssl import SSLEncoder
    from acestep_ray.models.text_encoder import TextEncoder

MAX_SILENT_FRACTION = 0.95


@dataclass(frozen=True)
class Song:
    """A dataset row, its optional columns filled in."""

    key: str
    filename: str
    tags: list[str]
    recaption: dict[str, str]
    lyrics: str
    language: str
    speaker_path: str

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Song:
        return cls(
            key=row["keys"],
            filename=row["filename"],
            tags=row_tags(row),
            recaption=row_recaption(row),
            lyrics=row_text(row, "norm_lyrics"),
            language=row_text(row, "language"),
            speaker_path=row_text(row, "speaker_emb_path"),
        )


@dataclass(frozen=True)
class Settings:
    """The settings that decide what a row holds, so that a change of any makes every row stale."""

    max_duration: float
    tag_shuffles: int
    ssl_frame_stride: int
    seed: int
    speaker_dim: int


@dataclass(frozen=True)
class Recipe:
    """All that a row is made from besides its song."""

    settings: Settings
    models: dict[str, str]
    """Fingerprint of each model that takes part, and of the lyric vocabulary."""

    def row_fingerprint(self, song: Song, audio_sha256: str, speaker_sha256: str | None) -> str:
        """Identity of a row (hex): equal for equal audio bytes, text, speaker bytes, settings, models and format.

        Where the files lie is no part of it. The key is: it chooses the orders of the tags.
        """
        text = [song.key, song.tags, song.recaption, song.lyrics, song.language]
        made_from = [FORMAT_VERSION, MAX_SILENT_FRACTION, asdict(self.settings), self.models]
        return hash_of(made_from, text, audio_sha256, speaker_sha256)


@dataclass(frozen=True)
class Reject:
    """A song that cannot be used, and why."""

    key: str
    filename: str
    stage: str
    reason: str
    message: str

    @classmethod
    def of(cls, song: Song, reason: RejectReason, message: str) -> Reject:
        return cls(song.key, song.filename, reason.stage, reason.value, message)


@dataclass(frozen=True)
class DecodedSong:
    """A song ready for the encoders."""

    song: Song
    audio_sha256: str
    speaker_sha256: str | None
    duration_seconds: float
    """Seconds of audio, padding excluded."""
    wave: np.ndarray
    """float32 (2, n) at 48 kHz."""
    speaker: np.ndarray | None
    """float32 (speaker_dim,)."""


def files_unchanged(dataset_dir: str, song: Song, audio_hash: str, speaker_hash: str | None) -> bool:
    """Whether the song's files still hold the bytes with these SHA-256 sums; no speaker embedding, no sum."""
    if bool(song.speaker_path) != (speaker_hash is not None):
        return False
    try:
        if audio_sha256(resolve_audio_path(dataset_dir, song.filename)) != audio_hash:
            return False
        return speaker_hash is None or _speaker_sha256(dataset_dir, song) == speaker_hash
    except (AudioError, InputError, OSError):
        return False  # decoding will say why


def _speaker_sha256(dataset_dir: str, song: Song) -> str:
    return hashlib.sha256(resolve_audio_path(dataset_dir, song.speaker_path).read_bytes()).hexdigest()


def decode_song(dataset_dir: str, song: Song, settings: Settings) -> DecodedSong | Reject:
    """Read a song's files: audio as the encoders take it, speaker embedding, sha256 of both."""
    try:
        path = resolve_audio_path(dataset_dir, song.filename)
    except InputError as error:
        return Reject.of(song, RejectReason.BAD_PATH, _first_line(error))
    try:
        samples, sample_rate = decode_window(path, settings.max_duration)
        audio_hash = audio_sha256(path)
    except AudioError as error:
        return Reject.of(song, error.reason, str(error))
    silent = silent_fraction(samples[:2])  # training takes the first two channels
    if silent > MAX_SILENT_FRACTION:
        return Reject.of(song, RejectReason.SILENT, f"{silent:.1%} of the audio is silence: {path}")
    speaker, speaker_hash = None, None
    if song.speaker_path:
        try:
            speaker_path = resolve_audio_path(dataset_dir, song.speaker_path)
            speaker = load_speaker_embedding(speaker_path, settings.speaker_dim)
            speaker_hash = _speaker_sha256(dataset_dir, song)
        except (InputError, SpeakerEmbeddingError, OSError) as error:
            return Reject.of(song, RejectReason.BAD_SPEAKER, _first_line(error))
    return DecodedSong(
        song=song,
        audio_sha256=audio_hash,
        speaker_sha256=speaker_hash,
        duration_seconds=min(samples.shape[1] / sample_rate, settings.max_duration),
        wave=to_training_audio(samples, sample_rate, settings.max_duration).numpy(),
        speaker=speaker,
    )


class Encoder:
    """The frozen models, which turn decoded songs into rows of the cache."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        codec: MusicCodec,
        text_encoder: TextEncoder,
        ssl_encoders: Mapping[str, SSLEncoder],
        lyric_tokenizer: LyricTokenizer,
        device: str = "cpu",
    ):
        self.recipe = recipe
        self.codec = codec
        self.text_encoder = text_encoder
        self.ssl_encoders = ssl_encoders
        self.lyric_tokenizer = lyric_tokenizer
        self.device = device

    @classmethod
    def load(cls, checkpoint: CheckpointDir, recipe: Recipe, device: str) -> Encoder:
        """The encoders of a checkpoint on `device`. Raises InputError where a part is broken."""
        # Imported here: the workers that only decode need no lyric front end.
        from acestep_ray.data.lyrics import LyricTokenizer

        return cls(
            recipe,
            codec=checkpoint.load_codec(device),
            text_encoder=checkpoint.load_text_encoder(device),
            ssl_encoders=checkpoint.load_ssl_encoders(device),
            lyric_tokenizer=LyricTokenizer.from_file(checkpoint.lyric_vocab_path()),
            device=device,
        )

    def encode_song(self, decoded: DecodedSong) -> pa.Table | Reject:
        """One row of `SAMPLE_SCHEMA`.

        Raises what the models raise when the machine or the program is to blame rather than the song.
        """
        song, settings = decoded.song, self.recipe.settings
        try:
            lyrics = self.lyric_tokenizer.encode(song.lyrics, song.language or None)
        except (MemoryError, ImportError):
            raise  # the machine's fault, or the installation's
        except Exception as error:  # the libraries behind seventeen languages raise errors of any kind
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            return Reject.of(song, RejectReason.BAD_LYRICS, kind + _first_line(error))
        prompts = prompt_variants(
            song.tags, song.recaption, key=song.key, shuffles=settings.tag_shuffles, seed=settings.seed
        )
        try:
            features = self._encode(decoded.wave, prompts)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The song is to blame only if noise of the same length passes.
            noise = np.random.default_rng(0).uniform(-0.5, 0.5, decoded.wave.shape).astype(np.float32)
            self._encode(noise, [PromptVariant("tags", "music")])
            return Reject.of(song, RejectReason.ENCODER, f"{type(error).__name__}: {_first_line(error)}")
        arrays = [features["latents"], *features["text_embeddings"], *features["ssl"].values()]
        if not all(np.isfinite(array).all() for array in arrays):
            return Reject.of(song, RejectReason.ENCODER, "an encoder gave values that are not finite")
        row = {
            "key": song.key,
            "fingerprint": self.recipe.row_fingerprint(song, decoded.audio_sha256, decoded.speaker_sha256),
            "filename": song.filename,
            "audio_sha256": decoded.audio_sha256,
            "speaker_sha256": decoded.speaker_sha256,
            "duration_seconds": decoded.duration_seconds,
            "latents": _bytes(features["latents"]),
            "latent_frames": features["latents"].shape[-1],
            "prompts": [asdict(prompt) for prompt in prompts],
            "text_embeddings": [_bytes(embedding) for embedding in features["text_embeddings"]],
            "text_dim": features["text_embeddings"][0].shape[1],
            "lyric_ids": [] if lyrics.is_empty else lyrics.ids,
            "lyric_languages": lyrics.languages,
            "speaker": None if decoded.speaker is None else _bytes(decoded.speaker),
            "ssl": [self._ssl_entry(name, array) for name, array in features["ssl"].items()],
        }
        return pa.Table.from_pylist([row], schema=SAMPLE_SCHEMA)

    @torch.inference_mode()
    def _encode(self, wave: np.ndarray, prompts: list[PromptVariant]) -> dict[str, Any]:
        """Latents float16 (8, 16, W), a float16 (T, D) for each prompt, float32 (frames, dim) for each SSL model."""
        # A buffer of another process's memory is read-only, which torch does not know.
        audio = torch.tensor(wave, device=self.device)
        latents, latent_lengths = self.codec.encode(audio[None], torch.tensor([audio.shape[1]]))
        embeddings, mask = self.text_encoder.encode([prompt.text for prompt in prompts])
        tokens = mask.sum(dim=1).int().tolist()
        return {
            "latents": _half(latents[0, ..., : int(latent_lengths[0])]),
            "text_embeddings": [_half(prompt[:n]) for prompt, n in zip(embeddings, tokens, strict=True)],
            "ssl": {
                name: encoder.encode(audio).float().cpu().numpy()
                for name, encoder in self.ssl_encoders.items()
            },
        }

    def _ssl_entry(self, name: str, features: np.ndarray) -> dict[str, Any]:
        kept = features[:: self.recipe.settings.ssl_frame_stride]
        return {
            "name": name,
            "frames": len(features),
            "dim": features.shape[1],
            "directions": _bytes(quantise_directions(kept)),
        }


def _first_line(error: Exception) -> str:
    """What is wrong, without the advice that would fit a whole job."""
    return str(error).partition("\n")[0]


def _half(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float16).cpu().numpy()


def _bytes(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
