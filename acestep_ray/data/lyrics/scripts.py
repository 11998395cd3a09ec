"""The scripts of lyrics, and which of them ACE-Step v1 has no tokens for."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache

_KNOWN_SCRIPTS = frozenset(
    {"Latin", "Cyrillic", "Arabic", "Devanagari", "Han", "Hiragana", "Katakana", "Hangul"}
)
"""Read by the vocabulary, or romanised before it. Single letters of these may be unknown all the same."""

# First words of Unicode names, where they are no name of a script.
_SCRIPTS = {
    "Cjk": "Han",
    "Ideographic": "Han",
    "Katakana-hiragana": "Katakana",
    "Feminine": "Latin",
    "Masculine": "Latin",
    "Kelvin": "Latin",
    "Angstrom": "Latin",
    "Micro": "Latin",
    "Ohm": "Greek",
    "Mathematical": "mathematical letters",
    "Double-struck": "mathematical letters",
    "Script": "mathematical letters",
    "Black-letter": "mathematical letters",
}
# Marks that are written on letters of any script; their letter is counted.
_ANY_SCRIPT = frozenset({"Combining", "Modifier", "Variation", "Zero"})


@cache
def script_of(character: str) -> str | None:
    """The script of a letter or of a vowel sign, as `Thai`; None for anything else."""
    if unicodedata.category(character)[0] not in "LM":
        return None
    words = unicodedata.name(character, "").capitalize().split()
    if words[:1] in (["Fullwidth"], ["Halfwidth"]):
        words = [words[1].capitalize()]
    if not words or words[0] in _ANY_SCRIPT:
        return None
    return _SCRIPTS.get(words[0], words[0])


def scripts_without_tokens(lyrics: str) -> dict[str, float]:
    """The share of the letters in each script that ACE-Step v1 has no tokens for, the largest first: `{"Thai": 0.92}`.

    Needs no checkpoint. Tags such as `[verse]` are not counted.
    """
    sung = re.sub(r"\[[^\[\]\n]*\]", "", lyrics)
    letters = Counter(script for script in map(script_of, sung) if script is not None)
    total = letters.total()
    return {script: count / total for script, count in letters.most_common() if script not in _KNOWN_SCRIPTS}
