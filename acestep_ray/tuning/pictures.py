"""A search as pictures: parallel coordinates, and rank by learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acestep_ray.drawn_text import literal
from acestep_ray.terminal.numbers import number_text
from acestep_ray.tuning.records import TrialRecord
from acestep_ray.tuning.space import DIMENSIONS

PARALLEL, RANK_BY_RATE = "parallel_coordinates.png", "rank_by_learning_rate.png"
_COLOURS = "viridis"  # the lowest loss is the darkest
_LABEL_BACKGROUND = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}


def draw_parallel_coordinates(trials: Sequence[TrialRecord], path: Path) -> None:
    """A line a trial through its parameters to its lowest validation loss; `trials` are ranked, the best first."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    axes = [_Axis(name, [trial.params[name] for trial in trials]) for name in trials[0].params]
    axes = [axis for axis in axes if len(set(axis.values)) > 1]
    axes.append(_Axis("validation", [trial.lowest for trial in trials]))
    figure = Figure(figsize=(2.2 * len(axes), 5.5), layout="constrained")
    plot = figure.subplots()
    colours = colormaps[_COLOURS]
    for number in reversed(range(len(trials))):
        share = number / max(1, len(trials) - 1)
        plot.plot(
            range(len(axes)),
            [axis.places[number] for axis in axes],
            color=colours(0.9 * share),
            linewidth=3 if number == 0 else 1.2,
            alpha=1.0 if number == 0 else 0.75,
        )
    for place, axis in enumerate(axes):
        plot.axvline(place, color="0.6", linewidth=0.8, zorder=0)
        for height, label in axis.labels():
            text = literal(label).replace("+", "\n+ ")
            plot.text(place + 0.02, height, text, fontsize=7, va="center", bbox=_LABEL_BACKGROUND)
    plot.set_xticks(range(len(axes)), [literal(axis.name) for axis in axes])
    plot.set_yticks([])
    plot.set_xlim(-0.1, len(axes) - 0.4)
    plot.set_ylim(-0.12, 1.12)
    plot.set_title(f"{len(trials)} trials; the best is thick")
    figure.savefig(path, dpi=120)


def draw_rank_by_learning_rate(trials: Sequence[TrialRecord], path: Path) -> bool:
    """A point a trial, coloured by its lowest validation loss; False, and no picture, where neither is searched."""
    from matplotlib.figure import Figure

    if not {"rank", "learning_rate"} <= trials[0].params.keys():
        return False
    figure = Figure(figsize=(7, 5), layout="constrained")
    plot = figure.subplots()
    losses = [trial.lowest for trial in trials]
    points = plot.scatter(
        [trial.params["learning_rate"] for trial in trials],
        [trial.params["rank"] for trial in trials],
        c=losses,
        s=90,
        cmap=_COLOURS,
        edgecolors="0.3",
    )
    best = trials[0].params
    plot.scatter([best["learning_rate"]], [best["rank"]], s=260, facecolors="none", edgecolors="crimson")
    plot.set_xscale("log")
    plot.set_yscale("log", base=2)
    ranks = sorted({trial.params["rank"] for trial in trials})
    plot.set_yticks(ranks, [str(rank) for rank in ranks])
    plot.set_xlabel("learning rate")
    plot.set_ylabel("rank")
    plot.set_title("lowest validation loss; the best trial is ringed")
    figure.colorbar(points)
    figure.savefig(path, dpi=120)
    return True


class _Axis:
    """One axis of the parallel coordinates, from 0 to 1: logarithmic, even, or a place for each text."""

    def __init__(self, name: str, values: Sequence[Any]):
        self.name = name
        self.texts = sorted({value for value in values if isinstance(value, str)})
        numbers = [self._scaled(value) for value in values if not isinstance(value, str)]
        self.low, self.high = (min(numbers), max(numbers)) if numbers else (0.0, 0.0)
        self.values = values
        self.places = [self._place(value) for value in values]

    def labels(self) -> list[tuple[float, str]]:
        """Heights and what to write there."""
        numbers = sorted({value for value in self.values if not isinstance(value, str)})
        shown = numbers if len(numbers) <= 8 else [numbers[0], numbers[-1]]
        return [
            (self._place(value), value if isinstance(value, str) else number_text(value))
            for value in [*self.texts, *shown]
        ]

    def _scaled(self, value: float) -> float:
        dimension = DIMENSIONS.get(self.name)
        is_logarithmic = dimension is not None and dimension.is_logarithmic
        return math.log(value) if is_logarithmic else float(value)

    def _place(self, value: Any) -> float:
        # Texts have the upper part of an axis that has numbers too.
        if isinstance(value, str):
            steps = max(1, len(self.texts) - 1)
            start = 0.0 if self.low == self.high == 0.0 else 0.6
            return start + (1 - start) * self.texts.index(value) / steps
        top = 0.5 if self.texts else 1.0
        if self.high == self.low:
            return top / 2
        return top * (self._scaled(value) - self.low) / (self.high - self.low)
