"""What an evaluation leaves: tables for programs, and a page to read and listen to that needs no other file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from acestep_ray.drawn_text import literal
from acestep_ray.evaluation.nearest import CHANCE, Nearest
from acestep_ray.evaluation.scores import (
    ClipScore,
    ModelScore,
    Yardsticks,
    clip_rows,
    score_rows,
    similarity_metrics,
)
from acestep_ray.reporting import Page
from acestep_ray.storage import Store
from acestep_ray.terminal import column_table, fact_table
from acestep_ray.terminal.numbers import number_text
from acestep_ray.tracking import mlflow_command
from acestep_ray.training.validation import NOISE_LEVELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_FILE = "index.html"
SCORES_FILE = "scores.json"
MODELS_TABLE = "scores.parquet"
CLIPS_TABLE = "clips.parquet"
REAL = "real music"

_ABOUT_LOSS = (
    "The mean denoising loss of songs over fixed noise: the same songs, noise and noise levels for every model, so "
    "that two values can be compared. Lower is better."
)
_ABOUT_FRECHET = (
    "How far the clips are from the reference set, in the features of the checkpoint's SSL encoders; lower is nearer. "
    "FAD∞ is the distance without the error that small sets bring. The interval holds the true distance in 95 of 100 "
    "evaluations; models whose intervals overlap much are not told apart. Figures of different encoders, or of "
    "evaluations with other reference sets, cannot be compared."
)
_ABOUT_NEAREST = (
    "How alike the clips' windows of 5 s are to their nearest windows of the training songs: 1 is a copy. What counts "
    f"is the difference to real music. The mark is what {CHANCE:.0%} of real music's windows exceed; a model that "
    "copies nothing has about as many beyond it."
)


@dataclass
class EvaluateSummary:
    """What was measured."""

    rows: list[dict[str, Any]]
    """A row a model, as in `scores.parquet`."""
    encoders: list[str]
    notes: list[str]
    output: Store
    tracking_uri: str | None
    wall_seconds: float

    def render(self) -> str:
        """The summary as text."""
        columns, rows = overview(self.rows, self.encoders)
        models = column_table(columns, [[_cell(value) for value in row] for row in rows])
        warnings = [note.partition(": ")[2] for note in self.notes if note.startswith("warning: ")]
        made: list[tuple[str, object]] = [
            *(("warning", warning) for warning in warnings),
            ("report", self.output.place_of(PAGE_FILE)),
            ("scores", self.output.place_of(SCORES_FILE)),
        ]
        if self.tracking_uri is not None:
            made.append(("MLflow", mlflow_command(self.tracking_uri)))
        return f"\n{models}\n\n{fact_table([*made, ('took', f'{self.wall_seconds:,.0f} s')])}"


def overview(
    rows: Sequence[Mapping[str, Any]], encoders: Sequence[str]
) -> tuple[list[str], list[list[float | str | None]]]:
    """The table of all models: its columns, those that hold anything, and its rows."""
    columns = {"model": "model", "loss": "loss/validation"}
    for encoder in encoders:
        has_infinity = any(row.get(f"frechet/{encoder}/infinity") is not None for row in rows)
        name = f"frechet/{encoder}/infinity" if has_infinity else f"frechet/{encoder}"
        columns[f"FAD∞ {encoder}" if has_infinity else f"FAD {encoder}"] = name
    for encoder in encoders:
        columns[f"nearest {encoder}"] = f"nearest/{encoder}/mean"
    columns |= {"LUFS": "sound/loudness_lufs", "clipped": "sound/clipped", "silent": "sound/silence"}
    columns |= {"centroid Hz": "sound/centroid_hz", "flagged": "sound/flagged"}
    there = {
        column: name for column, name in columns.items() if any(row.get(name) is not None for row in rows)
    }
    return list(there), [[_with_interval(row, name) for name in there.values()] for row in rows]


def _with_interval(row: Mapping[str, Any], name: str) -> float | str | None:
    """A figure; FAD∞ with its interval, and the plain distance where there is none."""
    value, stem = row.get(name), name.removesuffix("/infinity")
    if stem == name:
        return value
    if value is not None:
        low, high = (number_text(row[f"{stem}/{end}"], 4) for end in ("low", "high"))
        return f"{number_text(value, 4)} ({low} to {high})"
    distance = row.get(stem)
    return None if distance is None else f"{number_text(distance, 4)}, no FAD∞"


def write_tables(
    folder: Path,
    scores: Sequence[ModelScore],
    yardsticks: Yardsticks,
    settings: Mapping[str, Any],
    notes: Sequence[str],
) -> None:
    """Write `scores.json`, which has everything, `scores.parquet`, a row a model, and `clips.parquet`, a row a clip."""
    models, clips = score_rows(scores), clip_rows(scores, folder)
    pq.write_table(pa.Table.from_pylist(models), folder / MODELS_TABLE)
    pq.write_table(pa.Table.from_pylist(clips), folder / CLIPS_TABLE)
    everything = {
        "settings": dict(settings),
        "notes": list(notes),
        "real_music": {
            encoder: {**_of_real_music(found, yardsticks.marks[encoder]), "mark": yardsticks.marks[encoder]}
            for encoder, found in yardsticks.real.items()
        },
        "models": [
            {
                **row,
                "loss_by_noise_level": score.losses,
                "frechet": {encoder: asdict(found) for encoder, found in score.frechet.items()},
                "clips": [clip for clip in clips if clip["model"] == score.label],
            }
            for row, score in zip(models, scores, strict=True)
        ],
    }
    text = json.dumps(_finite(everything), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / SCORES_FILE).write_text(text + "\n", encoding="utf-8")


def _of_real_music(found: Sequence[Nearest], limit: float) -> dict[str, float]:
    metrics = similarity_metrics("", np.concatenate([one.similarities for one in found]), limit)
    return {name.removeprefix("/"): value for name, value in metrics.items()}


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_page(
    path: Path,
    name: str,
    scores: Sequence[ModelScore],
    yardsticks: Yardsticks,
    curves: Mapping[str, Figure],
    notes: Sequence[str],
) -> None:
    """Write the page; `curves` are the models' losses in training."""
    encoders = list(yardsticks.encoders)
    page = Page(f"Evaluation {name}")
    page.section("Models")
    columns, rows = overview(score_rows(scores), encoders)
    page.table(columns, rows)
    for note in notes:
        page.note(note) if note.startswith("warning") else page.text(note)
    if any(score.losses is not None for score in scores):
        page.section("Loss by noise level", _ABOUT_LOSS)
        page.figure(draw_losses(scores), alt="Denoising loss of each model by noise level")
    if any(score.frechet for score in scores):
        page.section("Distance from the reference", _ABOUT_FRECHET)
        for encoder in yardsticks.reference:
            page.figure(draw_distances(scores, encoder), alt=f"Fréchet distance of each model in {encoder}")
    for encoder, found in yardsticks.real.items():
        if encoder == next(iter(yardsticks.real)):
            page.section("Nearness to training songs", _ABOUT_NEAREST)
        _add_nearest(page, scores, encoder, _of_real_music(found, yardsticks.marks[encoder]))
    if curves:
        page.section("Training")
        for label, figure in curves.items():
            page.figure(figure, alt=f"Losses of {label} by training step")
    _add_clips(page, scores)
    page.write(path)


def _add_nearest(page: Page, scores: Sequence[ModelScore], encoder: str, real: Mapping[str, float]) -> None:
    rows: list[list[Any]] = [[REAL, real["mean"], real["max"], real["beyond_mark"], None, None]]
    for score in scores:
        metrics = score.metrics()
        clips = [clip for clip in score.clips if encoder in clip.nearest]
        if not clips:
            continue
        closest = max(clips, key=lambda clip: clip.nearest[encoder].similarities.max())
        nearest = closest.nearest[encoder]
        at = nearest.closest
        rows.append(
            [
                score.label,
                *(metrics[f"nearest/{encoder}/{name}"] for name in ("mean", "max", "beyond_mark")),
                closest.clip.key,
                f"{nearest.nearest_songs[at]} at {nearest.nearest_seconds[at]:.1f} s",
            ]
        )
    columns = ["", "mean", "largest", "beyond the mark", "clip with the largest", "nearest training song"]
    page.table(columns, rows, caption=encoder)


def _add_clips(page: Page, scores: Sequence[ModelScore]) -> None:
    """The clips of all models, those of one song beside each other."""
    page.section("Clips")
    clips = [(score.label, clip) for score in scores for clip in score.clips]
    order = {key: number for number, key in enumerate(dict.fromkeys(clip.clip.key for _, clip in clips))}
    for label, clip in sorted(clips, key=lambda item: order[item[1].clip.key]):
        title = f"{label}: {clip.clip.key}"
        if clip.clip.path is None:
            page.note(f"{title}: no sound was made")
        else:
            page.clip(clip.clip.path, title, clip.picture, text=clip.clip.prompt, facts=_facts(clip))


def _facts(clip: ClipScore) -> dict[str, Any]:
    facts: dict[str, Any] = {"flags": clip.flags} if clip.flags else {}
    if clip.sound is not None:
        facts |= {name: value for name, value in clip.sound.figures().items() if value is not None}
    for encoder, nearest in clip.nearest.items():
        at = nearest.closest
        where = f"{nearest.nearest_songs[at]} at {nearest.nearest_seconds[at]:.1f} s"
        facts[f"nearest, {encoder}"] = f"{nearest.similarities[at]:.3f}: {where}"
    return facts


def draw_losses(scores: Sequence[ModelScore]) -> Figure:
    """A line a model through its losses at the noise levels, the noisiest first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    quantiles = [(level + 0.5) / NOISE_LEVELS for level in range(NOISE_LEVELS)]
    for score in scores:
        if score.losses is not None:
            axes.plot(quantiles, score.losses, marker="o", markersize=4, label=literal(score.label))
    axes.set(xlabel="quantile of training's noise levels, the noisiest first", ylabel="denoising loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_distances(scores: Sequence[ModelScore], encoder: str) -> Figure:
    """The distances by how small the sets were made, and FAD∞ with its interval where the sets would be infinite."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for score in scores:
        found = score.frechet.get(encoder)
        if found is None:
            continue
        if found.low is None or found.high is None:
            axes.axhline(found.distance, linestyle=":", label=f"{literal(score.label)} (no FAD∞)")
            continue
        x, y = zip(*found.points, strict=True)
        (line,) = axes.plot(x, y, "o", markersize=4, label=literal(score.label))
        axes.plot(
            [0, max(x)], np.polyval(np.polyfit(x, y, 1), [0, max(x)]), color=line.get_color(), alpha=0.6
        )
        # No error bar: FAD∞ need not lie within.
        axes.plot([0, 0], [found.low, found.high], marker="_", markersize=12, color=line.get_color())
    axes.set(title=encoder, xlabel="1/windows + 1/windows of the reference", ylabel="Fréchet distance")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return number_text(value, 4) if isinstance(value, float) else str(value)
