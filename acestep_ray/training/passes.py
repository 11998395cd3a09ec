"""Passes of a LoRA as CUDA graphs: for small batches, which a GPU computes sooner than the host starts their kernels.

Lengths are filled up to a few sizes, each of which is recorded once. What is filled up is masked, so that losses and
gradients stay what they are, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acestep_ray.diffusion.objective import TrainingBatch
from acestep_ray.models.graphs import CapturedCall, graph_memory

# Latent frames of a batch, padding included, from which on a GPU takes longer to compute than the host to start.
MAX_FRAMES = 6_144
# Lengths are filled up to a multiple of these; a 240 s song, which most are cut to, is left as it is.
FRAME_STEP, TEXT_STEP, LYRIC_STEP, SSL_STEP = 128, 64, 256, 256
FRAMES_OF_LONGEST = 2_584
# Of one purpose: a recording of the 3.5B model is some thousand kernels with their arguments.
MAX_RECORDINGS = 48
# Share of the device's memory that recordings leave to validation, samples and lengths that are new.
_MEMORY_LEFT = 0.125

NamedLosses = dict[str, Tensor]
"""Losses of each song, (B,), by the names that they are logged under; `loss` is what is trained on."""
Passes = Callable[[TrainingBatch, float], NamedLosses]
"""Adds the gradients of the sum of a batch's losses, times a factor, to the parameters'; returns the losses."""
Losses = Callable[[TrainingBatch], Tensor]
"""The denoising loss of each song of a batch, (B,), without gradients."""
Kind = tuple[Hashable, ...]
"""What a call is for, and the sizes of its tensors."""


class Recordings:
    """Functions of tensors that are recorded when a kind of call comes for the second time.

    Where that fails, or memory is short, there are no recordings any more: kernels are then launched as they come.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        capture: Callable[[Callable[..., Sequence[Tensor]], Sequence[Tensor], Any], Any] = CapturedCall,
        memory: Callable[[], Any] = graph_memory,
    ):
        """`say` takes a warning."""
        self.say = say
        self.capture = capture
        self.new_memory = memory
        self.memory: Any = None
        self.recordings: dict[Kind, Any] = {}
        self.seen: set[Kind] = set()
        self.gives_up = False

    def __len__(self) -> int:
        return len(self.recordings)

    @property
    def bytes(self) -> int:
        """GPU memory of the recordings."""
        return sum(recording.bytes for recording in self.recordings.values())

    def __call__(
        self, kind: Kind, function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """`function` of these tensors; what a recording returns is overwritten by its next call.

        Calls of one `kind` launch the same kernels on tensors of the same sizes.
        """
        if kind in self.seen and self._may_record(kind):
            self._record(kind, function, tensors)
        self.seen.add(kind)
        return self.recordings.get(kind, function)(*tensors)

    def release(self) -> bool:
        """Do without recordings from now on; returns whether there was memory of theirs to give back."""
        had_some = bool(self.recordings)
        self.gives_up = True
        self.forget()
        return had_some

    def forget(self) -> None:
        """Give the memory of all recordings back."""
        self.recordings.clear()
        self.memory = None
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _may_record(self, kind: Kind) -> bool:
        alike = sum(kind[0] == other[0] for other in self.recordings)
        return not self.gives_up and kind not in self.recordings and alike < MAX_RECORDINGS

    def _record(
        self, kind: Kind, function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]
    ) -> None:
        try:
            self.memory = self.memory or self.new_memory()
            self.recordings[kind] = self.capture(function, tensors, self.memory)
            if self.memory.left() < _MEMORY_LEFT:
                raise torch.OutOfMemoryError
        except torch.OutOfMemoryError:
            self._give_up("there is too little GPU memory for them")
        except RuntimeError as error:  # a layer does what cannot be recorded
            self._give_up(str(error).partition("\n")[0])

    def _give_up(self, reason: str) -> None:
        self.release()
        self.say(f"warning: CUDA graphs are off, and every kernel is launched by itself: {reason}")


class CapturedPasses:
    """Forward and backward passes of training, as recordings where there are any."""

    def __init__(
        self,
        losses_of: Callable[[TrainingBatch], NamedLosses],
        trained: Sequence[nn.Parameter],
        recordings: Recordings,
    ):
        """`losses_of` is one forward pass in the precision of the run."""
        self.losses_of = losses_of
        self.trained = list(trained)
        self.recordings = recordings
        self.names: list[str] = []
        self.used: list[tuple[nn.Parameter, Tensor]] = []
        sizes = [-(-parameter.numel() // 16) * 16 for parameter in self.trained]  # aligned for wide reads
        together = self.trained[0].new_zeros(sum(sizes))
        pieces = zip(self.trained, together.split(sizes), strict=True)
        self.together = together
        self.grads = [piece[: p.numel()].view_as(p) for p, piece in pieces]
        """Where every pass adds its gradients to."""

    def begin(self) -> None:
        """Gradients of zero, before the first pass of a step."""
        self.together.zero_()

    def __call__(self, batch: TrainingBatch, share: float) -> NamedLosses:
        """As `Passes`, of a batch on the device."""
        batch = filled_up(batch)
        factor = torch.full((), share, device=self.together.device)

        def run(*tensors: Tensor) -> list[Tensor]:
            *of_batch, scale = tensors
            return self._launch(_with_tensors(batch, of_batch), scale)

        losses = self.recordings(("training", *_kind_of(batch)), run, [*batch.tensors(), factor])
        for parameter, own in self.used:
            parameter.grad = own
        return {name: values.clone() for name, values in zip(self.names, losses, strict=True)}

    def _launch(self, batch: TrainingBatch, factor: Tensor) -> list[Tensor]:
        losses = self.losses_of(batch)
        self.names = list(losses)
        total = losses["loss"].sum() * factor
        # Not `backward`, whose nodes for a parameter remember a stream of their own.
        found = torch.autograd.grad(total, self.trained, allow_unused=True)
        triples = list(zip(self.trained, self.grads, found, strict=True))
        # What no loss depends on has no gradient, and the optimizer leaves it alone.
        self.used = [(parameter, own) for parameter, own, grad in triples if grad is not None]
        torch._foreach_add_([own for _, own in self.used], [grad for grad in found if grad is not None])
        return [values.detach() for values in losses.values()]


class CapturedLosses:
    """Forward passes of a validation, as recordings where there are any."""

    def __init__(self, losses_of: Losses, recordings: Recordings):
        """`losses_of` is one forward pass in the precision of the run.

        It enters autocast itself: what an autocast around several passes has cached would be read by a recording.
        """
        self.losses_of = losses_of
        self.recordings = recordings

    def __call__(self, batch: TrainingBatch) -> Tensor:
        """As `Losses`, of a batch on the device."""
        batch = filled_up(batch)

        def run(*tensors: Tensor) -> list[Tensor]:
            return [self.losses_of(_with_tensors(batch, tensors))]

        try:
            (losses,) = self.recordings(("validation", *_kind_of(batch)), run, batch.tensors())
        except torch.OutOfMemoryError:
            if not self.recordings.release():
                raise
            (losses,) = run(*batch.tensors())
        return losses.clone()


def filled_up(batch: TrainingBatch) -> TrainingBatch:
    """The batch with its lengths filled up to those that are recorded; losses and gradients stay the same."""
    width, tokens = batch.latents.shape[-1], batch.text.shape[1]
    frames = _up(width, FRAME_STEP)
    if width <= FRAMES_OF_LONGEST < frames:
        frames = FRAMES_OF_LONGEST
    sizes = {
        ("latents", "noise", "frame_mask"): (-1, frames),
        ("text", "text_mask"): (1, _up(tokens, TEXT_STEP)),
        ("lyric_ids", "lyric_mask"): (1, _up(batch.lyric_ids.shape[1], LYRIC_STEP)),
    }
    padded: dict[str, Any] = {
        name: _padded(getattr(batch, name), dim, size)
        for names, (dim, size) in sizes.items()
        for name in names
    }
    ssl = {
        name: replace(target, features=_padded(target.features, 1, _up(target.features.shape[1], SSL_STEP)))
        for name, target in batch.ssl.items()
    }
    start = batch.lyric_start
    if start is None:  # it would follow from the length of the prompts
        start = torch.full((len(batch.text),), 1 + tokens, device=batch.text.device)
    return replace(batch, **padded, ssl=ssl, lyric_start=start)


def _up(length: int, step: int) -> int:
    return -(-length // step) * step


def _padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Zeros, or False, at the end of a dimension."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    after = tensor.dim() - 1 - dim % tensor.dim()
    return F.pad(tensor, (0, 0) * after + (0, missing))


def _with_tensors(batch: TrainingBatch, tensors: Sequence[Tensor]) -> TrainingBatch:
    """The batch with these tensors, in the order of `TrainingBatch.tensors`, in place of its own."""
    places = iter(tensors)
    return batch.map(lambda _: next(places))


def _kind_of(batch: TrainingBatch) -> Kind:
    """Equal for batches that one recording computes."""
    ssl = tuple((name, target.stride) for name, target in batch.ssl.items())
    return ssl, batch.dropout_seeds is None, tuple((t.shape, t.dtype) for t in batch.tensors())
