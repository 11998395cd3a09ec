"""Forward and backward passes of a LoRA as CUDA graphs: for small batches, which a GPU computes sooner than the host
starts their kernels.

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
# A recording of the 3.5B model is some thousand kernels with their arguments.
MAX_RECORDINGS = 48
# Share of the device's memory that recordings leave to validation, samples and lengths that are new.
_MEMORY_LEFT = 0.125

NamedLosses = dict[str, Tensor]
"""Losses of each song, (B,), by the names that they are logged under; `loss` is what is trained on."""
Passes = Callable[[TrainingBatch, float], NamedLosses]
"""Adds the gradients of the sum of a batch's losses, times a factor, to the parameters'; returns the losses."""


class CapturedPasses:
    """Passes that are recorded when lengths come for the second time.

    Where that fails, or memory is short, there are no recordings any more: the passes are then launched as they come.
    """

    def __init__(
        self,
        losses_of: Callable[[TrainingBatch], NamedLosses],
        trained: Sequence[nn.Parameter],
        say: Callable[[str], None],
        capture: Callable[[Callable[..., Sequence[Tensor]], Sequence[Tensor], Any], Any] = CapturedCall,
        memory: Callable[[], Any] = graph_memory,
    ):
        """`losses_of` is one forward pass in the precision of the run; `say` takes a warning."""
        self.losses_of = losses_of
        self.trained = list(trained)
        self.say = say
        self.capture = capture
        self.new_memory = memory
        self.memory: Any = None
        self.recordings: dict[Hashable, Any] = {}
        self.seen: set[Hashable] = set()
        self.gives_up = False
        self.names: list[str] = []
        self.used: list[tuple[nn.Parameter, Tensor]] = []
        sizes = [-(-parameter.numel() // 16) * 16 for parameter in self.trained]  # aligned for wide reads
        together = self.trained[0].new_zeros(sum(sizes))
        pieces = zip(self.trained, together.split(sizes), strict=True)
        self.together = together
        self.grads = [piece[: p.numel()].view_as(p) for p, piece in pieces]
        """Where every pass adds its gradients to."""

    @property
    def bytes(self) -> int:
        """GPU memory of the recordings."""
        return sum(recording.bytes for recording in self.recordings.values())

    def begin(self) -> None:
        """Gradients of zero, before the first pass of a step."""
        self.together.zero_()

    def __call__(self, batch: TrainingBatch, share: float) -> NamedLosses:
        """As `Passes`, of a batch on the device."""
        batch = filled_up(batch)
        factor = torch.full((), share, device=self.together.device)
        kind = _kind_of(batch)
        if kind in self.seen and self._may_record(kind):
            self._record(kind, batch, factor)
        self.seen.add(kind)
        recording = self.recordings.get(kind)
        losses = self._launch(batch, factor) if recording is None else recording(*batch.tensors(), factor)
        for parameter, own in self.used:
            parameter.grad = own
        # A recording's own are overwritten by the next.
        return {name: values.clone() for name, values in zip(self.names, losses, strict=True)}

    def _may_record(self, kind: Hashable) -> bool:
        return not self.gives_up and kind not in self.recordings and len(self.recordings) < MAX_RECORDINGS

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
        if self.together.is_cuda:
            torch.cuda.empty_cache()

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

    def _record(self, kind: Hashable, batch: TrainingBatch, factor: Tensor) -> None:
        def run(*tensors: Tensor) -> list[Tensor]:
            places = iter(tensors)
            return self._launch(batch.map(lambda _: next(places)), next(places))

        try:
            self.memory = self.memory or self.new_memory()
            self.recordings[kind] = self.capture(run, [*batch.tensors(), factor], self.memory)
            if self.memory.left() < _MEMORY_LEFT:
                raise torch.OutOfMemoryError
        except torch.OutOfMemoryError:
            self._give_up("there is too little GPU memory for them")
        except RuntimeError as error:  # a layer does what cannot be recorded
            self._give_up(str(error).partition("\n")[0])

    def _give_up(self, reason: str) -> None:
        self.release()
        self.say(f"warning: CUDA graphs are off, and every kernel is launched by itself: {reason}")


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


def _kind_of(batch: TrainingBatch) -> Hashable:
    """Equal for batches that one recording computes."""
    ssl = tuple((name, target.stride) for name, target in batch.ssl.items())
    return ssl, batch.dropout_seeds is None, tuple((t.shape, t.dtype) for t in batch.tensors())
