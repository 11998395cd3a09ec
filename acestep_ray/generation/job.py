"""The generate job: prompt and lyrics to audio files; of many songs see `batch`."""

from __future__ import annotations

import io
import os
import posixpath
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from acestep_ray.config import GenerateConfig
from acestep_ray.errors import InputError
from acestep_ray.generation.audio import SUBTYPES, Sound, audio_bytes
from acestep_ray.generation.models import MusicModels, choose_models
from acestep_ray.generation.render import write_mel_picture
from acestep_ray.generation.requests import songs_of_flags
from acestep_ray.generation.song import Song, together
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.models.codec import SAMPLE_RATE
from acestep_ray.storage import StoredFile

if TYPE_CHECKING:
    from acestep_ray.generation.batch import BatchSummary

_FLAGS_OF_BATCHES = ("output_dir", "format", "workers")


@dataclass(frozen=True)
class MadeSong:
    """A song that was written."""

    audio: StoredFile
    picture: StoredFile
    seconds: float
    """Length of the audio."""


@dataclass(frozen=True)
class GenerateSummary:
    """What was made."""

    songs: list[MadeSong]
    wall_seconds: float

    def render(self) -> str:
        """The summary as text."""
        lines = [
            f"audio    {song.audio} ({song.seconds:.1f} s)\npicture  {song.picture}" for song in self.songs
        ]
        return "\n".join([*lines, f"took     {self.wall_seconds:.1f} s"])


def generate(config: GenerateConfig) -> GenerateSummary | BatchSummary:
    """Make the songs of the flags here, or those of a file on a Ray cluster.

    Raises InputError for settings or files that cannot be used, before anything is made.
    """
    started = time.monotonic()
    if config.batch_size < 1:
        raise InputError("must be at least 1", where=f"--batch_size {config.batch_size}")
    if config.batch_path is not None:
        # Ray takes a second to import.
        from acestep_ray.generation.batch import generate_batch

        return generate_batch(config)
    output = check_output(config)
    checkpoint = CheckpointDir.open(config.checkpoint_dir)
    request = songs_of_flags(
        config, posixpath.splitext(output.name)[0], checkpoint.transformer_config.speaker_embedding_dim
    )
    choice = choose_models(config, checkpoint)
    request.show_warnings()
    models = MusicModels.load(choice)
    made = []
    for group in together(request.songs, config.batch_size):
        for song, sound in zip(group, models.make(group, _show_step(config.infer_steps)), strict=True):
            made.append(write_song(output, song, sound))
    return GenerateSummary(made, time.monotonic() - started)


def write_song(output: StoredFile, song: Song, sound: Sound) -> MadeSong:
    """Write a song and its picture beside `output`, in its format."""
    audio = StoredFile(output.store, f"{song.name}{posixpath.splitext(output.name)[1]}")
    picture = StoredFile(output.store, f"{song.name}.png")
    content = io.BytesIO()
    write_mel_picture(content, sound.waveform, song.prompt[:80] or song.name)
    output.store.write_bytes(audio.name, audio_bytes(sound.waveform, output.suffix.removeprefix(".")))
    output.store.write_bytes(picture.name, content.getvalue())
    return MadeSong(audio, picture, sound.waveform.shape[-1] / SAMPLE_RATE)


def check_output(config: GenerateConfig) -> StoredFile:
    """The audio file to write. Raises InputError where the flags do not name one that can be written."""
    if config.output_path is None:
        raise InputError(
            "nothing says what to write",
            where="--output_path",
            fix="give it, or --batch_path and --output_dir",
        )
    for name in _FLAGS_OF_BATCHES:
        if getattr(config, name) is not None:
            raise InputError("this goes with --batch_path only", where=f"--{name} {getattr(config, name)}")
    output, where = StoredFile.at(config.output_path), f"--output_path {config.output_path}"
    suffix = output.suffix.lower()
    if suffix.removeprefix(".") not in SUBTYPES:
        raise InputError(
            f"cannot write `{suffix or 'no suffix'}`",
            where=where,
            fix=f"use one of {', '.join(f'.{format}' for format in SUBTYPES)}",
        )
    output.store.check_writable()
    path = output.local_path
    if path is None:
        return output
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write here ({error})", where=where) from None
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise InputError("cannot write here", where=where)
    return output


def _show_step(total: int) -> Callable[[int], None]:
    def show(step: int) -> None:
        if sys.stderr.isatty():
            print(f"\rstep {step}/{total}", end="\n" if step == total else "", file=sys.stderr, flush=True)

    return show
