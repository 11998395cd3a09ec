"""Everything that is measured of a model, and the figures that it comes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from acestep_ray.data.audio import AudioError, audio_sha256
from acestep_ray.errors import InputError
from acestep_ray.evaluation.clips import Clip
from acestep_ray.evaluation.embeddings import EmbeddedSong, embed_files, embed_song, find_audio, read_wave
from acestep_ray.evaluation.frechet import LEAST_SONGS, FrechetScore, score_frechet
from acestep_ray.evaluation.nearest import Nearest, TrainingWindows, baseline, mark
from acestep_ray.evaluation.notes import Notes
from acestep_ray.evaluation.sound import SoundScore, score_sound
from acestep_ray.models.ssl import SSLEncoder
from acestep_ray.terminal import Progress
from acestep_ray.training.validation import VALIDATION, validation_metrics

NOT_FINITE = "not finite"
"""Flag of a clip that is no sound, or of which an encoder makes no numbers."""


@dataclass
class ClipScore:
    """What is measured of a clip."""

    clip: Clip
    sound: SoundScore | None
    """None where there is no sound."""
    nearest: dict[str, Nearest] = field(default_factory=dict)
    """Its windows' nearest training windows, by encoder."""
    picture: Path | None = None
    flags: list[str] = field(default_factory=list)


@dataclass
class ModelScore:
    """What is measured of a model."""

    label: str
    kind: str
    path: str
    strength: float
    clips: list[ClipScore] = field(default_factory=list)
    losses: list[float] | None = None
    """Of held-out songs at each noise level, the noisiest first; None where none were measured."""
    frechet: dict[str, FrechetScore] = field(default_factory=dict)
    """By encoder."""
    marks: Mapping[str, float] = field(default_factory=dict)
    """Similarity to training songs that little of real music exceeds, by encoder."""

    def metrics(self) -> dict[str, float]:
        """All figures by name; what could not be measured is missing."""
        found: dict[str, float | None] = {}
        if self.losses is not None:
            found |= validation_metrics(f"loss/{VALIDATION}", self.losses)
        for encoder, score in self.frechet.items():
            name = f"frechet/{encoder}"
            found |= {name: score.distance, f"{name}/infinity": score.infinity}
            found |= {f"{name}/low": score.low, f"{name}/high": score.high}
        for encoder, limit in self.marks.items():
            windows = [c.nearest[encoder].similarities for c in self.clips if encoder in c.nearest]
            if windows:
                found |= similarity_metrics(f"nearest/{encoder}", np.concatenate(windows), limit)
        sounds = [clip.sound.figures() for clip in self.clips if clip.sound is not None]
        for name in sounds[0] if sounds else ():
            values = [value for sound in sounds if (value := sound[name]) is not None]
            found[f"sound/{name}"] = fmean(values) if values else None
        if self.clips:
            found["sound/flagged"] = fmean(bool(clip.flags) for clip in self.clips)
        return {name: value for name, value in found.items() if value is not None and np.isfinite(value)}


@dataclass(frozen=True)
class Yardsticks:
    """Real music that models are measured against, by encoder; empty where none is given."""

    encoders: Mapping[str, SSLEncoder]
    reference: Mapping[str, Sequence[EmbeddedSong]]
    training: Mapping[str, TrainingWindows]
    real: Mapping[str, Sequence[Nearest]]
    """What real music has in common with the training songs."""
    marks: Mapping[str, float]


def similarity_metrics(name: str, similarities: np.ndarray, limit: float) -> dict[str, float]:
    """Mean and largest similarity of windows to training songs, and the share of them beyond `limit`."""
    return {
        f"{name}/mean": float(similarities.mean()),
        f"{name}/max": float(similarities.max()),
        f"{name}/beyond_mark": float((similarities > limit).mean()),
    }


def read_yardsticks(
    encoders: Mapping[str, SSLEncoder], reference_dir: str | None, training_dir: str | None, notes: Notes
) -> Yardsticks:
    """Embed the reference set and the training songs, which are the reference set where none are given.

    Raises InputError where a folder holds nothing that can be embedded.
    """
    embedded: dict[Path, dict[str, list[EmbeddedSong]]] = {}

    def songs_of(directory: str | None, flag: str) -> dict[str, list[EmbeddedSong]]:
        if directory is None:
            return {}
        root = Path(directory).resolve()
        if root not in embedded:
            paths = find_audio(root, flag)
            embedded[root] = embed_files(paths, root, encoders, notes)
        songs = embedded[root]
        if not all(songs.values()):
            raise InputError("no song here can be used", where=f"{flag} {directory}")
        return songs

    reference = songs_of(reference_dir, "--reference_dir")
    trained_on = songs_of(training_dir, "--training_dir") if training_dir is not None else reference
    training, real = {}, {}
    for encoder, songs in trained_on.items():
        if sum(len(song.vectors) for song in songs) < 2:
            notes.warn(f"with one window of training songs nothing is said of repetition ({encoder})")
            continue
        windows = TrainingWindows(songs)
        known = {song.content for song in songs}
        new = [song for song in reference.get(encoder, ()) if song.content not in known]
        found = baseline(windows, new or songs)
        if not found:
            notes.warn(
                f"one training song alone gives no baseline of repetition, which is left out ({encoder})"
            )
            continue
        training[encoder], real[encoder] = windows, found
    marks = {encoder: mark(found) for encoder, found in real.items()}
    return Yardsticks(encoders, reference, training, real, marks)


def score_clips(
    label: str,
    clips: Sequence[Clip],
    yardsticks: Yardsticks,
    notes: Notes,
    draw: Callable[[Clip, np.ndarray], Path],
) -> tuple[list[ClipScore], dict[str, FrechetScore]]:
    """Measure a model's clips, each and all together; `draw` makes the picture of one from its wave (2, n)."""
    scores: list[ClipScore] = []
    made: dict[str, list[np.ndarray]] = {encoder: [] for encoder in yardsticks.encoders}
    for clip in Progress(f"measuring {label}", len(clips), "clips").over(clips):
        if clip.path is None:
            notes.warn(f"{label} made no sound of {clip.key}: it is not finite")
            scores.append(ClipScore(clip, None, flags=[NOT_FINITE]))
            continue
        try:
            wave, content = read_wave(clip.path), audio_sha256(clip.path)
        except AudioError as error:
            notes.warn(f"{clip.key} of {label} is left out: {error}")
            continue
        sound = score_sound(wave)
        score = ClipScore(clip, sound, picture=draw(clip, wave), flags=list(sound.flags))
        embedded = embed_song(f"{label}/{clip.key}", content, wave, yardsticks.encoders, notes)
        if yardsticks.encoders and not embedded:
            score.flags.append(NOT_FINITE)
        for encoder, song in embedded.items():
            made[encoder].append(song.apart)
            if encoder in yardsticks.training and (nearest := yardsticks.training[encoder].nearest(song)):
                score.nearest[encoder] = nearest
        scores.append(score)
    reference = {name: [song.apart for song in songs] for name, songs in yardsticks.reference.items()}
    return scores, distances_from(label, made, reference, notes)


def distances_from(
    label: str,
    made: Mapping[str, Sequence[np.ndarray]],
    reference: Mapping[str, Sequence[np.ndarray]],
    notes: Notes,
) -> dict[str, FrechetScore]:
    """The Fréchet distances of a model's clips in each encoder, with a note of what they are not good for."""
    found: dict[str, FrechetScore] = {}
    for encoder, songs in reference.items():
        windows = min(sum(map(len, made[encoder])), sum(map(len, songs)))
        if windows >= 2:
            found[encoder] = score_frechet(made[encoder], songs)
    for encoder in (name for name in reference if name not in found):
        notes.warn(f"{label} has no Fréchet distance in {encoder}: both sets need two windows of 5 s")
    without = sorted(encoder for encoder, score in found.items() if score.infinity is None)
    if without:
        counts = f"{len(made[without[0]])} clips and {len(reference[without[0]])} reference songs"
        notes.warn(
            f"the Fréchet distance of {label} has no interval and no FAD∞: {counts}, and each set needs {LEAST_SONGS}"
        )
    for encoder in (name for name in found if name not in without):
        windows, width = sum(map(len, made[encoder])), reference[encoder][0].shape[1]
        if windows <= width:
            notes.tell(
                f"note: {windows} windows of {label} in the {width} dimensions of {encoder}: the distance itself is "
                "too large, and good for comparing models with as many clips"
            )
    return found


def score_rows(scores: Sequence[ModelScore]) -> list[dict[str, Any]]:
    """A row a model, its figures by name; all rows have the same columns."""
    metrics = [score.metrics() for score in scores]
    names = list(dict.fromkeys(name for found in metrics for name in found))
    return [
        {
            "model": score.label,
            "kind": score.kind,
            "path": score.path,
            "strength": score.strength,
            "clips": len(score.clips),
            **{name: found.get(name) for name in names},
        }
        for score, found in zip(scores, metrics, strict=True)
    ]


def clip_rows(scores: Sequence[ModelScore], folder: Path) -> list[dict[str, Any]]:
    """A row a clip; files within `folder` are named from there."""
    encoders = list(dict.fromkeys(encoder for score in scores for encoder in score.marks))
    return [_clip_row(score.label, clip, encoders, folder) for score in scores for clip in score.clips]


def _clip_row(label: str, score: ClipScore, encoders: Sequence[str], folder: Path) -> dict[str, Any]:
    nothing = dict.fromkeys(("seconds", "loudness_lufs", "peak", "clipped", "silence", "centroid_hz"))
    row = {
        "model": label,
        "key": score.clip.key,
        "file": _named(score.clip.path, folder),
        "picture": _named(score.picture, folder),
        "prompt": score.clip.prompt,
        "seed": score.clip.seed,
        **(nothing if score.sound is None else score.sound.figures()),
        "flags": score.flags,
    }
    for encoder in encoders:
        row |= _nearest_columns(encoder, score.nearest.get(encoder))
    return row


def _nearest_columns(encoder: str, nearest: Nearest | None) -> dict[str, Any]:
    columns = [f"{encoder}/{name}" for name in ("nearest", "nearest_mean", "nearest_song", "nearest_seconds")]
    if nearest is None:
        return dict.fromkeys(columns)
    at = nearest.closest
    values = (
        float(nearest.similarities[at]),
        float(nearest.similarities.mean()),
        nearest.nearest_songs[at],
        nearest.nearest_seconds[at],
    )
    return dict(zip(columns, values, strict=True))


def _named(path: Path | None, folder: Path) -> str | None:
    if path is None:
        return None
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
