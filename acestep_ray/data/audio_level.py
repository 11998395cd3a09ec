"""The scale of float samples: full scale is 1.0, but files hold samples of another scale, and stems that exceed it.

| peak of the file | taken for | samples are |
|---|---|---|
| at most 1.0 | float at its usual scale | unchanged |
| above 1.0, up to 256 (+48 dB), not all whole numbers | a hot stem | divided by the peak |
| whole numbers above 2, or a peak above 256 | integers written as float | divided by 2^15, 2^23 or 2^31 |
| above 2^33 | no sound | refused |

Of the three full scales it is the least of which the peak is at most four times: filters add some to a peak. What is
above 1.0 even then is divided by the rest. The peak is that of the whole file, so that all its windows get one gain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

FLOAT_SUBTYPES = frozenset({"FLOAT", "DOUBLE"})
"""libsndfile's names of samples that may exceed full scale as they are."""

_HOTTEST = 256.0
_FULL_SCALES = (2.0**15, 2.0**23, 2.0**31)
_OVERSHOOT = 4.0
_LEAST_WHOLE = 2.0


@dataclass(frozen=True)
class Level:
    """The loudest sample of a file."""

    peak: float
    """Of the samples that are finite."""
    is_whole: bool
    """Whether all samples are whole numbers."""

    @property
    def full_scale(self) -> float:
        """What the samples are to be divided by; 1.0 leaves them unchanged, infinity is for what is no sound."""
        if self.peak <= 1.0:
            return 1.0
        if self.peak > _FULL_SCALES[-1] * _OVERSHOOT:
            return math.inf
        if not self.is_integer_scale:
            return self.peak
        return max(self.peak, next(scale for scale in _FULL_SCALES if self.peak <= scale * _OVERSHOOT))

    @property
    def is_integer_scale(self) -> bool:
        return self.peak > _HOTTEST or (self.is_whole and self.peak > _LEAST_WHOLE)

    @property
    def warning(self) -> str:
        """What was done; empty for samples that are unchanged."""
        if self.full_scale == 1.0:
            return ""
        if self.is_integer_scale:
            bits = next(i for i in (15, 23, 31) if self.peak <= 2.0**i * _OVERSHOOT)
            return f"its float samples reach {self.peak:,.0f}: taken for {bits + 1}-bit integers and scaled"
        return f"its float samples reach {self.peak:.2f} ({20 * math.log10(self.peak):+.1f} dB): scaled down to 1.0"


def measure(blocks: Iterable[np.ndarray]) -> Level:
    """The level of samples in blocks of any shape."""
    peak, is_whole = 0.0, True
    for block in blocks:
        if not block.size:
            continue
        largest, least = float(block.max()), float(block.min())
        if not (math.isfinite(largest) and math.isfinite(least)):
            finite = block[np.isfinite(block)]
            if not finite.size:
                continue
            largest, least = float(finite.max()), float(finite.min())
            is_whole = False
        peak = max(peak, largest, -least)
        is_whole = is_whole and bool((np.rint(block[..., :4096]) == block[..., :4096]).all())
        if is_whole and peak > 1.0:
            is_whole = bool((np.rint(block) == block).all())
    return Level(peak, is_whole)
