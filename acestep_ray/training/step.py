"""One optimizer step of a worker: forward and backward passes, sums over the workers, new weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from acestep_ray.diffusion.objective import (
    SampleLosses,
    TrainingBatch,
    denoising_losses,
    flow_matching_losses,
)
from acestep_ray.models.flops import Lengths, Trained, model_flops
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.training.batch import counter_seed
from acestep_ray.training.frozen import AUTOCAST_DTYPES
from acestep_ray.training.model import is_sharded, share_among_workers
from acestep_ray.training.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
    step_if,
)
from acestep_ray.training.passes import (
    MAX_FRAMES,
    CapturedLosses,
    CapturedPasses,
    Losses,
    NamedLosses,
    Passes,
    Recordings,
)
from acestep_ray.training.progress import Votes
from acestep_ray.training.sampler import BatchPlan, MicroBatch
from acestep_ray.training.settings import WorkerPlace, WorkerSettings
from acestep_ray.training.state import trainable_parameters


@dataclass(frozen=True)
class StepOutcome:
    """What a step came to. Tensors lie on the device: to read one waits for it."""

    metrics: dict[str, Tensor | float]
    """By name: losses, means over the songs of all workers; the gradients' norm, the learning rate and the epoch."""
    finite: list[Tensor]
    """Which songs of each of this worker's micro-batches have a finite loss, (B,) bool."""
    flops: float | Tensor
    """Useful operations of all workers."""


class Learner:
    """One worker's model and optimizer."""

    def __init__(
        self,
        settings: WorkerSettings,
        place: WorkerPlace,
        plan: BatchPlan,
        say: Callable[[str], None] = print,
    ):
        self.settings, self.config = settings, settings.config
        self.place, self.plan = place, plan
        self.rank, self.workers, self.device = place.rank, place.workers, place.device
        self.transformer = place.build(self.config, settings.lora, self.device)
        self.transformer.draws_in_blocks = has_dropout(self.transformer.transformer_blocks)
        self.model = share_among_workers(
            self.transformer,
            self.config,
            is_lora=settings.lora is not None,
            workers=self.workers,
            device=self.device,
        )
        # Then every forward pass is one of all workers together.
        self.together = is_sharded(self.model)
        self.trained = list(trainable_parameters(self.transformer).values())
        self.optimizer = build_optimizer(self.trained, self.config.weight_decay, self.config.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.precision == "16-mixed")
        self.counted_as_trained = Trained.of(self.transformer)
        self.votes = Votes()
        self.recordings = Recordings(say) if can_capture(self.transformer, settings, place, plan) else None
        """Where all batches are small, their passes as CUDA graphs."""
        self.captured: CapturedPasses | None = None
        self.validation_losses: Losses = self.denoising_losses
        """For a validation, within `validating`."""
        if self.recordings is not None:
            self.captured = CapturedPasses(self.losses_of, self.trained, self.recordings)
            self.validation_losses = CapturedLosses(self.denoising_losses, self.recordings)

    def share(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step that are this worker's."""
        return self.plan.step(step)[self.rank :: self.workers]

    def step(self, step: int, batches: list[TrainingBatch]) -> StepOutcome:
        """One optimizer step over this worker's micro-batches, which may be one more than its share."""
        songs = sum(len(item.songs) for item in self.plan.step(step))
        sums, finite = self.accumulate_gradients(step, batches, songs)
        means, flops = self.add_up(sums, songs, self.count_flops(step, batches))
        rate = learning_rate_at(
            step,
            peak=self.config.learning_rate,
            warmup_steps=self.config.warmup_steps,
            max_steps=self.settings.total_steps,
        )
        set_learning_rate(self.optimizer, rate)
        metrics: dict[str, Tensor | float] = {
            **means,
            "grad_norm": self.update_weights(means["loss"]),
            "learning_rate": rate,
            "epoch": float(self.plan.step(step)[0].epoch),
        }
        return StepOutcome(metrics, finite, flops)

    def accumulate_gradients(
        self, step: int, batches: list[TrainingBatch], songs_in_step: int
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Backward passes over the micro-batches; the sums of their songs' losses, and which of these are finite."""
        try:
            return self._accumulate_gradients(step, batches, songs_in_step)
        except torch.OutOfMemoryError:
            if self.recordings is None or not self.recordings.release():
                raise
        # From the start: some of the gradients may have been added.
        self.optimizer.zero_grad(set_to_none=True)
        return self._accumulate_gradients(step, batches, songs_in_step)

    def _accumulate_gradients(
        self, step: int, batches: list[TrainingBatch], songs_in_step: int
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        if self.captured is not None:
            self.captured.begin()
        add_gradients: Passes = self.captured or self.add_gradients
        real = len(self.share(step))
        sums: dict[str, Tensor] = {}
        finite = []
        for number, batch in enumerate(batches):
            # PEFT's dropout draws from torch's own stream, which then follows from the step as all else does.
            place_in_step = self.rank + number * self.workers
            torch.manual_seed(counter_seed("dropout", self.config.seed, step, place_in_step))
            # A mean over all songs of the step, whoever holds them; the workers' gradients are averaged.
            share = self.workers / songs_in_step if number < real else 0.0
            with self.sync_gradients(number == len(batches) - 1):
                losses = add_gradients(batch.to(self.device), share)
            if number < real:
                finite.append(torch.isfinite(losses["loss"]))
                for name, values in losses.items():
                    sums[name] = sums.get(name, 0.0) + values.sum()
        return sums, finite

    def add_gradients(self, batch: TrainingBatch, share: float) -> NamedLosses:
        """As `Passes`, every kernel launched by itself."""
        losses = self.losses_of(batch)
        self.scaler.scale(losses["loss"].sum() * share).backward()
        return {name: values.detach() for name, values in losses.items()}

    def losses_of(self, batch: TrainingBatch) -> NamedLosses:
        """A forward pass, in mixed precision where it was asked for."""
        with self.autocast():
            losses = flow_matching_losses(self.model, batch)
        return named_losses(losses, losses.total(self.config.ssl_coeff))

    def count_flops(self, step: int, batches: list[TrainingBatch]) -> float:
        """Useful operations of this worker's part of a step: of its songs without their padding."""
        lengths = [
            Lengths.of(*(mask.sum(dim=1).tolist() for mask in (b.frame_mask, b.text_mask, b.lyric_mask)))
            for b in batches[: len(self.share(step))]
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

    def autocast(self) -> torch.autocast:
        """Mixed precision, where it was asked for."""
        dtype = AUTOCAST_DTYPES.get(self.config.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def denoising_losses(self, batch: TrainingBatch) -> Tensor:
        """As `Losses`, every kernel launched by itself."""
        with self.autocast():
            return denoising_losses(self.transformer, batch)

    @contextlib.contextmanager
    def validating(self) -> Iterator[None]:
        """Without PEFT's dropout."""
        self.transformer.eval()
        try:
            yield
        finally:
            self.transformer.train()

    def sync_gradients(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Whole gradients travel between workers once a step, with the last micro-batch; shards with every one."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return contextlib.nullcontext()


def can_capture(
    transformer: ACEStepTransformer, settings: WorkerSettings, place: WorkerPlace, plan: BatchPlan
) -> bool:
    """Whether the passes of this run can be CUDA graphs, and go faster so.

    Those of a LoRA on fused blocks can, on one worker. Large batches keep a GPU busy without, and need the memory.
    """
    config = settings.config
    if not config.cuda_graphs or settings.lora is None or transformer.prepare is None:
        return False
    if place.workers > 1 or plan.most_frames > MAX_FRAMES:
        return False
    # Computing a block again with its draws means to read and to set torch's generator, which waits for the GPU.
    return not (transformer.draws_in_blocks and config.activation_checkpointing > 0)


def has_dropout(blocks: nn.Module) -> bool:
    """Whether a LoRA drops some of its inputs; the model itself draws from counters."""
    return any(isinstance(layer, nn.Dropout) for layer in blocks.modules())


def named_losses(losses: SampleLosses, total: Tensor) -> NamedLosses:
    """The losses of each song, (B,), by the names that they are logged under."""
    ssl = {f"loss/{name}": values for name, values in losses.ssl.items()}
    return {"loss": total, "loss/denoising": losses.denoising, **ssl}
