"""JSON of files that a stranger may have written: whatever is wrong with it is a ValueError."""

from __future__ import annotations

import json
from typing import Any

from acestep_ray.plain_text import decode_text


def load_json(content: str | bytes) -> Any:
    """What `content` says. Raises ValueError, also for endless nesting."""
    try:
        return json.loads(
            content.removeprefix("\ufeff") if isinstance(content, str) else decode_text(content)
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None
