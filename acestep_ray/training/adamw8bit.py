"""AdamW with moments of eight bits (Dettmers et al., 2022, arXiv:2110.02861), from torchao, which is an extra."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchao.optim
from torch import Tensor, nn
from torchao.optim.subclass_8bit import OptimState8bit


class AdamW8bit(torchao.optim.AdamW8bit):
    """torchao's, which keeps small tensors in float32. Its learning rates are tensors."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step; on a CPU without the compiler that torchao's own step would start."""
        on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
        with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
            return super().step(closure)

    def in_own_form(self, parameter: nn.Parameter, key: str, moment: Tensor) -> Tensor:
        """The moment `key` (exp_avg or exp_avg_sq) as this optimizer keeps it, exactly where it is in that form."""
        own = self._new_buffer(parameter, signed=_is_signed(key))
        own.copy_(moment)
        return own


def join(key: str, codes: Tensor, scale: Tensor) -> OptimState8bit:
    """The moment `key` that has these codes, uint8 in the parameter's shape, and scales (blocks,) float32."""
    block_size = codes.numel() // scale.numel()
    moment = OptimState8bit.zeros(codes.shape, _is_signed(key), block_size, codes.device, torch.float32)
    moment.codes.copy_(codes)
    moment.scale.copy_(scale)
    return moment


def _is_signed(key: str) -> bool:
    return key == "exp_avg"
