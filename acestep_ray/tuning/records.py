"""What is known of every trial, as a file in its folder: a search goes on from these."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from acestep_ray.errors import AceStepError, InputError
from acestep_ray.plain_files import NOTES
from acestep_ray.plain_json import load_json
from acestep_ray.storage import Store
from acestep_ray.training.experiment import CHECKPOINTS, read_json, write_json
from acestep_ray.training.state import Checkpoints, DamagedCheckpointError, best_step
from acestep_ray.training.validation import FIXED_NOISE, VALIDATION
from acestep_ray.tuning.loop import Measured
from acestep_ray.tuning.space import Params
from acestep_ray.tuning.trial import TRIALS, trial_folder

RECORD_FILE = "trial.json"
SEARCH_FILE = "search.json"

UNFINISHED, DONE, STOPPED, FAILED = "unfinished", "done", "stopped", "failed"
"""States of a trial; one that is running is unfinished, and one that the scheduler ended is stopped."""


@dataclass
class TrialRecord:
    """A trial of a search."""

    name: str
    params: Params
    state: str = UNFINISHED
    validations: list[Measured] = field(default_factory=list)
    """By step, as they were reported."""
    failures: int = 0
    """Times that it was started again."""
    error: str | None = None
    """Of a failed trial."""
    mlflow_run: str | None = None
    seconds: float = 0.0
    """That it was at work, from its start to its last report, in all sittings."""

    @property
    def best(self) -> Measured | None:
        """The validation with the lowest loss; None where there is none yet."""
        finite = (one for one in self.validations if math.isfinite(one["validation"]))
        return min(finite, key=lambda one: (one["validation"], one["step"]), default=None)

    @property
    def lowest(self) -> float:
        """The lowest validation loss; infinite where there is none yet."""
        best = self.best
        return math.inf if best is None else best["validation"]

    @property
    def steps(self) -> int:
        """Steps at its last validation."""
        return self.validations[-1]["step"] if self.validations else 0

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left to do."""
        return self.state != UNFINISHED


class Records:
    """All trials of a search, in the order in which they were begun."""

    def __init__(self, folder: Path | Store):
        """Read those of the search in `folder`. Raises InputError for a record that does not read."""
        self.folder = Store.at(folder)
        self._trials: dict[str, TrialRecord] = {}
        self._started: dict[str, float] = {}
        for name in self.folder.names(TRIALS, suffix=RECORD_FILE):
            try:
                record = TrialRecord(**load_json(self.folder.read_bytes(name, NOTES)))
                _check(record)
            except (OSError, ValueError, TypeError, LookupError) as error:
                raise InputError(
                    f"this trial's record does not read ({error})",
                    where=self.folder.url_of(name),
                    fix="delete the trial's folder, or use another --exp_name",
                ) from None
            self._trials[record.name] = record

    def __len__(self) -> int:
        return len(self._trials)

    def __iter__(self) -> Iterator[TrialRecord]:
        return iter(self._trials.values())

    def __getitem__(self, name: str) -> TrialRecord:
        return self._trials[name]

    def add(self, params: Params) -> TrialRecord:
        """A new trial with these parameters."""
        record = TrialRecord(f"trial-{len(self._trials):04d}", params)
        self._trials[record.name] = record
        self.write(record)
        return record

    def write(self, record: TrialRecord) -> None:
        """Write a record down, whole or not at all."""
        write_json(trial_folder(self.folder, record.name), RECORD_FILE, asdict(record))

    def begin(self, name: str) -> None:
        """Note that a trial is at work from now on."""
        self._started[name] = time.monotonic()

    def note(self, name: str, measured: Mapping[str, Any]) -> None:
        """Note a validation; one of a step that is known already replaces it and what came after."""
        record = self._trials[name]
        kept = [one for one in record.validations if one["step"] < measured["step"]]
        noted = Measured(step=measured["step"], validation=measured["validation"], train=measured["train"])
        record.validations = [*kept, noted]
        self._count_seconds(record)
        self.write(record)

    def end(self, name: str, state: str, error: str | None = None) -> None:
        """Note that a trial is over."""
        record = self._trials[name]
        record.state, record.error = state, error
        self._started.pop(name, None)
        self._add_unreported(record)
        self.write(record)

    def fail(self, name: str) -> None:
        """Note that a trial has to be started again."""
        record = self._trials[name]
        record.failures += 1
        self._count_seconds(record)
        self.write(record)

    def ranked(self) -> list[TrialRecord]:
        """Trials that have a validation and did not fail, the lowest loss first."""
        able = [one for one in self if one.best is not None and one.state != FAILED]
        return sorted(able, key=lambda one: (one.lowest, one.name))

    def checkpoints(self, record: TrialRecord) -> Checkpoints:
        """A trial's checkpoints."""
        return Checkpoints(trial_folder(self.folder, record.name).child(CHECKPOINTS))

    def best_checkpoint(self, record: TrialRecord) -> Store | None:
        """The folder of a trial's checkpoint with the lowest validation loss; None where none is whole."""
        checkpoints = self.checkpoints(record)
        losses = self.losses(record)
        step = best_step(losses, checkpoints.steps()) if losses is not None else None
        return None if step is None else checkpoints.folder(step)

    def losses(self, record: TrialRecord) -> dict[str, Any] | None:
        """What a trial's last checkpoint says of its losses; None without one."""
        try:
            state = self.checkpoints(record).latest_state()
        except (AceStepError, DamagedCheckpointError):
            return None
        return None if state is None else state["losses"]

    def gap(self, record: TrialRecord) -> float | None:
        """How much more the loss has fallen on songs that are trained on than on those held out, at the best step.

        What a trial has learned by heart, and nothing else, makes it large. None where it is not known.
        """
        losses = self.losses(record)
        if losses is None or record.best is None or "0" not in losses.get(VALIDATION, {}):
            return None
        before = losses[VALIDATION]["0"] - losses[FIXED_NOISE]["0"]
        return record.best["validation"] - record.best["train"] - before

    def _add_unreported(self, record: TrialRecord) -> None:
        """Add validations that a process measured and saved, and was lost before it could report them."""
        losses = self.losses(record) or {VALIDATION: {}}
        known = {one["step"] for one in record.validations}
        for step, validation in losses[VALIDATION].items():
            if int(step) not in known | {0}:
                train = losses[FIXED_NOISE][step]
                record.validations.append({"step": int(step), "validation": validation, "train": train})
        record.validations.sort(key=lambda one: one["step"])

    def _count_seconds(self, record: TrialRecord) -> None:
        now = time.monotonic()
        record.seconds += now - self._started.get(record.name, now)
        self._started[record.name] = now


def _check(record: TrialRecord) -> None:
    """Raise TypeError and ValueError for fields of other types than ours."""
    is_number = {name: isinstance(getattr(record, name), (int, float)) for name in ("failures", "seconds")}
    wrong = [name for name in ("name", "state") if not isinstance(getattr(record, name), str)]
    wrong += [name for name in ("error", "mlflow_run") if not isinstance(getattr(record, name), str | None)]
    wrong += [name for name, is_one in is_number.items() if not is_one]
    if not isinstance(record.params, dict):
        wrong.append("params")
    for one in record.validations:
        if not isinstance(one["step"], int) or not all(
            isinstance(one[loss], (int, float)) for loss in ("validation", "train")
        ):
            wrong.append("validations")
    if wrong:
        raise ValueError(f"of another type than it was written: {', '.join(dict.fromkeys(wrong))}")


def check_same_search(folder: Store, identity: Mapping[str, Any]) -> None:
    """Raise InputError with the differences where the search in this folder was begun with another space or settings.

    Else note what it is begun with.
    """
    identity = json.loads(json.dumps(identity))
    before = read_json(folder, SEARCH_FILE)
    if before is not None:
        changed = [
            f"\n  - {name}: {before.get(name)} → {identity.get(name)}"
            for name in dict.fromkeys([*before, *identity])
            if before.get(name) != identity.get(name)
        ]
        if changed:
            raise InputError(
                "this search was begun with another space or other settings",
                where=f"{folder.url}{''.join(changed)}",
                fix="use another --exp_name, or set them back",
            )
        return
    write_json(folder, SEARCH_FILE, identity)
