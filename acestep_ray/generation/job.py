"""The generate job: prompt and lyrics to audio files; of many songs see `batch`."""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from acestep_ray.config import GenerateConfig
from acestep_ray.data.lyrics import LyricTokenizer
from acestep_ray.errors import InputError
from acestep_ray.generation.audio import SUBTYPES, Sound, audio_bytes
from acestep_ray.generation.models import MusicModels, choose_models
from acestep_ray.generation.render import write_mel_picture
from acestep_ray.generation.requests import check_lyrics, songs_of_flags
from acestep_ray.generation.song import Song, together
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.models.codec import SAMPLE_RATE
from acestep_ray.storage import StoredFile, lock_name, only_writer
from acestep_ray.terminal import Progress, fact_table

if TYPE_CHECKING:
    from acestep_ray.generation.batch import BatchSummary

_LONGEST_NAME = 255  # bytes; of Linux's file systems
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
        rows: list[tuple[str, object]] = []
        for song in self.songs:
            rows += [("audio", f"{song.audio} ({song.seconds:.1f} s)"), ("picture", song.picture)]
        return fact_table([*rows, ("took", f"{self.wall_seconds:,.1f} s")])


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
    check_names(output, request.songs)
    tokenizer = LyricTokenizer.from_file(checkpoint.lyric_vocab_path())
    request = check_lyrics(request, tokenizer, config.keep_unknown_lyrics, where="--lyrics")
    choice = choose_models(config, checkpoint)
    request.show_warnings()
    made: list[MadeSong] = []
    groups = together(request.songs, config.batch_size)
    with contextlib.ExitStack() as stack:
        where = f"--output_path {config.output_path}"
        stack.enter_context(only_writer(output.store, where, lock=lock_name(output.name)))
        models = MusicModels.load(choice)
        progress = stack.enter_context(Progress("generating", config.infer_steps * len(groups), "steps"))
        for number, group in enumerate(groups):
            before = config.infer_steps * number
            sounds = models.make(group, partial(show_step, progress, before))
            made += [write_song(output, song, sound) for song, sound in zip(group, sounds, strict=True)]
    return GenerateSummary(made, time.monotonic() - started)


def show_step(progress: Progress, before: int, step: int) -> None:
    """Show that `step` steps are done, besides those of the groups `before`."""
    progress.update(before + step)


def check_names(output: StoredFile, songs: Sequence[Song]) -> None:
    """Raise InputError where a disk takes no file of a song's name, which may have its seed in it."""
    suffix = posixpath.splitext(output.name)[1]
    longest = max(len(os.fsencode(posixpath.basename(song.name) + suffix)) for song in songs)
    if output.store.is_local and longest > _LONGEST_NAME:
        raise InputError(
            "the file's name is too long",
            where=f"--output_path {output}",
            fix=f"at most {_LONGEST_NAME} bytes, with the seeds that are put into it",
        )


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
    if not os.access(path.parent, os.W_OK) or os.path.isdir(path):
        raise InputError("cannot write here", where=where)
    return output
