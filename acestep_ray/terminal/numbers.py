"""Numbers as people read them: thousands separated, no exponent where a plain number is as short."""

from __future__ import annotations

import math

# Below it a plain decimal has more zeros than one counts.
_SMALLEST_PLAIN = 1e-6


def number_text(value: float, digits: int = 3) -> str:
    """A number to so many significant digits: `2,610`, `60.4`, `0.000367`, `3.2e-9`.

    A whole number of type int is written in full, `1,234,567`.
    """
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.{digits - 1}e}")
    if rounded == 0:
        return "0"
    if abs(rounded) < _SMALLEST_PLAIN:
        mantissa, _, exponent = f"{rounded:.{digits - 1}e}".partition("e")
        return f"{_without_zeros(mantissa)}e{int(exponent)}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return _without_zeros(f"{rounded:,.{places}f}")


def _without_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
