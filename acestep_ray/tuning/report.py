"""What a search found, for people and for other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from acestep_ray.config import TrainConfig
from acestep_ray.export.reading import LORA_FILE
from acestep_ray.paths import shell_command
from acestep_ray.reporting.page import Page
from acestep_ray.storage import Store, replaced_folder
from acestep_ray.terminal import column_table, fact_table
from acestep_ray.terminal.numbers import number_text
from acestep_ray.tracking import mlflow_command
from acestep_ray.training.experiment import SETTINGS_FILE
from acestep_ray.training.job import TrainSummary
from acestep_ray.tuning.pictures import (
    PARALLEL,
    RANK_BY_RATE,
    draw_parallel_coordinates,
    draw_rank_by_learning_rate,
)
from acestep_ray.tuning.records import FAILED, UNFINISHED, Records, TrialRecord

TABLE_FILE = "trials.parquet"
REPORT = "report"
PAGE_FILE = "index.html"
BEST = "best"
_ROWS_SHOWN = 20


@dataclass
class TuneSummary:
    """What a search made."""

    trials: list[dict[str, Any]]
    """As in `trials.parquet`, the best first."""
    space: list[str]
    """The dimensions that were searched."""
    best: Store | None
    """Folder of the winner; None where no trial came to a validation."""
    folder: Store
    tracking_uri: str | None
    wall_seconds: float
    retrained: TrainSummary | None

    @property
    def unfinished(self) -> str | None:
        """What is left to do, for which the command's exit code is 1; None where all trials are over."""
        left = [trial for trial in self.trials if trial["state"] == UNFINISHED]
        if not left:
            return None
        return (
            f"{len(left)} of {len(self.trials)} trials are not finished: {left[0]['error']}\n"
            "  → the same command continues them"
        )

    def render(self) -> str:
        """The summary as text."""
        columns = ["trial", *self.space, "steps", "validation", "gap", "state"]
        rows = [[_cell(trial[column]) for column in columns] for trial in self.trials[:_ROWS_SHOWN]]
        lines = [column_table(columns, rows)]
        if len(self.trials) > _ROWS_SHOWN:
            lines.append(f"and {len(self.trials) - _ROWS_SHOWN} more in {self.folder.url_of(TABLE_FILE)}")
        failed = [trial for trial in self.trials if trial["state"] == FAILED]
        made: list[tuple[str, object]] = [
            *(("failed", f"{trial['trial']}: {trial['error']}") for trial in failed),
            ("trials", f"{len(self.trials)} in {self.wall_seconds:,.0f} s"),
        ]
        if self.best is not None:
            made.append(("best", self.best.url_of(LORA_FILE)))
            made.append(
                ("again", shell_command("acestep-ray", "train", "--config", self.best.url_of(SETTINGS_FILE)))
            )
        made.append(("report", self.folder.child(REPORT).url_of(PAGE_FILE)))
        if self.tracking_uri is not None:
            made.append(("MLflow", mlflow_command(self.tracking_uri)))
        lines.append(fact_table(made))
        if self.retrained is not None:
            lines += ["", "the winner, trained anew:", self.retrained.render()]
        return "\n".join(lines)


def trial_rows(records: Records) -> list[dict[str, Any]]:
    """A row for every trial, the best first, failed and unfinished ones without a validation last."""
    ranked = records.ranked()
    names = {record.name for record in ranked}
    return [_row(records, record) for record in [*ranked, *(r for r in records if r.name not in names)]]


def _row(records: Records, record: TrialRecord) -> dict[str, Any]:
    best = record.best
    checkpoint = records.best_checkpoint(record)
    return {
        "trial": record.name,
        "state": record.state,
        **record.params,
        "steps": record.steps,
        "best_step": None if best is None else best["step"],
        "validation": None if best is None else best["validation"],
        "train": None if best is None else best["train"],
        "gap": records.gap(record),
        "failures": record.failures,
        "seconds": round(record.seconds, 1),
        "error": record.error,
        "mlflow_run": record.mlflow_run,
        "checkpoint": None if checkpoint is None else checkpoint.url,
        "validations": [
            {"step": one["step"], "validation": one["validation"], "train": one["train"]}
            for one in record.validations
        ],
    }


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write `trials.parquet`; `alpha`, a rule or a number, is text."""
    texts = [{**row, **({"alpha": str(row["alpha"])} if "alpha" in row else {})} for row in rows]
    pq.write_table(pa.Table.from_pylist(texts), path)


def write_best(
    folder: Store, record: TrialRecord, records: Records, config: TrainConfig, lora: Mapping[str, Any]
) -> None:
    """Write the winner: its LoRA configuration, its LoRA at the best step, and the settings that train it again.

    `config` and `lora` are what a trial's run had, but for its names and the paces of a search.
    """
    checkpoint = records.best_checkpoint(record)
    config = replace(config, lora_config_path=folder.url_of("lora_config.json"))
    with replaced_folder(folder, last=[SETTINGS_FILE]) as new:
        if checkpoint is not None:
            (new / LORA_FILE).write_bytes(checkpoint.read_bytes(LORA_FILE))
        (new / "lora_config.json").write_text(json.dumps(lora, indent=4) + "\n", encoding="utf-8")
        (new / SETTINGS_FILE).write_bytes(yaml.safe_dump(asdict(config), sort_keys=False).encode())


def write_report(folder: Path, rows: Sequence[Mapping[str, Any]], records: Records, space: str) -> None:
    """Write the pictures and a page that holds them and the table, and needs no other file."""
    folder.mkdir(exist_ok=True)
    page = Page(records.folder.name)
    page.verbatim(space)
    add_trials(page, rows, draw_pictures(folder, records))
    page.write(folder / PAGE_FILE)


def draw_pictures(folder: Path, records: Records) -> dict[Path, str]:
    """Draw what there is to be seen of a search into `folder`: PNG files, each with what it shows."""
    ranked = records.ranked()
    if not ranked:
        return {}
    draw_parallel_coordinates(ranked, folder / PARALLEL)
    best = ", ".join(f"{name} {value}" for name, value in ranked[0].params.items())
    pictures = {
        folder
        / PARALLEL: f"The parameters of {len(ranked)} trials and their validation losses; the best has {best}"
    }
    if draw_rank_by_learning_rate(ranked, folder / RANK_BY_RATE):
        pictures[folder / RANK_BY_RATE] = (
            "Rank by learning rate of every trial, coloured by its validation loss"
        )
    return pictures


def add_trials(page: Page, rows: Sequence[Mapping[str, Any]], pictures: Mapping[Path, str]) -> None:
    """Add pictures of a search, and its trials as `trial_rows` gives them, to a page."""
    page.section(
        "Trials",
        "Trials by their lowest validation loss: over fixed noise, of songs that are not trained on. “train” is that "
        "of songs that are; “gap” is how much more the loss has fallen on these than on those: what was learned by "
        "heart.",
    )
    for path, shows in pictures.items():
        page.figure(path, shows)
    if not rows:
        page.note("No trial was begun (yet).")
        return
    left_out = {"validations", "mlflow_run", "checkpoint"}
    columns = [column for column in rows[0] if column not in left_out]
    cells = [[row[column] for column in columns] for row in rows]
    page.table(columns, cells, marked=None if rows[0]["validation"] is None else 0)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return number_text(value, 4) if isinstance(value, float) else str(value)
