"""Quantities as people read them."""

from __future__ import annotations

from acestep_ray.terminal.numbers import number_text

_THOUSAND = 999.5
"""From here on three digits are a thousand."""


def size_text(num_bytes: float) -> str:
    """Bytes in the largest unit that fits, of powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < _THOUSAND:
            return f"{number_text(float(num_bytes))} {unit}"
        num_bytes /= 1000
    return f"{number_text(float(num_bytes), 4)} TB"
