"""`tokenizer.json` of a checkpoint that a stranger may have written: only parts whose time and memory are bounded.

The tokenizers library runs what the file describes on every prompt: a regular expression may take years, and steps that
replace a letter by two, thirty of them, make a gigabyte of it. The released model's file has neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from acestep_ray.errors import InputError
from acestep_ray.foreign_files import explained
from acestep_ray.models.weights import FIX, read_json

_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_MOST_STEPS = 64
_LARGEST_GROWTH = 64
_LONGEST_EXPRESSION = 200
_MOST_ADDED = 10_000
# A group, or a repeat, that is repeated; a reference back; a look around.
_UNBOUNDED = re.compile(r"[)*+}?][*+{]|\\[1-9kg]|\(\?[^:]")
_MOST_REPEATS = 2
_PROBE = "a song, slow: Ein Lied. 歌 🎵"


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`. Raises InputError for one that is missing, damaged or unbounded."""
    if not path.is_file():
        raise InputError("missing file", where=str(path), fix=FIX)
    content = read_json(path)
    if problem := _problem_of(content):
        raise InputError(f"this tokenizer is not used: {problem}", where=str(path), fix=FIX)
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.encode(_PROBE)
    except Exception as error:  # the Rust library raises plain Exception
        reason, fix = explained(path, error, FIX)
        raise InputError(f"cannot read this tokenizer ({reason})", where=str(path), fix=fix) from error
    return tokenizer


def _problem_of(content: dict[str, Any]) -> str | None:
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > _MOST_ADDED:
        return f"more than {_MOST_ADDED:,} added tokens"
    growth, steps = 1.0, 0
    for name in _STEPS:
        for part in _objects(content.get(name)):
            steps += 1
            expression = part.get("Regex")
            if isinstance(expression, str) and not _is_bounded(expression):
                return f"`{name}` has a regular expression that may take without end, `{expression[:60]}`"
            growth *= _growth(part)
    if steps > _MOST_STEPS:
        return f"more than {_MOST_STEPS} steps"
    return (
        f"its steps make texts more than {_LARGEST_GROWTH} times as long"
        if growth > _LARGEST_GROWTH
        else None
    )


def _is_bounded(expression: str) -> bool:
    repeats = len(re.findall(r"(?<!\\)[*+{?]", expression))
    return (
        len(expression) <= _LONGEST_EXPRESSION
        and repeats <= _MOST_REPEATS
        and _UNBOUNDED.search(expression) is None
    )


def _growth(part: dict[str, Any]) -> float:
    """How much longer a step makes a text, at most."""
    if part.get("type") == "Prepend":
        return float(max(1, len(str(part.get("prepend", "")))))
    if part.get("type") != "Replace":
        return 1.0
    pattern, content = part.get("pattern"), str(part.get("content", ""))
    text = pattern.get("String", "") if isinstance(pattern, dict) else ""
    return max(1.0, len(content) / max(1, len(text)))


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in a value, itself included."""
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _objects(item)
    elif isinstance(value, list):
        for item in value:
            yield from _objects(item)
