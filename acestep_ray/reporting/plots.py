"""Curves of a run as figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from acestep_ray.drawn_text import literal
from acestep_ray.reporting.curves import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINING = "training"
"""Name of the curve of a loss that was measured at every step."""
_SMOOTHED_POINTS = 20
# Beyond these, single steps are narrower than a pixel.
_DRAWN_POINTS = 600
_SIZE = (5.6, 3.0)
_WIDE = (7.6, 3.8)


def draw_losses(losses: Mapping[str, Curve], title: str = "") -> Figure:
    """Loss curves by step; that of single steps, `TRAINING`, is drawn faintly with its running mean."""
    figure, axes = _axes(_WIDE, title)
    for name, curve in losses.items():
        if name == TRAINING:
            _plot_steps(axes, name, curve)
        else:
            axes.plot(list(curve), list(curve.values()), marker="o", markersize=3, label=literal(name))
    axes.set_ylabel("loss")
    axes.legend()
    return figure


def draw_steps(title: str, curves: Mapping[str, Curve], *, logarithmic: bool = False) -> Figure:
    """Curves of single steps in one small figure."""
    figure, axes = _axes(_SIZE, title)
    for name, curve in curves.items():
        _plot_steps(axes, name, curve)
    if logarithmic:
        axes.set_yscale("log")
    if len(curves) > 1:
        axes.legend()
    return figure


def draw_quarters(title: str, quarters: Mapping[str, Curve]) -> Figure:
    """A loss by the noise that it was measured at."""
    figure, axes = _axes(_SIZE, title)
    for name, curve in quarters.items():
        axes.plot(list(curve), list(curve.values()), marker="o", markersize=3, label=literal(name))
    axes.set_ylabel("loss")
    axes.legend()
    return figure


def draw_trials(trials: Mapping[str, Curve]) -> Figure:
    """Validation losses of a search's trials, the best first and thick."""
    from matplotlib import colormaps

    figure, axes = _axes(_WIDE, f"{len(trials)} trials; the best is thick")
    colours = colormaps["viridis"]
    for number, (name, curve) in reversed(list(enumerate(trials.items()))):
        axes.plot(
            list(curve),
            list(curve.values()),
            # Of viridis only what shows on light and on dark.
            color="tab:red" if number == 0 else colours(0.3 + 0.5 * number / len(trials)),
            linewidth=3 if number == 0 else 1.2,
            alpha=1.0 if number == 0 else 0.75,
            marker="o",
            markersize=3,
            label=f"{literal(name)}, the best" if number == 0 else None,
        )
    axes.set_ylabel("validation loss")
    axes.legend()
    return figure


def draw_norms(norms: Mapping[str, Mapping[int, float]]) -> Figure:
    """Norms of what a LoRA adds to the weights: a line for each kind of module, a point for each block."""
    figure, axes = _axes(_WIDE, "What the LoRA adds to each weight")
    for name, by_block in norms.items():
        axes.plot(list(by_block), list(by_block.values()), marker="o", markersize=3, label=literal(name))
    axes.set(xlabel="block of the transformer", ylabel="Frobenius norm")
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize="small", ncols=2)
    return figure


def _axes(size: tuple[float, float], title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(title=literal(title), xlabel="step")
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    return figure, axes


def _plot_steps(axes: Axes, name: str, curve: Curve) -> None:
    """A value of every step: faint with its running mean; of very many steps, from the least to the most of several."""
    steps, values = np.array(list(curve)), np.array(list(curve.values()), dtype=np.float64)
    width = max(1, len(values) // _SMOOTHED_POINTS)
    if width == 1:
        axes.plot(steps, values, label=literal(name))
        return
    sums = np.cumsum([0.0, *np.nan_to_num(values)])
    counts = np.cumsum([0, *np.isfinite(values)])
    means = (sums[width:] - sums[:-width]) / np.maximum(counts[width:] - counts[:-width], 1)
    size = -(-len(values) // _DRAWN_POINTS)
    label = f"{literal(name)}, mean of {width} steps"
    (line,) = axes.plot(steps[width - 1 :: size], means[::size], label=label)
    if size == 1:
        axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.8)
        return
    starts = np.arange(0, len(values), size)
    axes.fill_between(
        steps[starts],
        np.fmin.reduceat(values, starts),
        np.fmax.reduceat(values, starts),
        color=line.get_color(),
        alpha=0.2,
        linewidth=0,
    )
