"""Regular expressions of a LoRA configuration, matched within bounds of time and memory.

PEFT's documented forms need all of Python's regular expressions, and a short one can take years. A name is compared
directly; anything else is matched by a process that is given a few seconds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

from acestep_ray.errors import InputError
from acestep_ray.plain_patterns import NotPlainError, PlainPattern

SECONDS = 5
"""For all patterns of a field over all modules of the model, which take milliseconds."""
LONGEST = 20_000
"""Characters of a pattern; 535 names joined by `|` have about 16,000."""
_MEMORY = 1 << 30

# What the child runs; it reads and writes JSON and imports nothing of this package.
_MATCH = """
import json, re, resource, sys, warnings
warnings.simplefilter("ignore")
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
method, patterns, names = json.load(sys.stdin)
found = []
for pattern in patterns:
    match = getattr(re.compile(pattern), method)
    matches = [match(name) for name in names]
    found.append([None if one is None else one.groups()[-1:] for one in matches])
json.dump(found, sys.stdout)
"""


def is_pattern(value: object) -> bool:
    """Whether a value is a regular expression of a length that is matched."""
    if not isinstance(value, str) or not value or len(value) > LONGEST:
        return False
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def whole_matches(pattern: str, names: Iterable[str], field: str, where: str) -> set[str]:
    """The names that `pattern` matches whole. Raises InputError for one that takes too long."""
    names = list(names)
    plain = _plain(pattern)
    if plain is not None:
        return {name for name in names if plain.is_whole(name)}
    (found,) = _matches("fullmatch", [pattern], names, field, where)
    return {name for name, match in zip(names, found, strict=True) if match is not None}


def numbers_after(pattern: str, names: Iterable[str], field: str, where: str) -> dict[str, int]:
    """The number that follows a list of layers whose name `pattern` matches, by name; others are left out."""
    names = list(names)
    (found,) = _matches("search", [rf"(?:^|\.)(?:{pattern})\.(\d+)\."], names, field, where)
    return {name: int(match[-1]) for name, match in zip(names, found, strict=True) if match and match[-1]}


def names_by_key(
    patterns: Iterable[str], names: Iterable[str], field: str, where: str
) -> dict[str, set[str]]:
    """For each pattern the names that PEFT's `get_pattern_key` would find for it alone."""
    patterns, names = list(patterns), list(names)
    plain = {pattern: _plain(pattern) for pattern in patterns}
    others = [pattern for pattern in patterns if plain[pattern] is None]
    found = _matches("match", [rf"(.*\.)?({pattern})$" for pattern in others], names, field, where)
    fits: dict[str, set[str]] = {
        pattern: {name for name, match in zip(names, matches, strict=True) if match is not None}
        for pattern, matches in zip(others, found, strict=True)
    }
    fits |= {key: {n for n in names if form.is_end(n)} for key, form in plain.items() if form is not None}
    return {pattern: fits[pattern] for pattern in patterns}


def names_for_peft(fits: Mapping[str, set[str]], values: Mapping[str, int | float]) -> dict[str, int | float]:
    """A `rank_pattern` or `alpha_pattern` of whole names, for PEFT matches it again with `re`; `fits` as above."""
    taken: set[str] = set()
    names = {}
    for key, found in fits.items():
        if new := sorted(found - taken):
            names[f"^(?:{'|'.join(map(re.escape, new))})"] = values[key]
        taken |= found
    return names


def _plain(pattern: str) -> PlainPattern | None:
    try:
        return PlainPattern.parse(pattern)
    except NotPlainError:
        return None


def _matches(
    method: str, patterns: Sequence[str], names: Sequence[str], field: str, where: str
) -> list[list[list[str | None] | None]]:
    """By pattern and name the last group of its match in a list, None for no match."""
    if not patterns:
        return []
    fix = "use names of modules, or an expression without a repeat inside a repeat"
    command = [sys.executable, "-I", "-S", "-c", _MATCH, str(SECONDS), str(_MEMORY)]
    asked = json.dumps([method, patterns, names])
    ended: subprocess.CompletedProcess[str] | None
    try:
        ended = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=3 * SECONDS)
    except subprocess.TimeoutExpired:
        ended = None
    if ended is None or ended.returncode < 0:
        raise InputError(
            f"`{field}` takes longer than {SECONDS} s to match the model's modules", where=where, fix=fix
        )
    if ended.returncode > 0:
        reason = (ended.stderr.strip().splitlines() or ["no reason"])[-1]
        raise InputError(f"`{field}` cannot be matched ({reason})", where=where, fix=fix)
    found: list[list[list[str | None] | None]] = json.loads(ended.stdout)
    return found
