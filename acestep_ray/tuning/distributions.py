"""Distributions that a trial's settings are drawn from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

_MANY = math.inf


class Distribution(Protocol):
    """What a search needs to know of a dimension."""

    @property
    def size(self) -> float:
        """How many values there are."""

    def at(self, place: float) -> Any:
        """The value at `place`, 0 to below 1, which is uniform where values are drawn."""

    def nearest(self, value: Any) -> Any:
        """`value` where it is among the values, else the one that comes nearest; the first where none is near."""

    def ends(self) -> list[Any]:
        """The values at which to check that all of them are possible."""

    def optuna(self) -> Any:
        """The same for Optuna."""

    def to_optuna(self, value: Any) -> Any:
        """A value as Optuna holds it."""

    def from_optuna(self, value: Any) -> Any:
        """The value that Optuna holds so."""


class _Plain:
    """For distributions whose values are those of Optuna."""

    def to_optuna(self, value: Any) -> Any:
        return value

    def from_optuna(self, value: Any) -> Any:
        return value


@dataclass(frozen=True, init=False)
class Choice(_Plain):
    """One of these values, each as likely; a single one is fixed."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any):
        object.__setattr__(self, "values", tuple(dict.fromkeys(values)))

    @property
    def size(self) -> float:
        return len(self.values)

    def at(self, place: float) -> Any:
        return self.values[int(place * len(self.values))]

    def nearest(self, value: Any) -> Any:
        if value in self.values or isinstance(value, str):
            return value if value in self.values else self.values[0]
        numbers = [one for one in self.values if not isinstance(one, str)]
        return min(numbers, key=lambda one: abs(one - value)) if numbers else self.values[0]

    def ends(self) -> list[Any]:
        numbers = sorted(one for one in self.values if not isinstance(one, str))
        return [*(one for one in self.values if isinstance(one, str)), *numbers]

    def optuna(self) -> Any:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

    def __str__(self) -> str:
        return f"{'fixed' if len(self.values) == 1 else 'choice'}({', '.join(map(_text, self.values))})"


@dataclass(frozen=True)
class Uniform(_Plain):
    """Any number from `low` to `high`."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_order(self.low, self.high)

    size = _MANY

    def at(self, place: float) -> float:
        return self.low + place * (self.high - self.low)

    def nearest(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    def ends(self) -> list[float]:
        return [self.low, self.high]

    def optuna(self) -> Any:
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high)

    def __str__(self) -> str:
        return f"uniform({_text(self.low)}, {_text(self.high)})"


@dataclass(frozen=True)
class LogUniform(_Plain):
    """Any number from `low` to `high`, its logarithm uniform."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_order(self.low, self.high)
        if self.low <= 0:
            raise ValueError("a logarithm needs numbers above 0")

    size = _MANY

    def at(self, place: float) -> float:
        return self.low * (self.high / self.low) ** place

    def nearest(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    def ends(self) -> list[float]:
        return [self.low, self.high]

    def optuna(self) -> Any:
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=True)

    def __str__(self) -> str:
        return f"loguniform({_text(self.low)}, {_text(self.high)})"


@dataclass(frozen=True)
class Log2Int:
    """A power of two from `low` to `high`, each as likely."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _check_order(self.low, self.high)
        for value in (self.low, self.high):
            if value < 1 or value != 1 << (int(value).bit_length() - 1):
                raise ValueError(f"{value} is no power of two")

    @property
    def _exponents(self) -> range:
        return range(self.low.bit_length() - 1, self.high.bit_length())

    @property
    def size(self) -> float:
        return len(self._exponents)

    def at(self, place: float) -> int:
        return 1 << self._exponents[int(place * len(self._exponents))]

    def nearest(self, value: float) -> int:
        return min((1 << e for e in self._exponents), key=lambda one: abs(math.log2(one / value)))

    def ends(self) -> list[int]:
        return [self.low, self.high]

    def optuna(self) -> Any:
        from optuna.distributions import IntDistribution

        return IntDistribution(self._exponents[0], self._exponents[-1])

    def to_optuna(self, value: int) -> int:
        return value.bit_length() - 1

    def from_optuna(self, value: int) -> int:
        return 1 << value

    def __str__(self) -> str:
        return f"log2int({self.low}, {self.high})"


DISTRIBUTIONS: dict[str, Callable[..., Distribution]] = {
    "choice": Choice,
    "fixed": lambda value: Choice(value),
    "uniform": Uniform,
    "loguniform": LogUniform,
    "log2int": Log2Int,
}
"""By the name that a space file gives them."""


def _check_order(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"{_text(low)} is not below {_text(high)}")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.12g}"
