"""How the settings of a job are grouped in its help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field
from typing import Any, ClassVar, Protocol

Groups = Mapping[str, tuple[str, ...]]
"""Names of settings by the title of their group, in the order of the help; every setting is in one of them."""


class Settings(Protocol):
    """The settings of a job: a dataclass, its fields in groups."""

    GROUPS: ClassVar[Groups]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
