"""Songs on their way into the cache: what a row is made from, how a song is decoded, rejected, and made into a row.

No torch here: the processes that decode need none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from acestep_ray.cache.schema import FEATURE_GROUPS, FORMAT_VERSION, SAMPLE_SCHEMA, array_to_bytes, hash_of
from acestep_ray.data.audio import MIN_DECODED, RESAMPLER
from acestep_ray.data.lyric_text import read_lyric_text
from acestep_ray.data.schema import RejectReason, row_recaption, row_tags, row_text
from acestep_ray.errors import InputError

if TYPE_CHECKING:
    from acestep_ray.data.lyrics import LyricTokenizer

MAX_SILENT_FRACTION = 0.95
"""A song, or a window of one, with more silence than this is rejected."""

DECODING_VERSION = 2
"""Raised when files that were rejected may be read now; earlier rejects are then tried again."""

WINDOWS = ("first", "all", "random")
"""Which part of a song is used: its start, one window after another, or one at a random place."""


@dataclass(frozen=True)
class Song:
    """A dataset row, its optional columns filled in, its lyrics read by `read_lyric_text`."""

    key: str
    filename: str
    tags: list[str]
    recaption: dict[str, str]
    lyrics: str
    language: str
    speaker_path: str
    problem: str = ""
    """Why a text beside the song cannot be read; empty if it can."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Song:
        return cls(
            key=row["keys"],
            filename=row["filename"],
            tags=row_tags(row),
            recaption=row_recaption(row),
            lyrics=read_lyric_text(row_text(row, "norm_lyrics"))[0],
            language=row_text(row, "language"),
            speaker_path=row_text(row, "speaker_emb_path"),
            problem=row_text(row, "problem"),
        )


@dataclass(frozen=True)
class Settings:
    """The settings that decide what a row holds, so that a change of any makes every row stale."""

    tag_shuffles: int
    ssl_frame_stride: int
    seed: int
    speaker_dim: int
    window: str = "first"
    window_seconds: float = 240.0
    loudness_lufs: float | None = None
    features: tuple[str, ...] = FEATURE_GROUPS
    precision: str = "32"
    """"32" or "16": of the encoders."""
    resampler: str = RESAMPLER


@dataclass(frozen=True)
class Recipe:
    """All that a row is made from besides its song."""

    settings: Settings
    models: dict[str, str]
    """Fingerprint of each model that takes part, and of the lyric vocabulary."""
    min_decoded: float = MIN_DECODED
    """Share of a song's or window's audio that must decode. No part of a row's identity: `decoded_share` is a column
    of those that it concerns."""
    keep_unknown_lyrics: bool = False
    """Whether songs are kept whose lyrics are mostly unknown to the vocabulary. Changes no row."""

    def row_fingerprint(self, song: Song, audio_sha256: str, speaker_sha256: str | None) -> str:
        """Identity of a song's rows (hex): equal for equal audio and speaker bytes, text, settings, models and format.

        Where the files lie is no part of it. The key is: it chooses the orders of the tags.
        """
        return hash_of(self._made_from(song), audio_sha256, speaker_sha256)

    def reject_fingerprint(self, song: Song, versions: FileVersions) -> str:
        """Identity of a song that was rejected: its files count by their versions, for they may be unreadable.

        So does how audio is read: what is rejected by other rules is tried again.
        """
        place = [song.filename, song.speaker_path, song.problem]
        rules = [DECODING_VERSION, self.min_decoded, self.keep_unknown_lyrics]
        return hash_of("reject", self._made_from(song), place, versions.audio, versions.speaker, rules)

    def _made_from(self, song: Song) -> list[Any]:
        text = [song.key, song.tags, song.recaption, song.lyrics, song.language]
        return [FORMAT_VERSION, MAX_SILENT_FRACTION, asdict(self.settings), self.models, text]


@dataclass(frozen=True)
class FileVersions:
    """Versions of a song's files in storage: while they are the same, so are the files' bytes."""

    audio: str
    speaker: str | None
    """None for a song without a speaker embedding."""


@dataclass(frozen=True)
class Reject:
    """A song, or a window of one, that cannot be used, and why."""

    key: str
    filename: str
    stage: str
    reason: str
    message: str
    song_key: str = ""
    window: int = 0
    is_last_window: bool = True
    fingerprint: str | None = None
    audio_version: str | None = None


@dataclass(frozen=True)
class DecodedSong:
    """A song, or a window of one, ready for the encoders."""

    song: Song
    key: str
    """Of the row: the song's, with `#` and the window's number where a song has several."""
    window: int
    is_last_window: bool
    start_seconds: float
    audio_sha256: str
    audio_version: str
    speaker_sha256: str | None
    speaker_version: str | None
    duration_seconds: float
    """Seconds of audio, padding excluded."""
    wave: np.ndarray
    """float32 (2, n) at 48 kHz."""
    speaker: np.ndarray | None
    """float32 (speaker_dim,)."""
    decoded_share: float | None = None
    """Of the window's audio; None where all of it decodes."""
    warning: str | None = None
    """What disagrees in the file, and what was done about it."""

    def header(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["wave"], values["speaker"]
        return {**values, "song": asdict(self.song)}

    @classmethod
    def from_header(
        cls, header: Mapping[str, Any], wave: np.ndarray, speaker: np.ndarray | None
    ) -> DecodedSong:
        return cls(**{**header, "song": Song(**header["song"]), "wave": wave, "speaker": speaker})

    def reject(self, recipe: Recipe, reason: RejectReason, message: str) -> Reject:
        """This song, or window, as one that cannot be used after all."""
        versions = FileVersions(self.audio_version, self.speaker_version)
        return Reject(
            key=self.key,
            filename=self.song.filename,
            stage=reason.stage,
            reason=reason.value,
            message=message,
            song_key=self.song.key,
            window=self.window,
            is_last_window=self.is_last_window,
            fingerprint=recipe.reject_fingerprint(self.song, versions),
            audio_version=self.audio_version,
        )


def encode_lyrics(decoded: DecodedSong, tokenizer: LyricTokenizer, recipe: Recipe) -> dict[str, Any] | Reject:
    """The song's columns of `SAMPLE_SCHEMA` on lyrics, or why they cannot be used."""
    # Imported here: the processes that decode need no lyric front end.
    from acestep_ray.data.lyrics import describe_unknown, is_unusable

    song = decoded.song
    try:
        lyrics = tokenizer.encode(song.lyrics, song.language or None)
    except (MemoryError, ImportError):
        raise  # the machine's fault, or the installation's
    except InputError as error:
        message = f"{error.what} ({error.fix})" if error.fix else error.what
        return decoded.reject(recipe, RejectReason.BAD_LYRICS, message)
    except Exception as error:  # the libraries behind seventeen languages raise errors of any kind
        return decoded.reject(recipe, RejectReason.BAD_LYRICS, f"{type(error).__name__}: {first_line(error)}")
    if is_unusable(lyrics) and not recipe.keep_unknown_lyrics:
        message = (
            f"{describe_unknown(song.lyrics, lyrics, song.language)} (--keep_unknown_lyrics keeps such songs)"
        )
        return decoded.reject(recipe, RejectReason.BAD_LYRICS, message)
    return {"lyric_ids": [] if lyrics.is_empty else lyrics.ids, "lyric_languages": lyrics.languages}


def build_row(decoded: DecodedSong, columns: Mapping[str, Any], recipe: Recipe) -> pa.Table:
    """A song's row of `SAMPLE_SCHEMA`; columns of features that were not asked for are null."""
    song = decoded.song
    row = {
        "key": decoded.key,
        "song_key": song.key,
        "window": decoded.window,
        "is_last_window": decoded.is_last_window,
        "start_seconds": decoded.start_seconds,
        "fingerprint": recipe.row_fingerprint(song, decoded.audio_sha256, decoded.speaker_sha256),
        "filename": song.filename,
        "audio_sha256": decoded.audio_sha256,
        "audio_version": decoded.audio_version,
        "speaker_sha256": decoded.speaker_sha256,
        "speaker_version": decoded.speaker_version,
        "duration_seconds": decoded.duration_seconds,
        "speaker": None if decoded.speaker is None else array_to_bytes(decoded.speaker),
        "latent_frames": 0,
        "decoded_share": decoded.decoded_share,
        "warning": decoded.warning,
        **columns,
    }
    return pa.Table.from_pylist([row], schema=SAMPLE_SCHEMA)


def first_line(error: Exception) -> str:
    """What is wrong, without the advice that would fit a whole job."""
    return str(error).partition("\n")[0]
