"""CUDA graphs: all kernels of a call, recorded once and started together.

The host takes some microseconds for every kernel that it starts, and a pass of this model starts thousands of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class GraphMemory:
    """What recordings compute in, all in the same place, as they never run at the same time; it goes with the last."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        # Memory of a pool belongs to the stream that it was asked for on.
        self.stream = torch.cuda.Stream()

    def left(self) -> float:
        """Share of the device's memory that is free."""
        free, total = torch.cuda.mem_get_info()
        return free / total


_memory: weakref.ref[GraphMemory] | None = None


def graph_memory() -> GraphMemory:
    """The one of this process, as long as somebody holds it: runs of one process take turns."""
    global _memory
    memory = None if _memory is None else _memory()
    if memory is None:
        memory = GraphMemory()
        _memory = weakref.ref(memory)
    return memory


class CapturedCall:
    """A function of tensors, recorded: the same kernels, on what is copied into the places of its inputs.

    The function must not wait for the device, and has to have run before: what is compiled, measured or allocated for
    the first time cannot be recorded. Recording computes nothing.
    """

    def __init__(
        self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], memory: GraphMemory
    ):
        """`inputs` are an example of its arguments."""
        self.inputs = [given.clone() for given in inputs]
        self.memory = memory
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        # Other threads read ahead, and may ask for memory meanwhile.
        with torch.cuda.graph(
            self.graph, pool=memory.pool, stream=memory.stream, capture_error_mode="thread_local"
        ):
            self.outputs = function(*self.inputs)
        self.bytes = max(0, torch.cuda.memory_reserved() - before)
        """Of GPU memory that it took in addition to what was there for the other recordings."""

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Its outputs for these; their memory is that of the next call's."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.outputs
