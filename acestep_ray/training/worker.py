"""The training loop of one worker: plain torch, so that it runs in a test as it runs under Ray Train."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.schema import CachedSong
from acestep_ray.config import TrainConfig
from acestep_ray.diffusion.objective import SampleLosses, TrainingBatch, flow_matching_losses
from acestep_ray.diffusion.schedule import training_sigmas
from acestep_ray.errors import AceStepError
from acestep_ray.export.lora import lora_files
from acestep_ray.models.flops import Lengths, Trained, model_flops
from acestep_ray.tracking import Tracker
from acestep_ray.training.batch import ConditionDropout, build_batch, counter_seed, draw
from acestep_ray.training.model import AUTOCAST_DTYPES, is_sharded, share_among_workers
from acestep_ray.training.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
    step_if,
)
from acestep_ray.training.progress import Progress, Votes
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
    trainable_parameters,
)
from acestep_ray.training.streaming import CacheSource, SongSource, StreamSource
from acestep_ray.training.throughput import Throughput, peak_flops, seconds_of
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


def train_worker(settings: WorkerSettings, place: WorkerPlace, report: Report, say: Say = print) -> dict:
    """Train from the latest checkpoint to the last step; returns the run's losses, and its step."""
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
    """One worker's model, optimizer and place in the plan."""

    def __init__(self, settings: WorkerSettings, place: WorkerPlace, report: Report, say: Say):
        self.settings = settings
        self.place = place
        self.config = config = settings.config
        self.rank, self.workers, self.device = place.rank, place.workers, place.device
        self.report = report
        self.source = open_source(settings, place)
        self.plan = build_plan(self.source.latent_frames, config, settings.held_out)
        self.sigmas = training_sigmas(config.shift)
        self.dropout = ConditionDropout(config.text_dropout, config.speaker_dropout, config.lyric_dropout)

        self.transformer = place.build(config, settings.lora, self.device)
        self.model = share_among_workers(
            self.transformer,
            config,
            is_lora=settings.lora is not None,
            workers=self.workers,
            device=self.device,
        )
        # Then every forward pass is one of all workers together.
        self.together = is_sharded(self.model)
        self.trained = list(trainable_parameters(self.transformer).values())
        self.optimizer = build_optimizer(self.trained, config.weight_decay, config.optimizer)
        self.counted_as_trained = Trained.of(self.transformer)
        self.throughput = Throughput(self.device, self.workers, peak=peak_flops(self.device))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "16-mixed")

        self.checkpoints = Checkpoints(settings.checkpoints, keep_last=config.keep_last)
        self.tracker: Tracker | None = None
        self.samples = None if settings.samples is None else SampleFolder(settings.samples)
        self.unlogged: dict[int, dict[str, Tensor | float]] = {}
        # By step, which songs of each of this worker's micro-batches have a finite loss, (B,) bool.
        self.finite: dict[int, list[Tensor]] = {}
        self.skipped_in_a_row = 0
        self.votes = Votes()
        self.saved_before_preemption = self.saved_before_leaving = False
        self.progress = Progress(settings.total_steps, say)

    def resume(self) -> TrainingState:
        """Go on from the latest checkpoint of this experiment, else from where the settings say."""
        state, snapshot = None, None
        if self.rank == 0:
            state, snapshot = self.find_start()
        state = from_first_worker(state)
        if state is None:
            state = TrainingState(step=0, losses={FIXED_NOISE: {}, VALIDATION: {}})
        else:
            restore(self.transformer, self.optimizer, snapshot)
            if state.loss_scale:
                self.scaler.load_state_dict(state.loss_scale)
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
        self.progress.start(state.step)
        return state

    def find_start(self) -> tuple[TrainingState, Snapshot] | tuple[None, None]:
        """The latest checkpoint of this experiment, else that of `ckpt_path`."""
        found = self.checkpoints.read_latest(self.transformer, self.progress.say)
        if found is None and self.config.ckpt_path is not None:
            store, step = locate_checkpoint(self.config.ckpt_path)
            found = Checkpoints(store).read(step, self.transformer)
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
        items = self.plan.step(step)
        mine = items[self.rank :: self.workers]
        if self.together and len(mine) < -(-len(items) // self.workers):
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
        sums = self.accumulate_gradients(step, batches)
        songs = [song for item in self.plan.step(step) for song in item.songs]
        means, flops = self.add_up(sums, len(songs), self.count_flops(step, batches))
        self.throughput.step(len(songs), seconds_of(int(self.source.latent_frames[songs].sum())), flops)
        rate = learning_rate_at(
            step,
            peak=self.config.learning_rate,
            warmup_steps=self.config.warmup_steps,
            max_steps=self.settings.total_steps,
        )
        set_learning_rate(self.optimizer, rate)
        self.unlogged[step] = {
            **means,
            "grad_norm": self.update_weights(means["loss"]),
            "learning_rate": rate,
            "epoch": float(self.plan.step(step)[0].epoch),
        }

    def accumulate_gradients(self, step: int, batches: list[TrainingBatch]) -> dict[str, Tensor]:
        """Backward passes over the micro-batches; returns the sums of their songs' losses."""
        songs_in_step = sum(len(item.songs) for item in self.plan.step(step))
        real = len(self.plan.step(step)[self.rank :: self.workers])
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            # PEFT's dropout draws from torch's own stream, which then follows from the step as all else does.
            place_in_step = self.rank + number * self.workers
            torch.manual_seed(counter_seed("dropout", self.config.seed, step, place_in_step))
            with self.sync_gradients(number == len(batches) - 1):
                with self.autocast():
                    losses = flow_matching_losses(self.model, batch.to(self.device))
                total = losses.total(self.config.ssl_coeff)
                # A mean over all songs of the step, whoever holds them; the workers' gradients are averaged.
                share = self.workers / songs_in_step if number < real else 0.0
                self.scaler.scale(total.sum() * share).backward()
            if number < real:
                self.finite.setdefault(step, []).append(torch.isfinite(total.detach()))
                for name, values in named_losses(losses, total).items():
                    sums[name] = sums.get(name, 0.0) + values.detach().sum()
        return sums

    def count_flops(self, step: int, batches: list[TrainingBatch]) -> float:
        """Useful operations of this worker's part of a step: of its songs without their padding."""
        mine = batches[: len(self.plan.step(step)[self.rank :: self.workers])]
        lengths = [
            Lengths.of(*(mask.sum(dim=1).tolist() for mask in (b.frame_mask, b.text_mask, b.lyric_mask)))
            for b in mine
        ]
        with_ssl = self.config.ssl_coeff > 0
        count = partial(
            model_flops, self.transformer.config, with_ssl=with_ssl, trained=self.counted_as_trained
        )
        return float(sum(count(one).total for one in lengths))

    def add_up(
        self, sums: dict[str, Tensor], songs: int, flops: float
    ) -> tuple[dict[str, Tensor], float | Tensor]:
        """Means over the songs of all workers, and their operations; what they ask for travels with these."""
        asked = [float(self.place.asked_to_save()), float(self.place.asked_to_stop())]
        if self.workers == 1:
            self.votes.put(torch.tensor(asked))
            return {name: value / songs for name, value in sums.items()}, flops
        extra = torch.tensor([flops, *asked]).to(self.device, non_blocking=True)
        together = torch.cat([torch.stack(list(sums.values())), extra])
        torch.distributed.all_reduce(together)
        self.votes.put(together[-2:])
        return {name: value / songs for name, value in zip(sums, together, strict=False)}, together[-3]

    def update_weights(self, loss: Tensor) -> Tensor:
        """One step of the optimizer, unless loss or gradients are not finite; returns the gradients' norm.

        The gradients are those of all workers, and so is what follows from them.
        """
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(
            self.trained, self.config.gradient_clip_val, self.config.gradient_clip_algorithm
        )
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            step_if(self.optimizer, torch.isfinite(norm) & torch.isfinite(loss))
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def after_step(self, state: TrainingState) -> bool:
        """Log, validate and save, each at its own pace; returns whether the run ends here."""
        config, step = self.config, state.step
        last = step == self.settings.total_steps
        wants_to_leave, stop = self.votes.take()
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
        since_best = len([step for step in measured if step > best])
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
            if math.isfinite(values["loss"]) and self.scaler.is_enabled():
                continue  # float16 looks for its loss scale that way
            self.skipped_in_a_row += 1
            state.losses["skipped"] = state.losses.get("skipped", 0) + 1
            self.tell_of_skipped(step, values)
        if metrics:  # what the GPU had to do for them is done
            metrics[max(metrics)].update(self.throughput.metrics())
        self.unlogged, self.finite = {}, {}
        if self.tracker is not None:
            extra = {"skipped_steps": float(state.losses.get("skipped", 0))}
            if self.scaler.is_enabled():
                extra["loss_scale"] = self.scaler.get_scale()
            self.tracker.log({step: {**values, **extra} for step, values in metrics.items()})
            self.progress.show(state.step, state.losses.get("last", math.nan))
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            self.save(state, wait=True)
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
        """Measure and log the loss over fixed noise: of some songs that are trained on, and of those held out."""
        measured: dict[str, float] = {}
        for name, songs in ((FIXED_NOISE, self.plan.songs), (VALIDATION, self.settings.held_out)):
            songs = [int(song) for song in songs[:SONGS]]
            if not songs:
                continue
            with self.evaluating(), self.autocast():
                losses = fixed_noise_losses(
                    self.transformer,
                    self.source.read,
                    songs,
                    self.sigmas,
                    self.device,
                    rank=self.rank,
                    workers=self.workers,
                    together=self.together,
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
        if self.samples is None or (self.rank > 0 and not self.together):
            return
        directory = self.samples.path / f"step={state.step}"
        song = self.source.read(0)
        try:
            with self.evaluating(), self.autocast():
                waveform = write_sample(
                    directory if self.rank == 0 else None, self.transformer, song, self.config, self.device
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
        if self.tracker is not None:
            self.tracker.log_audio(f"sample/{song.key}", *waveform, step=state.step)
            self.tracker.log_artifacts(directory, f"samples/{directory.name}")

    def save(self, state: TrainingState, *, wait: bool) -> None:
        """Write a checkpoint, while training goes on unless `wait`, and report it."""
        if self.scaler.is_enabled():
            state.loss_scale = self.scaler.state_dict()
        # With whole parameters on every worker, the first one's are enough.
        snapshot = None
        if self.rank == 0 or self.together:
            files = lora_files(self.transformer) if self.settings.lora is not None else {}
            snapshot = take_snapshot(self.transformer, self.optimizer, files)
        place = self.checkpoints.save(snapshot, state) if snapshot is not None else None
        if wait:
            self.checkpoints.finish()
        metrics = {"step": state.step}
        if "last" in state.losses:
            metrics["loss"] = state.losses["last"]
        for name in (FIXED_NOISE, VALIDATION):
            if state.losses[name]:
                metrics[name] = list(state.losses[name].values())[-1]
        self.report(metrics, place)

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

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision, where it was asked for."""
        dtype = AUTOCAST_DTYPES.get(self.config.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without PEFT's dropout."""
        self.transformer.eval()
        try:
            yield
        finally:
            self.transformer.train()

    def sync_gradients(self, last: bool) -> contextlib.AbstractContextManager:
        """Whole gradients travel between workers once a step, with the last micro-batch; shards with every one."""
        if self.workers > 1 and not last and not self.together:
            return self.model.no_sync()
        return contextlib.nullcontext()


def named_losses(losses: SampleLosses, total: Tensor) -> dict[str, Tensor]:
    """The losses of each song, (B,), by the names that they are logged under."""
    ssl = {f"loss/{name}": values for name, values in losses.ssl.items()}
    return {"loss": total, "loss/denoising": losses.denoising, **ssl}


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
