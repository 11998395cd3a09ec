"""A song's files → windows of training audio, or a reject that says why there are none. Plain Python, no Ray, no torch.

A fault that is not the song's is raised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from acestep_ray.cache.schema import hash_of
from acestep_ray.cache.songs import (
    MAX_SILENT_FRACTION,
    DecodedSong,
    FileVersions,
    Recipe,
    Reject,
    Song,
    first_line,
)
from acestep_ray.data.audio import (
    MIN_SECONDS,
    AudioError,
    AudioFile,
    audio_sha256,
    silent_fraction,
    to_training_audio,
)
from acestep_ray.data.file_names import locate_file
from acestep_ray.data.schema import RejectReason
from acestep_ray.data.speaker import SpeakerEmbeddingError, load_speaker_embedding
from acestep_ray.errors import InputError
from acestep_ray.storage import StorageError, Store, is_url

_NO_FILE = "missing"
_UNREACHABLE = "unreachable"


class _Window(NamedTuple):
    """A window of a song as it was read."""

    number: int
    start: float
    """Seconds."""
    samples: np.ndarray | AudioError
    """(channels, n), or why there are none."""
    is_last: bool = True
    decoded_share: float | None = None
    warnings: Sequence[str] = ()


def file_versions(root: Store, song: Song) -> FileVersions:
    """Versions of the song's files now; a file that is not there, or cannot be, has one too."""
    return FileVersions(
        _version(root, song.filename), _version(root, song.speaker_path) if song.speaker_path else None
    )


def _version(root: Store, filename: str) -> str:
    try:
        status = locate_file(root, filename).status()
    except (InputError, OSError, ValueError):
        return _NO_FILE  # decoding says what is wrong
    except StorageError:
        # Of the dataset's own storage it is everybody's fault; of a URL that a row names, the row's.
        if not is_url(filename):
            raise
        return _UNREACHABLE
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
    if _UNREACHABLE in (now.audio, now.speaker):
        return True  # what was computed is kept until its files can be compared
    try:
        if now.audio != before.audio and audio_sha256(locate_file(root, song.filename)) != audio_hash:
            return False
        return now.speaker == before.speaker or _speaker_sha256(root, song) == speaker_hash
    except (AudioError, InputError, OSError, ValueError):
        return False  # decoding will say why


def _speaker_sha256(root: Store, song: Song) -> str:
    return hashlib.sha256(locate_file(root, song.speaker_path).read_bytes()).hexdigest()


def decode_song(
    root: Store, song: Song, recipe: Recipe, versions: FileVersions
) -> Iterator[DecodedSong | Reject]:
    """Read a song's files, relative to `root`: its windows, or why there are none, one after another."""
    yield from _Decoder(root, song, recipe, versions).windows()


class _Decoder:
    """One song on its way from its files to windows of training audio."""

    def __init__(self, root: Store, song: Song, recipe: Recipe, versions: FileVersions):
        self.root, self.song, self.versions = root, song, versions
        self.settings, self.min_decoded = recipe.settings, recipe.min_decoded
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
        except (InputError, OSError, ValueError, StorageError) as error:
            yield self.reject(RejectReason.BAD_PATH, first_line(error))
            return
        number = 0
        try:
            with AudioFile(file, min_decoded=self.min_decoded) as audio:
                self.audio_hash = audio.sha256()
                problem = self._read_speaker()
                if problem is not None:
                    yield problem
                    return
                for window in self._windows_of(audio):
                    number = window.number
                    if isinstance(window.samples, AudioError):
                        problem_text = str(window.samples)
                        yield self.reject(window.samples.reason, problem_text, number, window.is_last)
                    else:
                        yield self._window(audio.sample_rate, window, window.samples)
        except AudioError as error:
            yield self.reject(error.reason, str(error), window=number)
        except InputError as error:
            # A bucket that a row names may not exist; credentials of the dataset's own storage are the user's to give.
            if not is_url(self.song.filename):
                raise
            yield self.reject(RejectReason.BAD_PATH, first_line(error), window=number)

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
        except (InputError, SpeakerEmbeddingError, OSError, ValueError, StorageError) as error:
            return self.reject(RejectReason.BAD_SPEAKER, first_line(error))
        return None

    def _windows_of(self, audio: AudioFile) -> Iterator[_Window]:
        length = self.settings.window_seconds
        if self.settings.window == "all":
            yield from _consecutive_windows(audio, length)
            return
        start = 0.0
        if self.settings.window == "random":
            start = random_start(audio, length, self.settings.seed, self.song.key)
        window = _read_window(audio, 0, start, length)
        if not isinstance(window.samples, AudioError) and window.samples.shape[1] == 0:
            raise AudioError(
                RejectReason.CORRUPT,
                f"no audio at {start:.1f} s, where its header promises some: {self.song.filename}",
            )
        yield window

    def _window(self, sample_rate: int, window: _Window, samples: np.ndarray) -> DecodedSong | Reject:
        length = self.settings.window_seconds
        silent = silent_fraction(samples[:2])  # training takes the first two channels
        if silent > MAX_SILENT_FRACTION:
            return self.reject(
                RejectReason.SILENT,
                f"{silent:.1%} of the audio is silence: {self.song.filename}",
                window=window.number,
                is_last=window.is_last,
            )
        wave = to_training_audio(samples, sample_rate, length, self.settings.loudness_lufs)
        return DecodedSong(
            song=self.song,
            key=self._key(window.number),
            window=window.number,
            is_last_window=window.is_last,
            start_seconds=window.start,
            audio_sha256=self.audio_hash,
            audio_version=self.versions.audio,
            speaker_sha256=self.speaker_hash,
            speaker_version=self.versions.speaker,
            duration_seconds=min(samples.shape[1] / sample_rate, length),
            wave=wave,
            speaker=self.speaker,
            decoded_share=window.decoded_share,
            warning="; ".join(window.warnings) or None,
        )


def _consecutive_windows(audio: AudioFile, length: float) -> Iterator[_Window]:
    """Windows without gaps from the start on. What is left at the end is dropped if it is under `MIN_SECONDS`.

    A window of which too little decodes is rejected alone. What a header promises behind the end of a file that was
    cut off belongs to the window in which the file ends.
    """
    window = _read_window(audio, 0, 0.0, length)
    while True:
        following, number = None, window.number + 1
        if _may_follow(audio, window, number * length, length):
            following = _read_window(audio, number, number * length, length)
            samples = following.samples
            if not isinstance(samples, AudioError) and samples.shape[1] < MIN_SECONDS * audio.sample_rate:
                following = None
        yield window._replace(is_last=following is None)
        if following is None:
            return
        window = following


def _may_follow(audio: AudioFile, window: _Window, start: float, length: float) -> bool:
    """Whether there may be a window at `start`, behind this one."""
    if audio.is_counted and audio.duration_seconds is not None:
        return round((audio.duration_seconds - start - MIN_SECONDS) * audio.sample_rate) >= 0
    samples = window.samples
    return not isinstance(samples, AudioError) and samples.shape[1] >= int(length * audio.sample_rate)


def _read_window(audio: AudioFile, number: int, start: float, length: float) -> _Window:
    try:
        samples: np.ndarray | AudioError = audio.read(start, length)
    except AudioError as error:
        if error.reason is not RejectReason.CORRUPT:
            raise
        samples = error
    return _Window(number, start, samples, True, audio.decoded_share, audio.warnings)


def random_start(audio: AudioFile, length: float, seed: int, key: str) -> float:
    """Where the song's window begins, in seconds: a function of the seed, the key and the song's length."""
    seconds = audio.duration_seconds
    if seconds is None:
        windows = [window.samples for window in _consecutive_windows(audio, length)]
        frames = sum(0 if isinstance(samples, AudioError) else samples.shape[1] for samples in windows)
        seconds = frames / audio.sample_rate
    share = int(hash_of("window", seed, key)[:12], 16) / 16**12
    return share * max(0.0, seconds - length)
