"""The training loop of one worker: plain torch, so that it runs in a test as it runs under Ray Train."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.schema import CachedSong
from acestep_ray.config import TrainConfig
from acestep_ray.diffusion.objective import TrainingBatch, flow_matching_losses
from acestep_ray.diffusion.schedule import training_sigmas
from acestep_ray.errors import AceStepError
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.storage import Store
from acestep_ray.tracking import MLflowRun, Tracker
from acestep_ray.training.batch import ConditionDropout, build_batch, counter_seed, draw
from acestep_ray.training.lora import add_lora
from acestep_ray.training.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
    step_if,
)
from acestep_ray.training.sampler import BatchPlan, MicroBatch
from acestep_ray.training.samples import write_sample
from acestep_ray.training.state import Checkpoints, TrainingState, trainable_parameters
from acestep_ray.training.streaming import CacheSource, SongSource, Stream, StreamSource
from acestep_ray.training.validation import FIXED_NOISE, SONGS, fixed_noise_losses, validation_metrics

# Metrics stay on the device until this many steps are together: reading one waits for the GPU.
LOG_EVERY = 10
PROGRESS_SECONDS = 5.0


@dataclass
class WorkerSettings:
    """What the driver hands to every worker."""

    config: TrainConfig
    lora: dict
    """Fields of PEFT's `LoraConfig`."""
    checkpoints: Store
    samples: Path
    log_dir: Path
    mlflow_run: MLflowRun | None
    total_steps: int
    stream: Stream | None = None
    """The songs, where the run has no feature cache."""


@dataclass(frozen=True)
class WorkerPlace:
    """Which of the run's workers this is."""

    rank: int
    workers: int
    device: torch.device


Report = Callable[[dict[str, float], "Store | None"], None]
"""Takes the metrics of a checkpoint, and on the first worker its place; every worker calls it as often."""
Say = Callable[[str], None]
"""Takes a line for the user."""


class TrainingDivergedError(AceStepError):
    """The loss is not finite any more."""


def train_worker(settings: WorkerSettings, place: WorkerPlace, report: Report, say: Say = print) -> dict:
    """Train from the latest checkpoint to the last step; returns the run's losses, and its step."""
    with Trainer(settings, place, report, say) as trainer:
        state = trainer.resume()
        trainer.before_first_step(state)
        for step, batches in enumerate(trainer.batches(state.step), start=state.step):
            trainer.train_step(step, batches)
            state.step = step + 1
            trainer.after_step(state)
    return {"step": state.step, **state.losses}


class Trainer:
    """One worker's model, optimizer and place in the plan."""

    def __init__(self, settings: WorkerSettings, place: WorkerPlace, report: Report, say: Say):
        self.settings = settings
        self.config = config = settings.config
        self.rank, self.workers, self.device = place.rank, place.workers, place.device
        self.report = report
        self.source = open_source(settings, place)
        self.plan = build_plan(self.source.latent_frames, config)
        self.sigmas = training_sigmas(config.shift)
        self.dropout = ConditionDropout(config.text_dropout, config.speaker_dropout, config.lyric_dropout)

        self.transformer = build_transformer(settings, self.device)
        self.model = wrap_for_workers(self.transformer, place)
        self.trained = list(trainable_parameters(self.transformer).values())
        self.optimizer = build_optimizer(self.trained, config.weight_decay)

        self.checkpoints = Checkpoints(settings.checkpoints, keep_last=config.keep_last)
        self.tracker: Tracker | None = None
        self.unlogged: dict[int, dict[str, Tensor | float]] = {}
        # By step, which songs of each of this worker's micro-batches have a finite loss, (B,) bool.
        self.finite: dict[int, list[Tensor]] = {}
        self.skipped_in_a_row = 0
        self.progress = Progress(settings.total_steps, say)

    def resume(self) -> TrainingState:
        """Load the latest checkpoint of this experiment, if there is one."""
        warn = self.progress.say if self.rank == 0 else lambda line: None
        state = self.checkpoints.load_latest(self.transformer, self.optimizer, warn)
        if state is None:
            state = TrainingState(step=0, losses={"fixed_noise": {}})
        if self.rank == 0:
            self.tracker = Tracker(self.settings.log_dir, self.settings.mlflow_run, first_step=state.step)
        self.progress.start(state.step)
        return state

    def before_first_step(self, state: TrainingState) -> None:
        """Measure the fixed-noise loss of the untrained model, to compare with later."""
        if self.rank == 0 and state.step == 0:
            self.validate(state)

    def batches(self, first_step: int) -> Iterator[list[TrainingBatch]]:
        """This worker's micro-batches of every step from `first_step` on, read ahead of the model."""
        steps = range(first_step, self.settings.total_steps)
        mine = (item for step in steps for item in self.plan.step(step)[self.rank :: self.workers])
        loaded = self.source.read_ahead(mine, self.make_batch, self.config.num_workers)
        for _ in steps:
            yield [next(loaded) for _ in range(self.config.accumulate_grad_batches)]

    def make_batch(self, item: MicroBatch, songs: list[CachedSong]) -> TrainingBatch:
        """The songs of one micro-batch with their draws."""
        draws = [draw(s, self.sigmas, self.dropout, seed=self.config.seed, epoch=item.epoch) for s in songs]
        with_ssl = self.config.ssl_coeff > 0
        batch = build_batch(songs, draws, ssl_stride=self.source.ssl_stride, with_ssl=with_ssl)
        return batch.pin() if self.device.type == "cuda" else batch

    def train_step(self, step: int, batches: list[TrainingBatch]) -> None:
        """One optimizer step over this worker's micro-batches of the step."""
        # PEFT's dropout draws from torch's own stream, which then follows from the step as all else does.
        torch.manual_seed(counter_seed("dropout", self.config.seed, step, self.rank))
        songs_in_step = sum(len(item.songs) for item in self.plan.step(step))
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with self.sync_gradients(last):
                with self.autocast():
                    losses = flow_matching_losses(self.model, batch.to(self.device))
                total = losses.total(self.config.ssl_coeff)
                # A mean over all songs of the step, whoever holds them; DDP divides by the number of workers.
                (total.sum() * (self.workers / songs_in_step)).backward()
            self.finite.setdefault(step, []).append(torch.isfinite(total.detach()))
            parts = {"loss": total, "loss/denoising": losses.denoising}
            parts.update({f"loss/{name}": values for name, values in losses.ssl.items()})
            for name, values in parts.items():
                sums[name] = sums.get(name, 0.0) + values.detach().sum()
        means = torch.stack(list(sums.values())) / songs_in_step
        if self.workers > 1:
            torch.distributed.all_reduce(means)
        norm = clip_gradients(
            self.trained, self.config.gradient_clip_val, self.config.gradient_clip_algorithm
        )
        rate = learning_rate_at(
            step,
            peak=self.config.learning_rate,
            warmup_steps=self.config.warmup_steps,
            max_steps=self.settings.total_steps,
        )
        set_learning_rate(self.optimizer, rate)
        # The gradients are those of all workers, and so is what follows from them.
        step_if(self.optimizer, torch.isfinite(norm) & torch.isfinite(means[0]))
        self.optimizer.zero_grad(set_to_none=True)
        self.unlogged[step] = {
            **dict(zip(sums, means, strict=True)),
            "grad_norm": norm,
            "learning_rate": rate,
            "epoch": float(self.plan.step(step)[0].epoch),
        }

    def after_step(self, state: TrainingState) -> None:
        """Log, validate and save, each at its own pace."""
        last = state.step == self.settings.total_steps
        plot = last or state.step % self.config.every_plot_step == 0
        save = last or state.step % self.config.every_n_train_steps == 0
        if plot or save or len(self.unlogged) >= LOG_EVERY:
            self.flush_metrics(state)
        if plot and self.rank == 0:
            self.validate(state)
            self.write_sample(state)
        if save:
            self.save(state)

    def flush_metrics(self, state: TrainingState) -> None:
        """Bring the metrics of the last steps from the device to the trackers, and look for steps that were skipped."""
        metrics = {
            step: {name: float(value) for name, value in values.items()}
            for step, values in self.unlogged.items()
        }
        for step, values in metrics.items():
            if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
                self.skipped_in_a_row = 0
                state.losses.setdefault("first", values["loss"])
                state.losses["last"] = values["loss"]
                continue
            self.skipped_in_a_row += 1
            state.losses["skipped"] = state.losses.get("skipped", 0) + 1
            self.tell_of_skipped(step, values)
            metrics[step] = {name: value for name, value in values.items() if math.isfinite(value)}
        self.unlogged, self.finite = {}, {}
        if self.tracker is not None:
            skipped = {"skipped_steps": float(state.losses.get("skipped", 0))}
            self.tracker.log({step: {**values, **skipped} for step, values in metrics.items()})
            self.progress.show(state.step, state.losses.get("last", math.nan))
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            self.save(state)
            self.checkpoints.finish()
            raise TrainingDivergedError(
                f"the last {self.skipped_in_a_row} steps before step {state.step} had no finite loss and were skipped; "
                f"what there is was saved as {self.checkpoints.folder(state.step).url}\n"
                "  → lower --learning_rate and go back to an earlier checkpoint, or look at the songs that were named"
            )

    def tell_of_skipped(self, step: int, values: dict[str, float]) -> None:
        """Name this worker's songs whose loss was not finite; the first worker tells where there are none."""
        mine = self.plan.step(step)[self.rank :: self.workers]
        keys = [
            self.source.read(row).key
            for item, finite in zip(mine, self.finite[step], strict=True)
            for row, is_finite in zip(item.songs, finite.tolist(), strict=True)
            if not is_finite
        ]
        if keys or self.rank == 0:
            what = f"the loss of {', '.join(keys)} is not finite" if keys else "its gradient is not finite"
            self.progress.say(
                f"warning: step {step} is skipped: {what} (gradient norm {values['grad_norm']})"
            )

    def validate(self, state: TrainingState) -> None:
        """Measure and log the fixed-noise loss, as a whole and by quarters of the noise levels."""
        with self.evaluating(), self.autocast():
            losses = fixed_noise_losses(self.transformer, self.validation_songs(), self.sigmas, self.device)
        metrics = validation_metrics(losses)
        state.losses["fixed_noise"][str(state.step)] = metrics[FIXED_NOISE]
        self.tracker.log({state.step: metrics})

    def validation_songs(self) -> list[CachedSong]:
        """The first songs of the run."""
        return [self.source.read(i) for i in range(min(SONGS, len(self.source.latent_frames)))]

    def write_sample(self, state: TrainingState) -> None:
        """Generate the first song's prompt and lyrics with the model as it is; a failure is told and ends nothing."""
        directory = self.settings.samples / f"step={state.step}"
        song = self.source.read(0)
        try:
            with self.evaluating(), self.autocast():
                waveform = write_sample(directory, self.transformer, song, self.config, self.device)
        except (
            Exception
        ) as error:  # memory, disk, a damaged codec: hours of training are worth more than a sample
            self.progress.say(
                f"warning: no sample at step {state.step}: {type(error).__name__}: {error}\n"
                "  → training goes on; `acestep-ray generate` makes music from its checkpoint"
            )
            return
        self.tracker.log_audio(f"sample/{song.key}", *waveform, step=state.step)

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint, while training goes on but for the last, and report it."""
        place = None
        if self.rank == 0:
            place = self.checkpoints.save(self.transformer, self.optimizer, state)
            if state.step == self.settings.total_steps:
                self.checkpoints.finish()
        metrics = {"step": state.step}
        if "last" in state.losses:
            metrics["loss"] = state.losses["last"]
        if state.losses["fixed_noise"]:
            metrics["fixed_noise_loss"] = list(state.losses["fixed_noise"].values())[-1]
        self.report(metrics, place)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write what the trackers hold, and the checkpoint that is on its way."""
        if self.tracker is not None:
            self.tracker.close()
        try:
            self.checkpoints.finish()
        except AceStepError as error:
            if kind is None:
                raise
            self.progress.say(f"warning: {error}")  # the error that ended the run is the one to tell

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision, where it was asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16-mixed")

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without PEFT's dropout."""
        self.transformer.eval()
        try:
            yield
        finally:
            self.transformer.train()

    def sync_gradients(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients travel between workers once a step, with the last micro-batch."""
        if self.workers > 1 and not last:
            return self.model.no_sync()
        return contextlib.nullcontext()


def open_source(settings: WorkerSettings, place: WorkerPlace) -> SongSource:
    """Where this worker's songs come from."""
    if settings.stream is not None:
        return StreamSource(settings.stream, place.device, place.workers)
    return CacheSource(CacheIndex.open(settings.config.dataset_path))


def build_plan(latent_frames: np.ndarray, config: TrainConfig) -> BatchPlan:
    """The micro-batches of a run over songs of these lengths, (songs,)."""
    return BatchPlan(
        latent_frames,
        seed=config.seed,
        micro_batches_per_step=config.accumulate_grad_batches * config.devices,
        batch_size=config.batch_size,
        batch_frames=config.batch_frames,
    )


def build_transformer(settings: WorkerSettings, device: torch.device) -> ACEStepTransformer:
    """The base model with its LoRA, on `device`; the same on every worker."""
    transformer = CheckpointDir.open(settings.config.checkpoint_dir).load_transformer(device=device)
    torch.manual_seed(settings.config.seed)  # LoRA's first matrices are random
    add_lora(transformer, settings.lora)
    transformer.activation_checkpointing = settings.config.activation_checkpointing
    return transformer


def wrap_for_workers(transformer: ACEStepTransformer, place: WorkerPlace) -> nn.Module:
    """Data-parallel training where there is more than one worker; the process group is there already."""
    if place.workers == 1:
        return transformer
    devices = [place.device] if place.device.type == "cuda" else None
    return DistributedDataParallel(transformer, device_ids=devices)


class Progress:
    """Tells how far the run is, now and then."""

    def __init__(self, total: int, say: Say):
        self.total = total
        self.say = say
        self.first = 0
        self.started = self.shown = 0.0

    def start(self, step: int) -> None:
        """Count from `step` and now."""
        self.first, self.started = step, time.monotonic()

    def show(self, step: int, loss: float) -> None:
        """Say a line, if the last one is some seconds old or this is the end."""
        now = time.monotonic()
        if step < self.total and now - self.shown < PROGRESS_SECONDS:
            return
        self.shown = now
        rate = (step - self.first) / max(now - self.started, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((self.total - step) / rate)) if rate else "?"
        self.say(f"step {step}/{self.total} · loss {loss:.4f} · {rate:.2f} steps/s · {left} left")
