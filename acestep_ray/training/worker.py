"""The training loop of one worker: plain torch, so that it runs in a test as it runs under Ray Train."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.schema import CachedSong
from acestep_ray.config import TrainConfig
from acestep_ray.diffusion.objective import TrainingBatch
from acestep_ray.diffusion.schedule import training_sigmas
from acestep_ray.errors import AceStepError
from acestep_ray.export.lora import lora_files
from acestep_ray.tracking import Tracker
from acestep_ray.training.batch import ConditionDropout, build_batch, draw
from acestep_ray.training.gpu_memory import memory_told
from acestep_ray.training.progress import Progress
from acestep_ray.training.sampler import BatchPlan, MicroBatch
from acestep_ray.training.samples import SampleFolder, write_sample
from acestep_ray.training.settings import Report, Say, WorkerPlace, WorkerSettings
from acestep_ray.training.state import (
    Checkpoints,
    Snapshot,
    TrainingState,
    best_step,
    from_first_worker,
    locate_checkpoint,
    restore,
    take_snapshot,
)
from acestep_ray.training.step import Learner
from acestep_ray.training.streaming import CacheSource, SongSource, StreamSource
from acestep_ray.training.throughput import TIMES_REAL_TIME, Throughput, peak_flops, seconds_of
from acestep_ray.training.validation import (
    FIXED_NOISE,
    SONGS,
    VALIDATION,
    fixed_noise_losses,
    validation_metrics,
)

# Metrics stay on the device until this many steps are together: reading one waits for the GPU.
LOG_EVERY = 10


class TrainingDivergedError(AceStepError):
    """The loss is not finite any more."""


def train_worker(
    settings: WorkerSettings, place: WorkerPlace, report: Report, say: Say = print
) -> dict[str, Any]:
    """Train from the latest checkpoint to the last step; returns the run's losses, and its step.

    Raises TrainingDivergedError, GpuMemoryError, and InputError for what the settings name.
    """
    with memory_told(settings.config, is_lora=settings.lora is not None):
        return _train(settings, place, report, say)


def _train(settings: WorkerSettings, place: WorkerPlace, report: Report, say: Say) -> dict[str, Any]:
    with place.turn:
        trainer = Trainer(settings, place, report, say)
    with trainer:
        with place.turn:
            state = trainer.resume()
            trainer.before_first_step(state)
        for step, batches in enumerate(trainer.batches(state.step), start=state.step):
            with place.turn:
                trainer.train_step(step, batches)
                state.step = step + 1
                if trainer.after_step(state):
                    break
    return {"step": state.step, **state.losses}


class Trainer:
    """One worker's part of a run: what its learner learns from, and what is measured, told and saved on the way."""

    def __init__(self, settings: WorkerSettings, place: WorkerPlace, report: Report, say: Say):
        self.settings = settings
        self.place = place
        self.config = config = settings.config
        self.rank, self.workers, self.device = place.rank, place.workers, place.device
        self.report = report
        self.source = open_source(settings, place)
        self.plan = build_plan(self.source.latent_frames, config, settings.held_out)
        self.progress = Progress(settings.total_steps, say)
        self.learner = Learner(settings, place, self.plan, self.progress.say)
        self.sigmas = training_sigmas(config.shift)
        self.dropout = ConditionDropout(config.text_dropout, config.speaker_dropout, config.lyric_dropout)
        self.throughput = Throughput(self.device, self.workers, peak=peak_flops(self.device))

        self.checkpoints = Checkpoints(settings.checkpoints, keep_last=config.keep_last)
        self.tracker: Tracker | None = None
        self.samples = None if settings.samples is None else SampleFolder(settings.samples)
        self.unlogged: dict[int, dict[str, Tensor | float]] = {}
        self.finite: dict[int, list[Tensor]] = {}
        """By step, which songs of each of this worker's micro-batches have a finite loss, (B,) bool."""
        self.skipped_in_a_row = 0
        self.saved_before_preemption = self.saved_before_leaving = False

    def resume(self) -> TrainingState:
        """Go on from the latest checkpoint of this experiment, else from where the settings say."""
        state, snapshot = None, None
        if self.rank == 0:
            state, snapshot = self.find_start()
        state = from_first_worker(state)
        if state is None:
            state = TrainingState(step=0, losses={FIXED_NOISE: {}, VALIDATION: {}})
        else:
            restore(self.learner.transformer, self.learner.optimizer, snapshot)
            if state.loss_scale:
                self.learner.scaler.load_state_dict(state.loss_scale)
        if self.rank == 0:
            self.tracker = Tracker(
                self.settings.log_dir,
                self.settings.mlflow_run,
                first_step=state.step,
                say=self.progress.say,
            )
            # The trackers have dropped what was written from this step on, and this step is not validated again.
            if measured := state.losses.get("measured", {}).get(str(state.step)):
                self.tracker.log({state.step: measured})
        return state

    def find_start(self) -> tuple[TrainingState, Snapshot] | tuple[None, None]:
        """The latest checkpoint of this experiment, else that of `ckpt_path`."""
        found = self.checkpoints.read_latest(self.learner.transformer, self.progress.say)
        if found is None and self.config.ckpt_path is not None:
            store, step = locate_checkpoint(self.config.ckpt_path)
            found = Checkpoints(store).read(step, self.learner.transformer)
        return found or (None, None)

    def before_first_step(self, state: TrainingState) -> None:
        """Measure the validation losses of the untrained model, to compare with later."""
        if state.step == 0:
            self.validate(state)

    def batches(self, first_step: int) -> Iterator[list[TrainingBatch]]:
        """This worker's micro-batches of every step from `first_step` on, read ahead of the model."""
        steps = range(first_step, self.settings.total_steps)
        mine = (item for step in steps for item in self.micro_batches(step))
        loaded = self.source.read_ahead(mine, self.make_batch, self.config.num_workers)
        for step in steps:
            with self.throughput.data_wait():
                batches = [next(loaded) for _ in self.micro_batches(step)]
            yield batches

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This worker's part of a step; where all compute together, one more for those that would have none left."""
        items, mine = self.plan.step(step), self.learner.share(step)
        if self.learner.together and len(mine) < -(-len(items) // self.workers):
            mine = [*mine, items[0]]
        return mine

    def make_batch(self, item: MicroBatch, songs: list[CachedSong]) -> TrainingBatch:
        """The songs of one micro-batch with their draws."""
        draws = [draw(s, self.sigmas, self.dropout, seed=self.config.seed, epoch=item.epoch) for s in songs]
        with_ssl = self.config.ssl_coeff > 0
        batch = build_batch(songs, draws, ssl_stride=self.source.ssl_stride, with_ssl=with_ssl)
        return batch.pin() if self.device.type == "cuda" else batch

    def train_step(self, step: int, batches: list[TrainingBatch]) -> None:
        """One optimizer step over this worker's micro-batches of the step."""
        outcome = self.learner.step(step, batches)
        self.unlogged[step], self.finite[step] = outcome.metrics, outcome.finite
        songs = [song for item in self.plan.step(step) for song in item.songs]
        seconds = seconds_of(int(self.source.latent_frames[songs].sum()))
        self.throughput.step(len(songs), seconds, outcome.flops)

    def after_step(self, state: TrainingState) -> bool:
        """Log, validate and save, each at its own pace; returns whether the run ends here."""
        config, step = self.config, state.step
        last = step == self.settings.total_steps
        wants_to_leave, stop = self.learner.votes.take()
        asked_to_save = wants_to_leave and not self.saved_before_leaving
        save = (
            last or stop or asked_to_save or self.is_preempted(step) or step % config.every_n_train_steps == 0
        )
        validate = last or step % (config.val_check_interval or config.every_plot_step) == 0
        plot = last or step % config.every_plot_step == 0
        if plot or save or validate or len(self.unlogged) >= LOG_EVERY:
            self.flush_metrics(state)
        with self.throughput.paused():
            if validate:
                self.validate(state)
                if not last and self.has_stopped_improving(state):
                    state.losses["stopped_early"] = step
                    save = stop = True
            if plot:
                self.write_sample(state)
            if save:
                self.save(state, wait=last or stop or asked_to_save)
        if wants_to_leave:
            self.saved_before_leaving = True
            self.place.saved()
        return stop

    def is_preempted(self, step: int) -> bool:
        """Whether a machine is about to go and nothing was saved for that yet; looked at every few steps."""
        if step % LOG_EVERY or self.saved_before_preemption:
            return False
        self.saved_before_preemption = self.place.preempted()
        return self.saved_before_preemption

    def has_stopped_improving(self, state: TrainingState) -> bool:
        """Whether the validation loss has not been lower for as many validations as the settings allow."""
        by_step = state.losses[VALIDATION] or state.losses[FIXED_NOISE]
        measured = [int(step) for step in by_step]
        best = best_step(state.losses, measured)
        since_best = len([step for step in measured if best is None or step > best])
        return 0 < self.config.early_stopping_patience <= since_best

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
            metrics[step] = {name: value for name, value in values.items() if math.isfinite(value)}
            if math.isfinite(values["loss"]) and self.learner.scaler.is_enabled():
                continue  # float16 looks for its loss scale that way
            self.skipped_in_a_row += 1
            state.losses["skipped"] = state.losses.get("skipped", 0) + 1
            self.tell_of_skipped(step, values)
        speed: dict[str, float] = {}
        if metrics:  # what the GPU had to do for them is done
            speed = self.throughput.metrics(
                0 if self.learner.recordings is None else self.learner.recordings.bytes
            )
            metrics[max(metrics)].update(speed)
        self.unlogged, self.finite = {}, {}
        if self.tracker is not None:
            extra = {"skipped_steps": float(state.losses.get("skipped", 0))}
            if self.learner.scaler.is_enabled():
                extra["loss_scale"] = self.learner.scaler.get_scale()
            self.tracker.log({step: {**values, **extra} for step, values in metrics.items()})
            self.progress.show(state.step, state.losses.get("last", math.nan), speed.get(TIMES_REAL_TIME))
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            self.save(state, wait=True)
            raise TrainingDivergedError(
                f"the last {self.skipped_in_a_row} steps before step {state.step} had no finite loss and were skipped; "
                f"what there is was saved as {self.checkpoints.folder(state.step).url}\n"
                "  → lower --learning_rate and go back to an earlier checkpoint, or look at the songs that were named"
            )

    def tell_of_skipped(self, step: int, values: dict[str, float]) -> None:
        """Name this worker's songs whose loss was not finite; the first worker tells where there are none."""
        keys = [
            self.source.read(row).key
            for item, finite in zip(self.learner.share(step), self.finite[step], strict=True)
            for row, is_finite in zip(item.songs, finite.tolist(), strict=True)
            if not is_finite
        ]
        if keys or self.rank == 0:
            what = f"the loss of {', '.join(keys)} is not finite" if keys else "its gradient is not finite"
            self.progress.say(
                f"warning: step {step} is skipped: {what} (gradient norm {values['grad_norm']})"
            )

    def validate(self, state: TrainingState) -> None:
        """Measure and log the loss over fixed noise: of some songs that are trained on, and of those held out."""
        measured: dict[str, float] = {}
        trained_on = self.plan.songs[:SONGS].tolist()
        for name, songs in ((FIXED_NOISE, trained_on), (VALIDATION, list(self.settings.held_out[:SONGS]))):
            if not songs:
                continue
            with self.learner.validating():
                losses = fixed_noise_losses(
                    self.learner.validation_losses,
                    self.source.read,
                    songs,
                    self.sigmas,
                    self.device,
                    rank=self.rank,
                    workers=self.workers,
                    together=self.learner.together,
                    say=self.progress.say,
                )
            metrics = validation_metrics(f"loss/{name}", losses)
            state.losses[name][str(state.step)] = metrics[f"loss/{name}"]
            measured.update(metrics)
        state.losses["measured"] = {str(state.step): measured}
        if self.tracker is not None:
            self.tracker.log({state.step: measured})

    def write_sample(self, state: TrainingState) -> None:
        """Generate the first song's prompt and lyrics with the model as it is; a failure is told and ends nothing."""
        if self.samples is None or (self.rank > 0 and not self.learner.together):
            return
        directory = self.samples.path / f"step={state.step}"
        song = self.source.read(0)
        try:
            with self.learner.validating(), self.learner.autocast():
                sound = write_sample(
                    directory if self.rank == 0 else None,
                    self.learner.transformer,
                    song,
                    self.config,
                    self.device,
                )
            if self.rank == 0:
                self.samples.publish(directory.name)
        except (
            Exception
        ) as error:  # memory, disk, a damaged codec: hours of training are worth more than a sample
            self.progress.say(
                f"warning: no sample at step {state.step}: {type(error).__name__}: {error}\n"
                "  → training goes on; `acestep-ray generate` makes music from its checkpoint"
            )
            return
        if self.tracker is not None and sound is not None:
            waveform, sample_rate = sound
            self.tracker.log_audio(f"sample/{song.key}", waveform, sample_rate, state.step)
            self.tracker.log_artifacts(directory, f"samples/{directory.name}")

    def save(self, state: TrainingState, *, wait: bool) -> None:
        """Write a checkpoint, while training goes on unless `wait`, and report it."""
        if self.learner.scaler.is_enabled():
            state.loss_scale = self.learner.scaler.state_dict()
        self.finish_writing()
        # With whole parameters on every worker, the first one's are enough.
        snapshot = None
        if self.rank == 0 or self.learner.together:
            files = lora_files(self.learner.transformer) if self.settings.lora is not None else {}
            snapshot = take_snapshot(self.learner.transformer, self.learner.optimizer, files)
        place = self.checkpoints.save(snapshot, state) if snapshot is not None else None
        if wait:
            self.finish_writing()
        metrics: dict[str, float] = {"step": state.step}
        if "last" in state.losses:
            metrics["loss"] = state.losses["last"]
        for name in (FIXED_NOISE, VALIDATION):
            if state.losses[name]:
                metrics[name] = list(state.losses[name].values())[-1]
        self.report(metrics, place)

    def finish_writing(self) -> None:
        """Wait until the last checkpoint is written. Raises AceStepError when it could not be."""
        with self.place.waiting():
            self.checkpoints.finish()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write the checkpoint that is on its way, and what the trackers hold."""
        try:
            self.checkpoints.finish()
        except AceStepError as error:
            if kind is None:
                raise
            self.progress.say(f"warning: {error}")  # the error that ended the run is the one to tell
        finally:
            if self.tracker is not None:
                self.tracker.close()
            if self.samples is not None:
                self.samples.close()
            if self.learner.recordings is not None:  # which would wait for the collection of garbage
                with self.place.turn:
                    self.learner.recordings.forget()


def open_source(settings: WorkerSettings, place: WorkerPlace) -> SongSource:
    """Where this worker's songs come from."""
    if settings.stream is not None:
        return StreamSource(settings.stream, place.device, place.workers)
    return CacheSource(CacheIndex.open(settings.config.dataset_path))


def build_plan(latent_frames: np.ndarray, config: TrainConfig, held_out: Sequence[int] = ()) -> BatchPlan:
    """The micro-batches of a run over songs of these lengths, (songs,), but those held out."""
    return BatchPlan(
        latent_frames,
        seed=config.seed,
        micro_batches_per_step=config.accumulate_grad_batches * config.devices * config.num_nodes,
        batch_size=config.batch_size,
        batch_frames=config.batch_frames,
        held_out=held_out,
        shuffle_every=config.reload_dataloaders_every_n_epochs,
    )
