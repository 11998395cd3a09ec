"""The one-page picture of a training run."""

from __future__ import annotations

import math
import time
from datetime import datetime
from typing import Any

from acestep_ray import __version__
from acestep_ray.reporting.page import Page
from acestep_ray.reporting.run import Run
from acestep_ray.reporting.samples import add_samples
from acestep_ray.reporting.sections import (
    add_checkpoints,
    add_curves,
    add_lora,
    add_quarters,
    add_settings,
    add_songs,
    add_speed,
)
from acestep_ray.terminal.numbers import number_text
from acestep_ray.training.experiment import noted_place
from acestep_ray.training.validation import FIXED_NOISE, VALIDATION


def write_run(page: Page, run: Run) -> None:
    """Fill a page with all there is of a run."""
    with page.guarded("the overview"):
        page.facts(_overview(run))
    with page.guarded("the warnings"):
        warnings = find_warnings(run)
        if warnings:
            page.section("Warnings")
            for warning in warnings:
                page.note(warning)
    with page.guarded("the curves"):
        add_curves(page, run)
    with page.guarded("the validation"):
        add_quarters(page, run)
    page.section("Samples")
    with page.guarded("the samples"):
        add_samples(page, run)
    with page.guarded("the songs"):
        add_songs(page, noted_place(run.settings.get("dataset_path"), run.experiment), run.experiment)
    with page.guarded("the speed"):
        add_speed(page, run)
    with page.guarded("the LoRA"):
        if run.lora or run.settings.get("lora_config_path", "not known") is not None:
            step = next((one.step for one in reversed(run.checkpoints) if one.problem is None), None)
            add_lora(page, run.place if step is None else run.store.child(f"step={step}").url, run.lora)
    with page.guarded("the checkpoints"):
        add_checkpoints(page, run)
    with page.guarded("the settings"):
        add_settings(page, run.settings)


def state_of(run: Run) -> str:
    """How far a run is."""
    stopped = run.losses.get("stopped_early")
    if run.under_way:
        return "under way"
    if stopped is not None:
        return f"finished: stopped early at step {stopped}, for the validation loss did not fall any more"
    if run.total_steps is not None and run.step >= run.total_steps:
        return "finished"
    if run.tracked is not None and run.tracked.status == "FINISHED":
        return "finished"
    saved = run.checkpoints[-1].step if run.checkpoints else None
    goes_on = "" if saved is None else f"; the same command goes on from step {saved}"
    failed = run.tracked is not None and run.tracked.status == "FAILED"
    return f"{'failed' if failed else 'not finished'}{goes_on}"


def find_warnings(run: Run) -> list[str]:
    """What a reader should know before trusting the rest."""
    found = []
    skipped = max(run.losses.get("skipped", 0), int(max(run.log["skipped_steps"].values(), default=0)))
    if skipped:
        found.append(f"Steps that were skipped, for their loss or gradient was not finite: {skipped}.")
    broken = [step for step, value in run.log["loss"].items() if not math.isfinite(value)]
    if broken:
        found.append(f"Steps at which the loss was not finite: {len(broken)}, the first of them {broken[0]}.")
    if run.tracked is not None and run.tracked.status == "FAILED":
        found.append("MLflow has this run as failed.")
    found += [
        f"The checkpoint of step {one.step} does not read: {one.problem}"
        for one in run.checkpoints
        if one.problem
    ]
    held_out = run.curve(VALIDATION)
    if held_out:
        lowest = min(held_out, key=lambda step: (held_out[step], step))
        last = max(held_out)
        if held_out[last] > held_out[lowest]:
            found.append(
                f"The loss of the held-out songs was lowest at step {lowest} ({number_text(held_out[lowest], 4)}) "
                f"and has risen to {number_text(held_out[last], 4)} since: later checkpoints have learned songs by "
                "heart."
            )
    return found + [f"Not in this page: {what}" for what in run.missing]


def _overview(run: Run) -> dict[str, Any]:
    steps = f"{run.step:,}" if run.total_steps is None else f"{run.step:,} of {run.total_steps:,}"
    facts: dict[str, Any] = {"state": state_of(run), "steps": steps}
    for name, curve in run.loss_curves().items():
        values = list(curve.values())
        facts[f"loss, {name}"] = f"{values[0]:.4f} → {values[-1]:.4f}"
    if run.best is not None:
        measured = run.curve(VALIDATION) or run.curve(FIXED_NOISE)
        facts["best checkpoint"] = f"step {run.best}, {measured[run.best]:.4f}"
    if run.log.began is not None and run.log.ended is not None:
        facts["begun"] = _time(run.log.began)
        facts["last written to the log"] = _time(run.log.ended)
    facts["folder"] = run.place
    facts["curves from"] = run.log.source
    if run.tracked is not None:
        facts["MLflow"] = f"{run.tracked.run_id} at {run.tracked.tracking_uri}, {run.tracked.status.lower()}"
    facts["this page"] = f"{_time(time.time())}, acestep-ray {__version__}"
    return {name: value for name, value in facts.items() if value is not None}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
