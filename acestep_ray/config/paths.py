"""Which settings are paths, and how they are read."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from acestep_ray.names import check_output_place
from acestep_ray.paths import expand_home, expand_home_in_list, expand_home_in_uri

_ENDINGS = ("_path", "_dir")
_OTHERS = frozenset(("songs", "space", "cache", "config"))
OUTPUTS = ("output_dir", "output_path", "exp_dir", "logger_dir", "checkpoints_dir")
"""Settings that say where results go."""
_LISTS = frozenset(("lora_path", "models"))
_URIS = frozenset(("tracking_uri",))


def is_path_setting(name: str) -> bool:
    """Whether the setting of this name is a path or a list of paths; `songs` only where it is text."""
    return name.endswith(_ENDINGS) or name in _OTHERS or name in _LISTS


def expanded_setting(name: str, value: Any) -> Any:
    """The value of a setting with the home folder in place of `~` where the setting is a path; else unchanged."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        return value
    if name in _URIS:
        return expand_home_in_uri(value)
    if name in _LISTS:
        return expand_home_in_list(value)
    return expand_home(value) if is_path_setting(name) else value


class PathSettings:
    """Base of the settings dataclasses: expands `~` in their paths, and checks the paths that are written to."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # its subclasses are dataclasses
            value = expanded_setting(field.name, getattr(self, field.name))
            setattr(self, field.name, value)
            if field.name in OUTPUTS and isinstance(value, str):
                check_output_place(value, f"--{field.name}")
