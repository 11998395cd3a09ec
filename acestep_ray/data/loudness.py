"""Integrated loudness by ITU-R BS.1770-4, in LUFS."""

from __future__ import annotations

import numpy as np

SAMPLE_RATE = 48_000
"""Hz; the filter's coefficients hold for this rate alone."""

# The two second-order sections of the K-weighting, tables 1 and 2 of the recommendation: b0 b1 b2 a0 a1 a2.
_K_WEIGHTING = (
    (1.53512485958697, -2.69169618940638, 1.19839281085285, 1.0, -1.69065929318241, 0.73248077421585),
    (1.0, -2.0, 1.0, 1.0, -1.99004745483398, 0.99007225036621),
)
_HOP = SAMPLE_RATE // 10  # a gating block is four of these, 400 ms; neighbours overlap by 75 %
_HOPS_PER_BLOCK = 4
_HOPS_AT_ONCE = 100
_ABSOLUTE_GATE = -70.0
_RELATIVE_GATE = -10.0


def integrated_loudness(wave: np.ndarray) -> float | None:
    """Loudness in LUFS of 48 kHz audio (channels, n), one or two channels of weight 1.

    None where nothing can be measured: shorter than 400 ms, or no block of 400 ms louder than -70 LUFS.
    """
    from scipy.signal import sosfilt  # takes a second, and few need it

    sections = np.array(_K_WEIGHTING)
    hops = wave.shape[1] // _HOP
    if hops < _HOPS_PER_BLOCK:
        return None
    power = np.empty(hops)
    state = np.zeros((len(sections), len(wave), 2))
    for first in range(0, hops, _HOPS_AT_ONCE):
        last = min(first + _HOPS_AT_ONCE, hops)
        weighted, state = sosfilt(sections, wave[:, first * _HOP : last * _HOP], zi=state)
        power[first:last] = (weighted.reshape(len(wave), -1, _HOP) ** 2).mean(axis=2).sum(axis=0)
    blocks = np.convolve(power, np.full(_HOPS_PER_BLOCK, 1 / _HOPS_PER_BLOCK), mode="valid")
    loud = blocks[blocks > _power(_ABSOLUTE_GATE)]
    if not len(loud):
        return None
    return _lufs(loud[loud > _power(_lufs(loud.mean()) + _RELATIVE_GATE)].mean())


def _lufs(power: float) -> float:
    return float(-0.691 + 10 * np.log10(power))


def _power(lufs: float) -> float:
    return 10 ** ((lufs + 0.691) / 10)
