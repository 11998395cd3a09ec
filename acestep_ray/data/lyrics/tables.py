"""The spoken forms of `tables.json`, per language."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def tables() -> dict[str, dict[str, Any]]:
    """Return `abbreviations` (short → spoken), `symbols` (sign → spoken), `ordinals` (pattern whose first group is
    the number) and `currency_and` (what num2words puts before cents), each by language code."""
    return json.loads(Path(__file__).with_name("tables.json").read_text(encoding="utf-8"))
