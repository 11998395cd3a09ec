"""Sections of a page about a run. What a section is about may be missing, which it then says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

from acestep_ray.config import TrainConfig
from acestep_ray.errors import AceStepError
from acestep_ray.hidden_secrets import without_secrets
from acestep_ray.reporting.curves import Curve
from acestep_ray.reporting.page import Page
from acestep_ray.reporting.plots import draw_losses, draw_norms, draw_quarters, draw_steps
from acestep_ray.reporting.run import Run
from acestep_ray.reporting.samples import spread
from acestep_ray.reporting.songs import LENGTH_SECONDS, count_songs
from acestep_ray.terminal.numbers import number_text
from acestep_ray.training.validation import FIXED_NOISE, VALIDATION
from acestep_ray.units import size_text

ROWS = 20
"""Of a table with a row for each validation or checkpoint."""
REJECT_ROWS = 100
_LINES = 20
"""At most so many curves are in a figure."""
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
_QUARTERS = {"q1": "most noise (q1)", "q2": "q2", "q3": "q3", "q4": "least noise (q4)"}
_MEASURES = {FIXED_NOISE: "Songs that are trained on", VALIDATION: "Held-out songs"}
_SPEEDS = {
    "throughput/audio_seconds_per_second": "seconds of audio a second (× real time)",
    "throughput/songs_per_second": "songs a second",
    "throughput/steps_per_second": "steps a second",
    "throughput/tflops": "TFLOP/s",
    "throughput/mfu": "share of the GPUs' peak (MFU)",
    "throughput/data_wait": "share of time spent waiting for data",
    "memory/allocated_gb": "memory, GB",
}


def add_curves(page: Page, run: Run) -> None:
    """Losses, learning rate, gradient norm, speed and waits, step by step."""
    page.section("Curves")
    losses = run.loss_curves()
    if losses:
        told = "; ".join(f"{name} {_ends(curve)}" for name, curve in losses.items())
        page.figure(draw_losses(losses), f"Loss by step: {told}", "Loss by step")
    else:
        page.note("No losses are at hand.")
    parts = {
        name.removeprefix("loss/"): curve
        for name, curve in run.log.curves.items()
        if name.startswith("loss/") and name.split("/")[1] not in _MEASURES
    }
    parts = dict(list(parts.items())[:_LINES])
    waits = {"": {step: 100 * share for step, share in run.log["throughput/data_wait"].items()}}
    small: list[tuple[str, Mapping[str, Curve], bool]] = [
        ("Parts of the loss", parts, False),
        ("Learning rate", {"": run.log["learning_rate"]}, False),
        ("Gradient norm", {"": run.log["grad_norm"]}, True),
        ("Seconds of audio a second", {"": run.log["throughput/audio_seconds_per_second"]}, False),
        ("Time spent waiting for data, %", waits, False),
        ("Memory, GB", {"": run.log["memory/allocated_gb"]}, False),
    ]
    for title, curves, logarithmic in small:
        there = {name: curve for name, curve in curves.items() if curve}
        if there:
            told = "; ".join(f"{name} {_ends(curve)}".strip() for name, curve in there.items())
            page.figure(draw_steps(title, there, logarithmic=logarithmic), f"{title} by step: {told}")


def add_quarters(page: Page, run: Run) -> None:
    """The loss over fixed noise by quarter of the noise levels."""
    page.section(
        "Validation by quarter of the noise",
        "The same songs with the same noise every time, so that values can be compared. With the most noise the model "
        "plans the song, with the least it polishes the sound.",
    )
    found = {name: run.quarters(name) for name in _MEASURES}
    if not any(found.values()):
        page.note("No validation was measured (yet).")
        return
    for name, quarters in found.items():
        if quarters:
            told = "; ".join(f"{quarter} {_ends(curve)}" for quarter, curve in quarters.items())
            named = {_QUARTERS[quarter]: curve for quarter, curve in quarters.items()}
            page.figure(draw_quarters(_MEASURES[name], named), f"{_MEASURES[name]}, loss by step: {told}")
    for name, quarters in found.items():
        whole = run.curve(name)
        rows = [
            [step, whole.get(step), *(curve.get(step) for curve in quarters.values())]
            for step in spread(sorted({step for curve in quarters.values() for step in curve}), ROWS)
        ]
        if rows:
            page.table(
                ["step", "all", *(_QUARTERS[quarter] for quarter in quarters)], rows, caption=_MEASURES[name]
            )


def add_songs(page: Page, dataset_path: str | None, experiment: Path) -> None:
    """How many songs there are, and which could not be used."""
    page.section("Songs")
    try:
        counts = count_songs(dataset_path, experiment)
    except (AceStepError, OSError) as error:
        page.note(f"The songs are not at hand: {error}")
        return
    reasons = Counter(reject["reason"] for reject in counts.rejects)
    facts = {"songs": f"{counts.songs:,}", "audio": _hours(counts.seconds)}
    if counts.languages:
        facts["languages"] = ", ".join(f"{name} {count:,}" for name, count in counts.languages.items())
    facts["not usable"] = (
        ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common()) or "none"
    )
    page.facts(facts)
    if counts.lengths:
        lengths = [
            (f"{i * LENGTH_SECONDS} to {(i + 1) * LENGTH_SECONDS} s", count)
            for i, count in enumerate(counts.lengths)
        ]
        page.table(["length", "songs"], lengths, caption="Songs by length")
    if counts.rejects:
        columns = ["key", "filename", "stage", "reason", "message"]
        rows = [[_setting(reject[column]) for column in columns] for reject in counts.rejects[:REJECT_ROWS]]
        of = (
            f", the first {REJECT_ROWS} of {len(counts.rejects):,}"
            if len(counts.rejects) > REJECT_ROWS
            else ""
        )
        page.table(columns, rows, caption=f"Songs that could not be used{of}")


def add_speed(page: Page, run: Run) -> None:
    """How fast the run was."""
    page.section("Speed")
    rows = [
        [told, median(values), fmean(values), max(values), values[-1]]
        for name, told in _SPEEDS.items()
        if (values := list(run.log[name].values()))
    ]
    if rows:
        page.table(["of all GPUs together", "median", "mean", "most", "last"], rows)
    else:
        page.note("No speed was measured (yet).")
    if run.tracked is not None:
        # `mlflow.` begins tags of MLflow's own.
        tags = {
            name.removeprefix("version."): v
            for name, v in run.tracked.tags.items()
            if not name.startswith(("mlflow.", "fingerprint."))
        }
        commit = run.tracked.tags.get("mlflow.source.git.commit")
        page.facts({**tags, **({"commit": commit} if commit else {})})


def add_lora(page: Page, place: str, config: Mapping[str, Any]) -> None:
    """What the LoRA in a checkpoint, a folder or a file holds; `config` is what it was made with."""
    from acestep_ray.export.fetched import fetched_lora
    from acestep_ray.export.info import lora_figures
    from acestep_ray.export.source import open_source

    page.section("The LoRA")
    if config:
        page.facts({name: value for name, value in config.items() if value not in (None, {}, [])})
    try:
        with fetched_lora(place) as path:
            figures_of_each = [lora_figures(one) for one in open_source(path, where="report").loras.values()]
    except (AceStepError, OSError) as error:
        page.note(f"No LoRA is at hand: {error}")
        return
    for figures in figures_of_each:
        targets = ", ".join(f"{name} × {count}" for name, count in figures["targets"].items())
        page.facts(
            {
                "size": size_text(figures["bytes"]),
                "parameters": f"{figures['parameters']:,}",
                "rank": figures["ranks"],
                "on": targets,
            }
        )
        norms: dict[str, dict[int, float]] = {}
        for name, module in figures["modules"].items():
            if match := _BLOCK.fullmatch(name):
                norms.setdefault(match[2], {})[int(match[1])] = module["norm"]
        if norms:
            told = "; ".join(f"{name} {_ends(curve)}" for name, curve in norms.items())
            page.figure(draw_norms(norms), f"Norm of the LoRA's change by block, first to last: {told}")


def add_checkpoints(page: Page, run: Run) -> None:
    """The checkpoints, the best marked."""
    page.section("Checkpoints")
    if not run.checkpoints:
        page.note(f"There is no checkpoint (yet) in {run.store.url}.")
        return
    page.text(f"In {run.store.url}; the one with the lowest validation loss is marked.")
    fixed, held_out = run.curve(FIXED_NOISE), run.curve(VALIDATION)
    shown = spread(run.checkpoints, ROWS)
    shown += [one for one in run.checkpoints if one.step == run.best and one not in shown]
    shown.sort(key=lambda one: one.step)
    rows = [
        [
            one.step,
            None if one.num_bytes is None else size_text(one.num_bytes),
            fixed.get(one.step),
            held_out.get(one.step),
            one.problem or "whole",
        ]
        for one in shown
    ]
    marked = next((number for number, one in enumerate(shown) if one.step == run.best), None)
    of = f", {len(shown)} of {len(run.checkpoints)}" if len(shown) < len(run.checkpoints) else ""
    page.table(
        ["step", "size", "fixed noise", "held-out songs", "state"],
        rows,
        align="rrrrl",
        caption=f"Checkpoints{of}",
        marked=marked,
    )


def add_settings(page: Page, settings: Mapping[str, Any]) -> None:
    """The settings of a run; those that are not the defaults first."""
    page.section("Settings")
    if not settings:
        page.note("The settings are not at hand.")
        return
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    changed = [name for name in settings if name not in defaults or settings[name] != defaults[name]]
    for caption, names in (
        ("Other than the defaults", changed),
        ("As the defaults are", [name for name in settings if name not in changed]),
    ):
        rows = [[name, _setting(settings[name])] for name in names]
        if rows:
            page.table(["setting", "value"], rows, align="ll", caption=caption)


def _setting(value: Any) -> Any:
    return without_secrets(value) if isinstance(value, str) else value


def _ends(curve: Mapping[int, float]) -> str:
    """What a curve comes to, for who does not see it."""
    values: Sequence[float] = list(curve.values())
    return f"from {number_text(values[0], 4)} to {number_text(values[-1], 4)}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
