"""The train job: checks everything that can be checked, then hands the loop to Ray Train."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from acestep_ray.cache.index import CacheIndex
from acestep_ray.config import TrainConfig
from acestep_ray.config.paths import is_path_setting
from acestep_ray.export.reading import LORA_FILE
from acestep_ray.export.transformer import write_transformer
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.ray_runtime import connect
from acestep_ray.storage import Store, replaced_folder
from acestep_ray.terminal import fact_table
from acestep_ray.tracking import (
    BUFFER_FILE,
    MLflowRun,
    Tracker,
    check_mlflow,
    environment_tags,
    located_run,
    mlflow_command,
    mlflow_uri,
    start_mlflow_run,
)
from acestep_ray.training.checks import check_model, check_train_config
from acestep_ray.training.experiment import (
    CHECKPOINTS,
    FINGERPRINTS,
    MLFLOW_FILE,
    SAMPLES,
    SETTINGS_FILE,
    check_unchanged,
    known_mlflow_run,
    make_folder,
    note_identity,
    only_run,
    read_json,
    run_identity,
    write_json,
)
from acestep_ray.training.holdout import hold_out
from acestep_ray.training.launch import resolve_training_device, run_workers
from acestep_ray.training.lora_config import read_lora_config
from acestep_ray.training.settings import WorkerSettings
from acestep_ray.training.songs import find_songs, open_songs
from acestep_ray.training.state import Checkpoints, best_step
from acestep_ray.training.worker import build_plan

EXPORT_FOLDER = "ace_step_transformer"


@dataclass
class TrainSummary:
    """What a run made."""

    steps: int
    first_loss: float
    last_loss: float
    fixed_noise: dict[str, float]
    """Fixed-noise loss by step."""
    result: Path | str
    """The LoRA file of the last checkpoint, its folder where there are several, or the fine-tuned transformer's; a URL
    for what lies in object storage."""
    samples: list[Path | str]
    """By step."""
    experiment: Store
    tracking_uri: str | None
    wall_seconds: float
    finished_before: bool
    """Whether there was nothing left to do."""
    validation: dict[str, float]
    """Loss of the held-out songs by step."""
    stopped_early: int | None
    """The step at which the validation loss had not fallen for long enough."""
    best: int | None
    """Step of the checkpoint with the lowest validation loss."""

    def render(self) -> str:
        """The summary as text."""
        rows: list[tuple[str, object]] = []
        if self.finished_before:
            rows.append(
                (
                    "note",
                    f"already finished at step {self.steps}; raise --max_steps or use another --exp_name",
                )
            )
        rows.append(("steps", f"{self.steps:,} in {self.wall_seconds:,.1f} s"))
        rows.append(("loss", f"{self.first_loss:.4f} → {self.last_loss:.4f} (first to last step)"))
        for name, losses, of_what in (
            ("fixed", self.fixed_noise, "same songs, same noise, before and after"),
            ("held out", self.validation, "songs that were not trained on"),
        ):
            if len(losses) > 1:
                values = list(losses.values())
                rows.append((name, f"{values[0]:.4f} → {values[-1]:.4f} ({of_what})"))
        if self.stopped_early is not None:
            rows.append(
                ("stopped", f"at step {self.stopped_early}: the validation loss did not fall any more")
            )
        if self.best not in (None, self.steps):
            rows.append(("best", f"step {self.best} had the lowest validation loss"))
        rows.append(("result", self.result))
        rows += [("sample", path) for path in self.samples[-1:]]
        if self.tracking_uri is not None:
            rows.append(("MLflow", mlflow_command(self.tracking_uri)))
        return fact_table(rows)


def train(config: TrainConfig) -> TrainSummary:
    """Train a LoRA or the model's own weights, from the last checkpoint if there is one.

    Raises InputError before work starts, and KeyboardInterrupt where the user ended it, with a checkpoint.
    """
    started = time.monotonic()
    given, config = config, check_train_config(config)
    checkpoint = CheckpointDir.open(config.checkpoint_dir)
    lora = None if config.lora_config_path is None else read_lora_config(config.lora_config_path)
    check_model(config, lora, checkpoint)
    tracking_uri = mlflow_uri(config.tracking_uri, config.logger_dir)

    experiment = Store.at(config.exp_dir).child(config.exp_name)
    samples = experiment.child(SAMPLES)
    songs = open_songs(config, checkpoint)
    if isinstance(songs, CacheIndex):
        count_steps(songs.latent_frames, config)  # refuses a batch that is too small for a song
    log_dir = Store.at(config.logger_dir).child(config.exp_name)
    make_folder(experiment, "--exp_dir")
    make_folder(log_dir, "--logger_dir")
    with only_run(experiment):
        if tracking_uri is not None and known_mlflow_run(experiment, tracking_uri) is None:
            check_mlflow(tracking_uri, config.tracking_experiment, restore=config.restore_experiment)
        connect()
        use_gpu = resolve_training_device(config)
        found = find_songs(songs, checkpoint, config, experiment, use_gpu)
        held_out = hold_out(found.recordings, config.val_songs).tolist()
        if held_out:
            print(f"{len(held_out)} of {len(found.recordings)} songs are held out for validation", flush=True)
        settings = WorkerSettings(
            config=config,
            lora=lora,
            checkpoints=checkpoints_of(config, experiment),
            samples=samples,
            log_dir=log_dir,
            mlflow_run=None,
            total_steps=count_steps(found.latent_frames, config, held_out),
            stream=found.stream,
            held_out=tuple(held_out),
        )
        identity = run_identity(
            config, lora, songs=found.fingerprint, transformer=checkpoint.fingerprint("transformer")
        )
        if Checkpoints(settings.checkpoints).steps():
            check_unchanged(experiment, identity, allow_changes=config.allow_changes)
        done = finished_losses(settings)
        if done is None:
            note_identity(experiment, identity)
            losses = run_workers(
                prepare_experiment(experiment, settings, tracking_uri, identity, given), use_gpu
            )
        else:
            losses = done
            send_what_was_kept(experiment, settings, tracking_uri)
    return TrainSummary(
        steps=losses["step"],
        first_loss=losses.get("first", math.nan),
        last_loss=losses.get("last", math.nan),
        fixed_noise=losses["fixed_noise"],
        result=find_result(settings, checkpoint, losses["step"], experiment),
        samples=find_samples(samples),
        experiment=experiment,
        tracking_uri=tracking_uri,
        wall_seconds=time.monotonic() - started,
        finished_before=done is not None,
        validation=losses["validation"],
        stopped_early=losses.get("stopped_early"),
        best=best_step(losses, Checkpoints(settings.checkpoints).steps()),
    )


def checkpoints_of(config: TrainConfig, experiment: Store) -> Store:
    """Where the checkpoints of an experiment lie."""
    if config.checkpoints_dir is None:
        return experiment.child(CHECKPOINTS)
    return Store.at(config.checkpoints_dir).child(config.exp_name).child(CHECKPOINTS)


def count_steps(latent_frames: np.ndarray, config: TrainConfig, held_out: Sequence[int] = ()) -> int:
    """Steps of the run over songs of these lengths, (songs,). Raises InputError where a song fits into no batch."""
    plan = build_plan(latent_frames, config, held_out)
    if config.epochs > 0:
        return min(config.max_steps, plan.steps_in_epochs(config.epochs))
    return config.max_steps


def finished_losses(settings: WorkerSettings) -> dict[str, Any] | None:
    """The losses of a run that has done all its steps; None for one that has not."""
    state = Checkpoints(settings.checkpoints).latest_state()
    if state is None or (state["step"] < settings.total_steps and "stopped_early" not in state["losses"]):
        return None
    return {"step": state["step"], **state["losses"]}


def prepare_experiment(
    experiment: Store,
    settings: WorkerSettings,
    tracking_uri: str | None,
    identity: Mapping[str, Any],
    given: TrainConfig | None = None,
) -> WorkerSettings:
    """Note the run's settings, and begin or continue its MLflow run, with what it trains on and with.

    Paths are noted as they were `given`: relative ones hold where the project folder is moved to.
    """
    values = asdict(settings.config)
    paths = {} if given is None else {n: v for n, v in asdict(given).items() if is_path_setting(n)}
    experiment.write_bytes(SETTINGS_FILE, yaml.safe_dump(values | paths, sort_keys=False).encode())
    if tracking_uri is None:
        return settings
    run_id = known_mlflow_run(experiment, tracking_uri)
    fingerprints = {f"fingerprint.{name}": str(identity[key]) for name, key in FINGERPRINTS.items()}
    tags = {**environment_tags(), **fingerprints}
    run = start_mlflow_run(
        tracking_uri,
        settings.config.tracking_experiment,
        settings.config.exp_name,
        values,
        run_id,
        tags=tags,
        restore=settings.config.restore_experiment,
    )
    write_json(experiment, MLFLOW_FILE, asdict(run))
    return replace(settings, mlflow_run=run)


def find_result(
    settings: WorkerSettings, checkpoint: CheckpointDir, step: int, experiment: Store
) -> Path | str:
    """The LoRA file of a checkpoint, or the whole transformer, which is written from it."""
    checkpoints = Checkpoints(settings.checkpoints)
    if settings.lora is not None:
        return checkpoints.folder(step).place_of("" if "adapters" in settings.lora else LORA_FILE)
    with replaced_folder(experiment.child(EXPORT_FOLDER), last=["config.json"]) as folder:
        write_transformer(checkpoint, checkpoints.read_weights(step), folder)
    return experiment.place_of(EXPORT_FOLDER)


def find_samples(samples: Store) -> list[Path | str]:
    """The sounds that a run has made, by step."""
    names = samples.names(suffix=".wav")
    by_step = [(int(match[1]), name) for name in names if (match := re.match(r"step=(\d+)/", name))]
    return [samples.place_of(name) for _, name in sorted(by_step)]


def send_what_was_kept(experiment: Store, settings: WorkerSettings, tracking_uri: str | None) -> None:
    """Send the metrics of a finished run that MLflow did not take while it ran."""
    noted = read_json(experiment, MLFLOW_FILE)
    if noted is not None and settings.log_dir.status(BUFFER_FILE) is not None:
        run = located_run(MLflowRun(**noted), tracking_uri)
        if run is not None:
            Tracker(settings.log_dir, run, first_step=settings.total_steps + 1).close()
