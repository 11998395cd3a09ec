"""What is left of a run, read from its folder: nothing of it has to be there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from acestep_ray.errors import AceStepError, InputError
from acestep_ray.plain_files import NOTES
from acestep_ray.plain_json import load_json
from acestep_ray.plain_text import read_utf8
from acestep_ray.plain_yaml import load_yaml
from acestep_ray.reporting.curves import (
    Log,
    TrackedRun,
    read_log,
    read_mlflow,
    read_mlflow_curves,
)
from acestep_ray.reporting.plots import TRAINING
from acestep_ray.storage import StorageError, Store
from acestep_ray.training.experiment import CHECKPOINTS, IDENTITY_FILE, SAMPLES, SETTINGS_FILE, only_run
from acestep_ray.training.state import Checkpoints, DamagedCheckpointError, best_step
from acestep_ray.training.validation import FIXED_NOISE, VALIDATION


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint of a run."""

    step: int
    num_bytes: int | None
    """Of all its files; None where it does not read."""
    losses: dict[str, Any]
    """What its `state.json` says of the run's losses so far; empty where it does not read."""
    problem: str | None
    """Why it does not read."""


@dataclass(frozen=True)
class Run:
    """A run, finished or not."""

    experiment: Path
    place: str
    """Where the experiment is: its path, or the URL that `experiment` is a copy of."""
    settings: dict[str, Any]
    """As in `train.yaml`."""
    lora: dict[str, Any]
    """The LoRA configuration's fields; empty where the model's own weights are trained."""
    under_way: bool
    log: Log
    tracked: TrackedRun | None
    store: Store
    """Of the checkpoints."""
    checkpoints: list[CheckpointFacts]
    """By step."""
    samples: list[Path]
    """Sounds by step."""
    missing: list[str] = field(default_factory=list)
    """What could not be read, and why."""

    @property
    def losses(self) -> dict[str, Any]:
        """What the last checkpoint that reads says of the losses."""
        return next((one.losses for one in reversed(self.checkpoints) if one.losses), {})

    @property
    def step(self) -> int:
        """Optimizer steps that are known to be done."""
        logged = max(self.log["loss"], default=-1) + 1  # the first step is number 0
        return max(logged, *(one.step for one in self.checkpoints), 0)

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss."""
        return best_step(self.losses, [one.step for one in self.checkpoints if one.problem is None])

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None where the settings do not say."""
        by_epochs = (self.settings.get("epochs") or 0) > 0
        return None if by_epochs else self.settings.get("max_steps")

    def curve(self, name: str) -> dict[int, float]:
        """A loss over fixed noise by step, `fixed_noise` or `validation`, from the log or else the last checkpoint."""
        noted = self.losses.get(name) or {}
        return dict(self.log[f"loss/{name}"]) or {int(step): value for step, value in sorted(noted.items())}

    def loss_curves(self) -> dict[str, dict[int, float]]:
        """The losses that were measured, by what a reader knows them by; `TRAINING` is that of every step."""
        curves = {
            TRAINING: dict(self.log["loss"]),
            "fixed noise": self.curve(FIXED_NOISE),
            "held-out songs": self.curve(VALIDATION),
        }
        return {name: curve for name, curve in curves.items() if curve}

    def quarters(self, name: str) -> dict[str, dict[int, float]]:
        """Such a loss over each quarter of the noise levels, `q1` to `q4`; only those that were measured."""
        found: dict[str, dict[int, float]] = {}
        for number in range(1, 5):
            metric = f"loss/{name}/q{number}"
            # Every checkpoint holds what was measured last.
            noted = {
                int(step): values[metric]
                for one in self.checkpoints
                for step, values in one.losses.get("measured", {}).items()
                if metric in values
            }
            if curve := dict(self.log[metric]) or noted:
                found[f"q{number}"] = curve
        return found


def is_run(folder: Path) -> bool:
    """Whether something of a run is in a folder."""
    known = [folder / SETTINGS_FILE, folder / IDENTITY_FILE, folder / CHECKPOINTS]
    return any(path.exists() for path in known) or any((folder / SAMPLES).glob("*/*.wav"))


def read_run(experiment: Path, place: str | None = None) -> Run:
    """Read all there is of a run, or of a copy of the one at `place`; what cannot be read is told in `missing`."""
    place = place or str(experiment)
    missing: list[str] = []
    settings = _mapping(experiment / SETTINGS_FILE, load_yaml, missing)
    identity = _mapping(experiment / IDENTITY_FILE, load_json, missing)
    store = _or_missing(
        lambda: _checkpoint_store(place, settings), Store.at(place).child(CHECKPOINTS), missing
    )
    return Run(
        experiment=experiment,
        place=place,
        settings=settings,
        lora={name.removeprefix("LoRA "): v for name, v in identity.items() if name.startswith("LoRA ")},
        under_way=is_under_way(Store.at(place)),
        log=_read_log(experiment, settings, missing),
        tracked=_or_missing(lambda: read_mlflow(experiment), None, missing),
        store=store,
        checkpoints=_or_missing(lambda: _read_checkpoints(store), [], missing),
        samples=sorted((experiment / SAMPLES).glob("*/*.wav"), key=lambda path: (step_of(path), path.name)),
        missing=missing,
    )


def is_under_way(experiment: Store) -> bool:
    """Whether a process is at work in an experiment's folder, on this machine or one that shares its storage."""
    try:
        with only_run(experiment):
            return False
    except InputError:
        return True
    except (OSError, StorageError):  # nothing is at work in what may only be read
        return False


def step_of(path: Path) -> int:
    """The step of a file in `step=N/`; −1 for another."""
    number = path.parent.name.removeprefix("step=")
    return int(number) if number.isdecimal() else -1


def _mapping(path: Path, parse: Callable[[str], Any], missing: list[str]) -> dict[str, Any]:
    try:
        values = parse(read_utf8(path, NOTES))
    except FileNotFoundError:
        missing.append(f"{path.name} is not there")
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        missing.append(f"{path.name} cannot be read ({' '.join(str(error).split())})")
        return {}
    if not isinstance(values, Mapping):
        missing.append(f"{path.name} holds no settings")
        return {}
    return dict(values)


def _or_missing(read: Callable[[], Any], default: Any, missing: list[str]) -> Any:
    try:
        return read()
    except (AceStepError, OSError, TypeError, ValueError) as error:  # a path may be a number, or hold a NUL
        missing.append(str(error))
        return default


def _read_log(experiment: Path, settings: Mapping[str, Any], missing: list[str]) -> Log:
    logger_dir = settings.get("logger_dir") or str(experiment.parent / "logs")
    log = _or_missing(lambda: read_log(experiment, logger_dir), Log(), missing)
    if not log.curves:
        log = _or_missing(lambda: read_mlflow_curves(experiment), log, missing)
    if not log.curves:
        missing.append("neither TensorBoard's events nor MLflow's metrics of this run are at hand")
    return log


def _checkpoint_store(place: str, settings: Mapping[str, Any]) -> Store:
    elsewhere = settings.get("checkpoints_dir")
    experiment = Store.at(place)
    return (experiment if elsewhere is None else Store.at(elsewhere).child(experiment.name)).child(
        CHECKPOINTS
    )


def _read_checkpoints(store: Store) -> list[CheckpointFacts]:
    checkpoints = Checkpoints(store)
    found = []
    for step in checkpoints.steps():
        try:
            state = checkpoints.read_state(step)
            size = sum(file["bytes"] for file in state["files"].values())
            found.append(CheckpointFacts(step, int(size), _losses(state["losses"]), None))
        except FileNotFoundError:
            continue  # training has just deleted it
        except (AceStepError, DamagedCheckpointError) as error:
            found.append(CheckpointFacts(step, None, {}, str(error)))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            told = f"state.json is not what training writes ({type(error).__name__}: {error})"
            found.append(CheckpointFacts(step, None, {}, told))
    return found


def _losses(noted: Any) -> dict[str, Any]:
    """The losses in a checkpoint's state, their steps and values numbers. Raises TypeError and ValueError."""
    for name in (FIXED_NOISE, VALIDATION):
        for step, value in (noted.get(name) or {}).items():
            int(step), value + 0.0
    for step, values in noted.get("measured", {}).items():
        int(step), dict(values)
    return dict(noted)
