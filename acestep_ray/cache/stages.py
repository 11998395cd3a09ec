"""What happens to one song on its way into the cache: decoded, encoded, made into rows. Plain Python, no Ray.

A song that cannot be used becomes a `Reject` with its reason. A fault that is not the song's is raised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from acestep_ray.cache.schema import (
    FEATURE_GROUPS,
    FORMAT_VERSION,
    SAMPLE_SCHEMA,
    hash_of,
    quantise_directions,
)
from acestep_ray.data.audio import (
    MIN_SECONDS,
    RESAMPLER,
    AudioError,
    AudioFile,
    audio_sha256,
    silent_fraction,
    to_training_audio,
)
from acestep_ray.data.prompts import PromptVariant, prompt_variants
from acestep_ray.data.schema import RejectReason, locate_file, row_recaption, row_tags, row_text
from acestep_ray.data.speaker import SpeakerEmbeddingError, load_speaker_embedding
from acestep_ray.errors import InputError
from acestep_ray.storage import Store

if TYPE_CHECKING:
    from acestep_ray.data.lyrics import LyricTokenizer
    from acestep_ray.models.checkpoint import CheckpointDir
    from acestep_ray.models.codec import MusicCodec
    from acestep_ray.models.ssl import SSLEncoder
    from acestep_ray.models.text_encoder import TextEncoder

MAX_SILENT_FRACTION = 0.95

WINDOWS = ("first", "all", "random")
"""Which part of a song is used: its start, one window after another, or one at a random place."""

_NO_FILE = "missing"
_PROMPTS_PER_PASS = 64


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
    problem: str = ""
    """Why a text beside the song cannot be read; empty if it can."""

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

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settings:
        return cls(**{**values, "features": tuple(values["features"])})


@dataclass(frozen=True)
class Recipe:
    """All that a row is made from besides its song."""

    settings: Settings
    models: dict[str, str]
    """Fingerprint of each model that takes part, and of the lyric vocabulary."""

    def row_fingerprint(self, song: Song, audio_sha256: str, speaker_sha256: str | None) -> str:
        """Identity of a song's rows (hex): equal for equal audio and speaker bytes, text, settings, models and format.

        Where the files lie is no part of it. The key is: it chooses the orders of the tags.
        """
        return hash_of(self._made_from(song), audio_sha256, speaker_sha256)

    def reject_fingerprint(self, song: Song, versions: FileVersions) -> str:
        """Identity of a song that was rejected: its files count by their versions, for they may be unreadable."""
        place = [song.filename, song.speaker_path, song.problem]
        return hash_of("reject", self._made_from(song), place, versions.audio, versions.speaker)

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


# --- files -------------------------------------------------------------------------------------------------


def file_versions(root: Store, song: Song) -> FileVersions:
    """Versions of the song's files now; a file that is not there, or cannot be, has one too."""
    return FileVersions(
        _version(root, song.filename), _version(root, song.speaker_path) if song.speaker_path else None
    )


def _version(root: Store, filename: str) -> str:
    try:
        status = locate_file(root, filename).status()
    except (InputError, OSError):
        return _NO_FILE  # decoding says what is wrong
    return _NO_FILE if status is None else status.version


def rows_are_current(
    root: Store, song: Song, before: FileVersions, audio_hash: str, speaker_hash: str | None
) -> bool:
    """Whether the song's files still hold the bytes with these SHA-256 sums; no speaker embedding, no sum.

    Files whose version is still the same are not read.
    """
    if bool(song.speaker_path) != (speaker_hash is not None):
        return False
    now = file_versions(root, song)
    try:
        if now.audio != before.audio and audio_sha256(locate_file(root, song.filename)) != audio_hash:
            return False
        return now.speaker == before.speaker or _speaker_sha256(root, song) == speaker_hash
    except (AudioError, InputError, OSError):
        return False  # decoding will say why


def _speaker_sha256(root: Store, song: Song) -> str:
    return hashlib.sha256(locate_file(root, song.speaker_path).read_bytes()).hexdigest()


# --- decoding ----------------------------------------------------------------------------------------------


def decode_song(
    root: Store, song: Song, recipe: Recipe, versions: FileVersions
) -> Iterator[DecodedSong | Reject]:
    """Read a song's files, relative to `root`: its windows, or why there are none, one after another."""
    yield from _Decoder(root, song, recipe, versions).windows()


class _Decoder:
    """One song on its way from its files to windows of training audio."""

    def __init__(self, root: Store, song: Song, recipe: Recipe, versions: FileVersions):
        self.root, self.song, self.versions = root, song, versions
        self.settings = recipe.settings
        self.fingerprint = recipe.reject_fingerprint(song, versions)
        self.audio_hash = ""
        self.speaker: np.ndarray | None = None
        self.speaker_hash: str | None = None

    def windows(self) -> Iterator[DecodedSong | Reject]:
        if self.song.problem:
            yield self.reject(RejectReason.BAD_TEXT, self.song.problem)
            return
        try:
            file = locate_file(self.root, self.song.filename)
        except InputError as error:
            yield self.reject(RejectReason.BAD_PATH, _first_line(error))
            return
        number = 0
        try:
            with AudioFile(file) as audio:
                self.audio_hash = audio.sha256()
                problem = self._read_speaker()
                if problem is not None:
                    yield problem
                    return
                for number, start, samples, is_last in self._samples(audio):
                    yield self._window(audio, number, start, samples, is_last)
        except AudioError as error:
            yield self.reject(error.reason, str(error), window=number)

    def reject(self, reason: RejectReason, message: str, window: int = 0, is_last: bool = True) -> Reject:
        return Reject(
            key=self._key(window),
            filename=self.song.filename,
            stage=reason.stage,
            reason=reason.value,
            message=message,
            song_key=self.song.key,
            window=window,
            is_last_window=is_last,
            fingerprint=self.fingerprint,
            audio_version=self.versions.audio,
        )

    def _key(self, window: int) -> str:
        return f"{self.song.key}#{window}" if self.settings.window == "all" else self.song.key

    def _read_speaker(self) -> Reject | None:
        if not self.song.speaker_path:
            return None
        try:
            file = locate_file(self.root, self.song.speaker_path)
            self.speaker = load_speaker_embedding(file, self.settings.speaker_dim)
            self.speaker_hash = _speaker_sha256(self.root, self.song)
        except (InputError, SpeakerEmbeddingError, OSError) as error:
            return self.reject(RejectReason.BAD_SPEAKER, _first_line(error))
        return None

    def _samples(self, audio: AudioFile) -> Iterator[tuple[int, float, np.ndarray, bool]]:
        """Number, start in seconds, samples (channels, n) of each window, and whether it is the last."""
        length = self.settings.window_seconds
        if self.settings.window == "all":
            yield from _consecutive_windows(audio, length)
        elif self.settings.window == "first":
            yield 0, 0.0, audio.read(0.0, length), True
        else:
            start = random_start(audio, length, self.settings.seed, self.song.key)
            samples = audio.read(start, length)
            if samples.shape[1] == 0:
                raise AudioError(
                    RejectReason.CORRUPT,
                    f"no audio at {start:.1f} s, where its header promises some: {self.song.filename}",
                )
            yield 0, start, samples, True

    def _window(
        self, audio: AudioFile, number: int, start: float, samples: np.ndarray, is_last: bool
    ) -> DecodedSong | Reject:
        length = self.settings.window_seconds
        silent = silent_fraction(samples[:2])  # training takes the first two channels
        if silent > MAX_SILENT_FRACTION:
            return self.reject(
                RejectReason.SILENT,
                f"{silent:.1%} of the audio is silence: {self.song.filename}",
                window=number,
                is_last=is_last,
            )
        wave = to_training_audio(samples, audio.sample_rate, length, self.settings.loudness_lufs)
        return DecodedSong(
            song=self.song,
            key=self._key(number),
            window=number,
            is_last_window=is_last,
            start_seconds=start,
            audio_sha256=self.audio_hash,
            audio_version=self.versions.audio,
            speaker_sha256=self.speaker_hash,
            speaker_version=self.versions.speaker,
            duration_seconds=min(samples.shape[1] / audio.sample_rate, length),
            wave=wave.numpy(),
            speaker=self.speaker,
        )


def _consecutive_windows(audio: AudioFile, length: float) -> Iterator[tuple[int, float, np.ndarray, bool]]:
    """Windows without gaps from the start on. What is left at the end is dropped if it is under `MIN_SECONDS`."""
    number, samples = 0, audio.read(0.0, length)
    while True:
        following = None
        if samples.shape[1] >= int(length * audio.sample_rate):
            following = _read_if_there(audio, (number + 1) * length, length)
        yield number, number * length, samples, following is None
        if following is None:
            return
        number, samples = number + 1, following


def _read_if_there(audio: AudioFile, start: float, length: float) -> np.ndarray | None:
    """A window past the first; None where the audio has ended, whatever the header says."""
    try:
        samples = audio.read(start, length)
    except AudioError as error:
        if error.reason is RejectReason.CORRUPT:
            return None
        raise
    return samples if samples.shape[1] >= MIN_SECONDS * audio.sample_rate else None


def random_start(audio: AudioFile, length: float, seed: int, key: str) -> float:
    """Where the song's window begins, in seconds: a function of the seed, the key and the song's length."""
    seconds = audio.duration_seconds
    if seconds is None:
        windows = _consecutive_windows(audio, length)
        seconds = sum(samples.shape[1] for _, _, samples, _ in windows) / audio.sample_rate
    share = int(hash_of("window", seed, key)[:12], 16) / 16**12
    return share * max(0.0, seconds - length)


# --- encoding ----------------------------------------------------------------------------------------------


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
            outcomes[i] = self._encode_lyrics(decoded) if self.lyric_tokenizer is not None else {}
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

    def _encode_lyrics(self, decoded: DecodedSong) -> dict[str, Any] | Reject:
        song = decoded.song
        try:
            lyrics = self.lyric_tokenizer.encode(song.lyrics, song.language or None)
        except (MemoryError, ImportError):
            raise  # the machine's fault, or the installation's
        except Exception as error:  # the libraries behind seventeen languages raise errors of any kind
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            return self._reject(decoded, RejectReason.BAD_LYRICS, kind + _first_line(error))
        return {"lyric_ids": [] if lyrics.is_empty else lyrics.ids, "lyric_languages": lyrics.languages}

    def _reject(self, decoded: DecodedSong, reason: RejectReason, message: str) -> Reject:
        versions = FileVersions(decoded.audio_version, decoded.speaker_version)
        return Reject(
            key=decoded.key,
            filename=decoded.song.filename,
            stage=reason.stage,
            reason=reason.value,
            message=message,
            song_key=decoded.song.key,
            window=decoded.window,
            is_last_window=decoded.is_last_window,
            fingerprint=self.recipe.reject_fingerprint(decoded.song, versions),
            audio_version=decoded.audio_version,
        )

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
            message = f"{type(error).__name__}: {_first_line(error)}"
            return [self._reject(songs[0], RejectReason.ENCODER, message)]
        return [
            self._columns(song_features)
            if _are_finite(song_features)
            else self._reject(decoded, RejectReason.ENCODER, "an encoder gave values that are not finite")
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
            columns["latents"] = _bytes(features["latents"])
            columns["latent_frames"] = features["latents"].shape[-1]
        if "text_embeddings" in features:
            columns["prompts"] = [asdict(prompt) for prompt in features["prompts"]]
            columns["text_embeddings"] = [_bytes(embedding) for embedding in features["text_embeddings"]]
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
            "directions": _bytes(quantise_directions(kept)),
        }


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
        "speaker": None if decoded.speaker is None else _bytes(decoded.speaker),
        "latent_frames": 0,
        **columns,
    }
    return pa.Table.from_pylist([row], schema=SAMPLE_SCHEMA)


def _are_finite(features: Mapping[str, Any]) -> bool:
    arrays = [
        features.get("latents"),
        *features.get("text_embeddings", ()),
        *features.get("ssl", {}).values(),
    ]
    return all(array is None or np.isfinite(array).all() for array in arrays)


def _first_line(error: Exception) -> str:
    """What is wrong, without the advice that would fit a whole job."""
    return str(error).partition("\n")[0]


def _half(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float16).cpu().numpy()


def _bytes(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
