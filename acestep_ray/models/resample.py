"""torchaudio's resampler as a matrix product, which reads the wave where it lies and keeps float32 on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.transforms import Resample

# Samples that one row of the product begins with: enough to fill a matrix unit, few of them met by zeros.
_ROW = 128


class Resampler(nn.Module):
    """The numbers of `torchaudio.transforms.Resample(source_rate, target_rate)`, rounding aside; rates must differ."""

    weight: Tensor
    """(step + 2 · reach, outputs)."""

    def __init__(self, source_rate: int, target_rate: int):
        super().__init__()
        reference = Resample(source_rate, target_rate)
        self.source = source_rate // reference.gcd
        self.target = target_rate // reference.gcd
        self.reach = reference.width
        periods = max(1, _ROW // self.source)
        self.step = periods * self.source
        self.outputs = periods * self.target
        # Output j of a row reads the taps of phase j mod target, moved by its period's samples.
        taps = reference.kernel[:, 0]  # (target, 2 · reach + source)
        weight = taps.new_zeros(periods, self.target, self.step + 2 * self.reach)
        for period in range(periods):
            start = period * self.source
            weight[period, :, start : start + taps.shape[1]] = taps
        self.register_buffer("weight", weight.flatten(0, 1).T.contiguous(), persistent=False)

    def length(self, samples: int) -> int:
        """Samples after resampling."""
        # torchaudio rounds this quotient to float32 before it takes the ceiling.
        return int(torch.ceil(torch.as_tensor(self.target * samples / self.source)))

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        """Waves (..., n) → (..., length(n))."""
        samples = waves.shape[-1]
        length = self.length(samples)
        rows = -(-length // self.outputs)
        # A row goes on `2 · reach` samples into the rows after it.
        tail = -(-2 * self.reach // self.step)
        padding = (rows + tail) * self.step - self.reach - samples
        padded = F.pad(waves.flatten(0, -2), (self.reach, padding)).unflatten(-1, (-1, self.step))
        result = torch.matmul(padded[:, :rows], self.weight[: self.step])
        for row in range(1, tail + 1):
            taps = self.weight[row * self.step : (row + 1) * self.step]
            following = padded[:, row : row + rows, : len(taps)]
            result.baddbmm_(following, taps.expand(len(following), -1, -1))
        return result.flatten(1)[:, :length].unflatten(0, waves.shape[:-1])
