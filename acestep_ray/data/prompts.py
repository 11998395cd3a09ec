"""The prompts that one song is trained with: its tags in several orders, and its recaptions."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from acestep_ray.data.schema import CAPTION

MAX_CHARACTERS = 256
"""A prompt is cut after this many characters."""

PROMPT_WITHOUT_TAGS = "music"

_COUNTED_TAGS = 200


@dataclass(frozen=True)
class PromptVariant:
    """One prompt of a song. `source` is "tags" or "recaption/NAME"."""

    source: str
    text: str


def prompt_variants(
    tags: Sequence[str], recaption: Mapping[str, str], *, key: str, shuffles: int, seed: int
) -> list[PromptVariant]:
    """`shuffles` different orders of the tags, joined with ", ", then each recaption; all cut at 256 characters.

    `shuffles` is at least 1. Where the tags have fewer orders, each order once; without tags the one prompt
    "music", unless a recaption is the song's caption. A pure function of its arguments; fewer shuffles give the first
    of what more shuffles give.
    """
    texts = dict.fromkeys(", ".join(order)[:MAX_CHARACTERS] for order in _orders(tags, key, shuffles, seed))
    variants = [
        PromptVariant("tags", text or PROMPT_WITHOUT_TAGS)
        for text in texts
        if text or not recaption.get(CAPTION, "").strip()
    ]
    variants += [
        PromptVariant(f"recaption/{name}", recaption[name].strip()[:MAX_CHARACTERS])
        for name in sorted(recaption)
        if recaption[name].strip()
    ]
    return variants


def _number_of_orders(tags: Sequence[str]) -> int:
    """How many different orders there are; of hundreds of tags, a lower bound: the number has thousands of digits."""
    if len(tags) > _COUNTED_TAGS:
        return 1 if len(set(tags)) == 1 else len(tags)
    possible = math.factorial(len(tags))
    for count in Counter(tags).values():
        possible //= math.factorial(count)
    return possible


def _orders(tags: Sequence[str], key: str, shuffles: int, seed: int) -> list[tuple[str, ...]]:
    tags = [tag.strip() for tag in tags if tag.strip()]
    possible = _number_of_orders(tags)
    orders: dict[tuple[str, ...], None] = {}
    k = 0
    while len(orders) < min(shuffles, possible):
        orders.setdefault(_shuffled(tags, f"{seed}/{k}/{key}"))
        k += 1
    return list(orders)


def _shuffled(tags: Sequence[str], salt: str) -> tuple[str, ...]:
    # Sorting by hash, so that the order depends on no library's random generator.
    places = sorted(range(len(tags)), key=lambda i: hashlib.sha256(f"{i}/{salt}".encode()).digest())
    return tuple(tags[i] for i in places)
