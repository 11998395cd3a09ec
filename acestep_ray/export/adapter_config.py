"""What a LoRA says of itself beside its matrices: PEFT's configuration, from a stranger, and the strength in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acestep_ray.errors import InputError
from acestep_ray.export.keys import module_name
from acestep_ray.plain_json import load_json
from acestep_ray.plain_patterns import NotPlainError, PlainPattern, first_that_fits

METADATA_KEY = "lora_adapter_metadata"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
MERGE = "only LoRA and DoRA are read: merge it with the program that made it"

# PEFT's ways to begin that take a part out of the base model's weights: such matrices fit no released model.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# A configuration that names each of a model's modules has about 100 KB.
_MOST_BYTES = 16 << 20
MOST_MODULES = 2_000
"""The released model has 535 that can have a LoRA."""
_LARGEST_ALPHA = 1e6
_SHOWN = 60


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of PEFT's `LoraConfig` that decide what matrices mean."""

    path: Path
    """Of the LoRA, for messages."""
    source: str | None = None
    """Where the strength is: `metadata`, `adapter_config.json`; None where nothing says it."""
    alpha: float | None = None
    alphas: tuple[tuple[str, PlainPattern, float], ...] = ()
    """Keys of `alpha_pattern`, what they mean, and the alpha."""
    use_rslora: bool = False
    use_dora: bool = False

    def scale(self, name: str, rank: int, own_alpha: float | None) -> float:
        """What B A of a module is multiplied with; `own_alpha` is that of the module's own tensor."""
        if own_alpha is not None:
            return _checked_alpha(own_alpha, f"{name}.alpha", self.path) / rank
        key = first_that_fits(((key, pattern) for key, pattern, _ in self.alphas), name)
        if key is not None:
            alpha = next(alpha for other, _, alpha in self.alphas if other == key)
        else:
            alpha = rank if self.alpha is None else self.alpha
        return alpha / (rank**0.5 if self.use_rslora else rank)


def read_adapter_config(path: Path, metadata: Mapping[str, str]) -> AdapterConfig:
    """The configuration of the LoRA at `path`, from its metadata or the file beside it. Raises InputError."""
    described: str | bytes | None = metadata.get(METADATA_KEY)
    source = "metadata"
    if path.name == PEFT_FILE:
        source = PEFT_CONFIG
        described = _read_beside(path)
    if described is None:
        return AdapterConfig(path)
    if len(described) > _MOST_BYTES:
        raise InputError(f"the LoRA's metadata has {len(described):,} bytes", where=str(path))
    try:
        config = load_json(described)
    except ValueError as error:
        raise InputError(f"the LoRA's metadata is not JSON ({error})", where=str(path)) from None
    if not isinstance(config, dict):
        raise InputError("the LoRA's metadata is not a JSON object", where=str(path))
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    _check_kind(config, path)
    alpha = config.get("lora_alpha")
    return AdapterConfig(
        path=path,
        source=source if "lora_alpha" in config else None,
        alpha=None if alpha is None else _checked_alpha(alpha, "lora_alpha", path),
        alphas=tuple(_alphas(config.get("alpha_pattern"), path)),
        use_rslora=_flag(config, "use_rslora", path),
        use_dora=_flag(config, "use_dora", path),
    )


def _read_beside(path: Path) -> bytes:
    beside = path.with_name(PEFT_CONFIG)
    try:
        if beside.exists() and not beside.is_file():
            raise OSError("it is no regular file")
        with open(beside, "rb") as file:
            return file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"cannot read the adapter's {PEFT_CONFIG}, which says how strong it is ({error})",
            where=str(path),
        ) from None


def _check_kind(config: Mapping[str, Any], path: Path) -> None:
    kind = str(config.get("peft_type") or "LORA")[:_SHOWN].rpartition(".")[2]
    if kind.upper() != "LORA":
        raise InputError(f"the adapter is of PEFT's type {kind}, not a LoRA", where=str(path), fix=MERGE)
    begun = str(config.get("init_lora_weights"))[:_SHOWN]
    if begun.startswith(_CHANGES_BASE):
        raise InputError(
            f"this LoRA belongs to a model changed by `init_lora_weights: {begun}`, not to the released one",
            where=str(path),
            fix="save it with PEFT's `path_initial_model_for_weight_conversion`",
        )


def _alphas(patterns: object, path: Path) -> list[tuple[str, PlainPattern, float]]:
    if patterns is None:
        return []
    if not isinstance(patterns, dict) or len(patterns) > MOST_MODULES:
        what = f"{len(patterns):,} entries" if isinstance(patterns, dict) else type(patterns).__name__
        raise InputError(
            f"the LoRA's `alpha_pattern` is not an alpha by module: {what}",
            where=str(path),
            fix='it must be a JSON object, such as `{"to_q": 8}`',
        )
    by_name = {
        module_name(name) if len(name) < _MOST_BYTES >> 14 else name: a for name, a in patterns.items()
    }
    alphas = []
    for name, alpha in by_name.items():
        try:
            pattern = PlainPattern.parse(name)
        except NotPlainError as error:
            raise InputError(
                f"the LoRA's `alpha_pattern` has an expression that is not matched, `{name[:_SHOWN]}`: it {error}",
                where=str(path),
                fix="write names of modules or their last parts, such as `attn.to_q`, into its configuration",
            ) from None
        alphas.append((name, pattern, _checked_alpha(alpha, f"alpha_pattern: {name[:_SHOWN]}", path)))
    return alphas


def _checked_alpha(alpha: object, field: str, path: Path) -> float:
    # Compared before it is converted: an integer may have hundreds of digits.
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not is_number or not 0 < alpha <= _LARGEST_ALPHA or not math.isfinite(alpha):  # type: ignore[operator,arg-type]
        shown = (
            str(alpha) if not isinstance(alpha, int) or abs(alpha) < 10**_SHOWN else "a number of many digits"
        )
        raise InputError(
            f"the LoRA's `{field}` is {shown[:_SHOWN]}, not a number above 0 and up to {_LARGEST_ALPHA:,.0f}",
            where=str(path),
        )
    return float(alpha)  # type: ignore[arg-type]


def _flag(config: Mapping[str, Any], field: str, path: Path) -> bool:
    value = config.get(field)
    if value not in (None, False, True):
        raise InputError(f"the LoRA's `{field}` is {str(value)[:_SHOWN]}, not true or false", where=str(path))
    return bool(value)
