"""Quantities as people read them."""

from __future__ import annotations


def size_text(num_bytes: float) -> str:
    """Bytes in the largest unit that fits, of powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.4g} TB"
