"""The search space: which settings of a trial are drawn from which distributions."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import yaml

from acestep_ray.config import TrainConfig
from acestep_ray.errors import InputError
from acestep_ray.plain_files import SETTINGS
from acestep_ray.plain_yaml import load_yaml
from acestep_ray.storage import StoredFile
from acestep_ray.tuning.distributions import DISTRIBUTIONS, Distribution

TARGET_GROUPS = {
    "attention": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    "cross_attention": ("cross_attn.to_q", "cross_attn.to_k", "cross_attn.to_v", "cross_attn.to_out.0"),
    "feed_forward": ("ff.inverted_conv.conv", "ff.point_conv.conv"),
    "lyric_encoder": ("linear_q", "linear_k", "linear_v"),
    "speaker": ("speaker_embedder",),
}
"""The transformer's modules that a LoRA may sit on, as `target_modules` names them."""

ORIGINAL_TARGETS = "attention+cross_attention+lyric_encoder+speaker"
# rsLoRA divides alpha by the root of the rank: with this alpha, rank 16 is as strong as with `2r`.
RSLORA_ALPHA = 8


def _rank(value: Any) -> int:
    number = _number(value)
    if number != int(number) or number < 1:
        raise ValueError
    return int(number)


def _alpha(value: Any) -> str | float:
    if value in ("r", "2r", "rslora"):
        return value
    return _above_zero(value)


def _above_zero(value: Any) -> float:
    number = _number(value)
    if number <= 0:
        raise ValueError
    return number


def _dropout(value: Any) -> float:
    number = _number(value)
    if not 0 <= number < 1:
        raise ValueError
    return number


def _not_negative(value: Any) -> float:
    number = _number(value)
    if number < 0:
        raise ValueError
    return number


def _targets(value: Any) -> str:
    groups = [group.strip() for group in str(value).split("+")]
    if not set(groups) <= TARGET_GROUPS.keys():
        raise ValueError
    return "+".join(group for group in TARGET_GROUPS if group in groups)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


@dataclass(frozen=True)
class Dimension:
    """A setting that can be searched."""

    read: Callable[[Any], Any]
    """A value of it, from YAML or a flag; raises ValueError or TypeError for what is none."""
    rule: str
    """What a value must be."""
    distributions: tuple[str, ...]
    """Names of those that make sense for it."""
    default: str
    is_logarithmic: bool = False
    """Whether pictures show it on a logarithmic axis."""


DIMENSIONS = {
    "rank": Dimension(_rank, "a whole number from 1", ("choice", "log2int"), "log2int(4, 256)", True),
    "alpha": Dimension(_alpha, "r, 2r, rslora or a number above 0", ("choice",), "choice(r, 2r, rslora)"),
    "learning_rate": Dimension(
        _above_zero,
        "a number above 0",
        ("choice", "uniform", "loguniform"),
        "loguniform(1e-5, 1e-3)",
        True,
    ),
    "targets": Dimension(
        _targets,
        f"groups of modules with + between them: {', '.join(TARGET_GROUPS)}",
        ("choice",),
        f"choice({ORIGINAL_TARGETS}, attention+cross_attention, attention+cross_attention+feed_forward, "
        f"{'+'.join(TARGET_GROUPS)})",
    ),
    "dropout": Dimension(
        _dropout, "a probability from 0 to below 1", ("choice", "uniform"), "choice(0, 0.05, 0.1)"
    ),
    "ssl_coeff": Dimension(
        _not_negative, "a number from 0", ("choice", "uniform", "loguniform"), "choice(0, 0.1, 1)"
    ),
}

Params = dict[str, Any]
"""A value of every dimension of a space."""


@dataclass(frozen=True)
class Space:
    """Distributions by dimension; a setting that is no dimension is as the flags and the LoRA configuration say."""

    dimensions: Mapping[str, Distribution]

    def sample(self, *counters: int) -> Params:
        """Values that are a function of these counters alone."""
        uniform = np.random.default_rng(counters).random(len(DIMENSIONS))
        places = dict(zip(DIMENSIONS, uniform.tolist(), strict=True))
        return {name: one.at(places[name]) for name, one in self.dimensions.items()}

    def nearest(self, wanted: Params) -> Params:
        """The values of the space that come nearest to these."""
        return {name: one.nearest(wanted[name]) for name, one in self.dimensions.items()}

    def extremes(self) -> list[Params]:
        """Enough of the space to check all of it: every value of a choice, and both ends of a range."""
        ends = {name: one.ends() for name, one in self.dimensions.items()}
        last = {name: values[-1] for name, values in ends.items()}
        return [{**last, name: value} for name, values in ends.items() for value in values]

    def describe(self) -> dict[str, str]:
        """Every distribution as it is written in a space file."""
        return {name: str(one) for name, one in self.dimensions.items()}

    def render(self) -> str:
        """The space as text, a dimension a line."""
        return "\n".join(f"  {name:<14} {text}" for name, text in self.describe().items())


def read_space(path: str | None, flags: Mapping[str, str | None]) -> Space:
    """The space of a YAML file, or the default one, with the dimensions that flags give in their place.

    Raises InputError for what is no space, or has nothing to search.
    """
    if path is None:
        where, given = "the default space", {name: one.default for name, one in DIMENSIONS.items()}
    else:
        where, given = f"--space {path}", _read_file(path)
    dimensions = {name: read_distribution(name, value, where) for name, value in given.items()}
    for name, value in flags.items():
        if value is not None:
            dimensions[name] = read_distribution(name, value, f"--search_{name}")
    ordered = {name: dimensions[name] for name in DIMENSIONS if name in dimensions}
    if all(one.size == 1 for one in ordered.values()):
        raise InputError(
            "there is nothing to search: every dimension has one value",
            where=where,
            fix="give one of them a choice or a range, such as rank: log2int(4, 64)",
        )
    return Space(ordered)


def _read_file(path: str) -> dict[str, Any]:
    try:
        given = load_yaml(StoredFile.at(path).read_bytes(SETTINGS))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot read the search space ({reason})", where=f"--space {path}") from None
    if not isinstance(given, dict) or not given:
        raise InputError(
            "the search space has no dimensions",
            where=f"--space {path}",
            fix="write one a line, such as learning_rate: loguniform(1e-5, 1e-3)",
        )
    unknown = [name for name in given if name not in DIMENSIONS]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), DIMENSIONS, n=1)
        raise InputError(
            f"unknown dimension `{unknown[0]}`",
            where=f"--space {path}",
            fix=f"did you mean `{near[0]}`?" if near else f"there are {', '.join(DIMENSIONS)}",
        )
    return given


def read_distribution(name: str, given: Any, where: str) -> Distribution:
    """The distribution of a dimension: `loguniform(1e-5, 1e-3)`, a list to choose from, or a fixed value.

    Raises InputError.
    """
    dimension = DIMENSIONS[name]
    kind, arguments = _split(given)
    if kind not in (*dimension.distributions, "fixed"):
        near = ", ".join(f"{one}(…)" for one in (*dimension.distributions, "fixed"))
        raise InputError(f"`{name}` cannot be drawn from `{kind}`", where=where, fix=f"use {near}")
    if not arguments:
        raise InputError(
            f"the dimension `{name}` is empty", where=where, fix=f"such as {name}: {dimension.default}"
        )
    values = []
    for argument in arguments:
        try:
            values.append(dimension.read(argument))
        except (ValueError, TypeError):
            raise InputError(f"`{name}` {argument!r} is not {dimension.rule}", where=where) from None
    try:
        return DISTRIBUTIONS[kind](*values)
    except (ValueError, TypeError) as error:
        counts = "one value" if kind == "fixed" else "a lowest and a highest value"
        reason = str(error) if isinstance(error, ValueError) else f"{kind} takes {counts}"
        raise InputError(f"`{name}` {given!r}: {reason}", where=where) from None


def _split(given: Any) -> tuple[str, list[Any]]:
    """The name of a distribution and its arguments."""
    if given is None:
        return "choice", []
    if isinstance(given, (list, tuple)):
        return "choice", list(given)
    if isinstance(given, str):
        if call := re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", given, re.DOTALL):
            return call[1], [part.strip() for part in call[2].split(",") if part.strip()]
        given = given.strip()
    return "choice", [] if given == "" else [given]


def apply_params(
    params: Params, config: TrainConfig, lora: Mapping[str, Any]
) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings and the LoRA configuration of a trial."""
    changed = {name: params[name] for name in ("learning_rate", "ssl_coeff") if name in params}
    lora = dict(lora)
    if "rank" in params:
        lora["r"] = params["rank"]
    if "alpha" in params:
        lora |= _alpha_fields(params["alpha"], lora["r"])
    if "targets" in params:
        lora["target_modules"] = target_modules(params["targets"].split("+"))
    if "dropout" in params:
        lora["lora_dropout"] = params["dropout"]
    return replace(config, **changed), lora


def target_modules(groups: Iterable[str]) -> list[str]:
    """What `target_modules` says for these groups of modules."""
    return [module for group in groups for module in TARGET_GROUPS[group]]


def _alpha_fields(rule: str | float, rank: int) -> dict[str, Any]:
    if rule == "rslora":
        return {"use_rslora": True, "lora_alpha": RSLORA_ALPHA}
    by_rule = {"r": rank, "2r": 2 * rank}
    return {"use_rslora": False, "lora_alpha": by_rule[rule] if isinstance(rule, str) else rule}


def default_params(config: TrainConfig, lora: Mapping[str, Any]) -> Params:
    """What a run without a search would take: the flags and the LoRA configuration as values of all dimensions."""
    rank, alpha = lora["r"], lora.get("lora_alpha", 8)
    return {
        "rank": rank,
        "alpha": {rank: "r", 2 * rank: "2r"}.get(alpha, alpha) if not lora.get("use_rslora") else "rslora",
        "learning_rate": config.learning_rate,
        "targets": ORIGINAL_TARGETS,
        "dropout": lora.get("lora_dropout", 0.0),
        "ssl_coeff": config.ssl_coeff,
    }
