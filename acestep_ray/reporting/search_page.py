"""The one-page picture of a search."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from acestep_ray import __version__
from acestep_ray.errors import AceStepError
from acestep_ray.plain_files import SETTINGS
from acestep_ray.plain_text import read_utf8
from acestep_ray.plain_yaml import load_yaml
from acestep_ray.reporting.curves import read_log
from acestep_ray.reporting.page import Page
from acestep_ray.reporting.plots import TRAINING, draw_losses, draw_trials
from acestep_ray.reporting.run import is_under_way
from acestep_ray.reporting.sections import add_lora, add_settings, add_songs
from acestep_ray.storage import Store, scratch_folder
from acestep_ray.terminal.numbers import number_text
from acestep_ray.training.experiment import SETTINGS_FILE, noted_place
from acestep_ray.training.validation import FIXED_NOISE, VALIDATION

if TYPE_CHECKING:
    from acestep_ray.tuning.records import TrialRecord

_TRIALS = "trials"


def is_search(folder: Path) -> bool:
    """Whether a folder is that of a search."""
    return (folder / _TRIALS).is_dir()


def write_search(page: Page, folder: Path, place: str | None = None) -> None:
    """Fill a page with all there is of a search, or of a copy of the one at `place`.

    Raises InputError for a trial's record that does not read.
    """
    # Ray and what trains come with these.
    from acestep_ray.tuning.records import SEARCH_FILE, Records
    from acestep_ray.tuning.report import BEST, add_trials, draw_pictures, trial_rows

    place = place or str(folder)
    records = Records(folder)
    states = Counter(record.state for record in records)
    page.facts(
        {
            "state": "under way" if is_under_way(Store.at(place)) else "not under way",
            "trials": ", ".join(f"{count} {state}" for state, count in states.items()) or "none",
            "folder": place,
            "written by": f"acestep-ray {__version__}",
        }
    )
    failed = [record for record in records if record.error]
    if failed:
        page.section("Failures")
        for record in failed:
            page.note(f"{record.name}: {record.error}")
    noted = _read(folder / SEARCH_FILE, page)
    with page.guarded("what is searched"):
        if noted.get("space"):
            page.section("What is searched")
            page.facts(noted["space"])
    with page.guarded("the trials"), scratch_folder() as pictures:
        add_trials(page, trial_rows(records), draw_pictures(pictures, records))
    ranked = records.ranked()
    with page.guarded("the validation losses"):
        _add_validations(page, ranked)
    settings = _read(folder / BEST / SETTINGS_FILE, page)
    with page.guarded("the losses of the best trial"):
        if ranked:
            _add_best_curves(page, folder, ranked[0].name, settings)
    with page.guarded("the LoRA"):
        if (folder / BEST).is_dir():
            add_lora(page, str(folder / BEST), _read(folder / BEST / "lora_config.json", page))
    with page.guarded("the songs"):
        add_songs(page, noted_place(settings.get("dataset_path"), folder), folder)
    with page.guarded("the settings"):
        add_settings(page, settings)


def _add_validations(page: Page, ranked: Sequence[TrialRecord]) -> None:
    """Validation losses of the trials, by step."""
    if not ranked:
        return
    page.section("Validation losses")
    curves = {
        record.name: {int(one["step"]): one["validation"] for one in record.validations} for record in ranked
    }
    page.figure(
        draw_trials(curves),
        f"Validation loss by step of {len(ranked)} trials; the best, {ranked[0].name}, comes to "
        f"{number_text(min(filter(math.isfinite, curves[ranked[0].name].values())), 4)}",
    )


def _add_best_curves(page: Page, folder: Path, trial: str, settings: dict[str, Any]) -> None:
    """The losses of the best trial, where its log is at hand."""
    logger_dir = settings.get("logger_dir") or str(folder.parent / "logs")
    try:
        log = read_log(folder, logger_dir, trial)
    except (AceStepError, OSError) as error:
        page.note(f"TensorBoard's events of {trial}, the best, cannot be read: {error}")
        return
    if not log.curves:
        page.note(f"TensorBoard's events of {trial}, the best, are not at hand.")
        return
    named = {
        TRAINING: log["loss"],
        "fixed noise": log[f"loss/{FIXED_NOISE}"],
        "held-out songs": log[f"loss/{VALIDATION}"],
    }
    losses = {name: curve for name, curve in named.items() if curve}
    if losses:
        page.figure(draw_losses(losses), f"Losses of {trial} by step", f"The best trial, {trial}")


def _read(path: Path, page: Page) -> dict[str, Any]:
    """A file's mapping; what cannot be read is told."""
    try:
        values = load_yaml(read_utf8(path, SETTINGS))  # JSON is YAML
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        page.note(f"{path.name} cannot be read ({' '.join(str(error).split())})")
        return {}
    return values if isinstance(values, dict) else {}
