"""Musical facts of a song as people write them: tempo, key, metre, and whether it is instrumental.

The values are those that ACE-Step 1.5 was trained with: bpm 30 to 300, `C# minor`, a metre of 2, 3, 4 or 6. What cannot
be read raises ValueError with a sentence for the user.
"""

from __future__ import annotations

import math
import re
from typing import Any

BPM_RANGE = (30, 300)
TIME_SIGNATURES = ("2", "3", "4", "6")
"""Beats in a bar; 6 is 6/8."""

EMPTY_VALUES = frozenset(
    {"", "nan", "null", "none", "n/a", "na", "<na>", "nil", "undefined", "unknown", "auto", "-", "?"}
)
"""What programs write for a value that they do not know, in lower case."""

# Characters of a tempo, a key or the like, with room for what people write around them.
_LONGEST = 200
_NUMBER = re.compile(r"\d+(?:[.,]\d+)?")
_MODES = {
    "major": "major",
    "maj": "major",
    "dur": "major",
    "ionian": "major",
    "m": "minor",
    "minor": "minor",
    "min": "minor",
    "mi": "minor",
    "moll": "minor",
    "mol": "minor",
    "aeolian": "minor",
}
# In German, B is B flat, H is B, Es and As are E flat and A flat.
_GERMAN_MODES = ("dur", "moll", "mol")
_ACCIDENTALS = {
    "": "",
    "#": "#",
    "♯": "#",
    "sharp": "#",
    "is": "#",
    "b": "b",
    "♭": "b",
    "flat": "b",
    "es": "b",
    "s": "b",
}
_KEY = re.compile(
    r"([A-H])\s*[-_ ]?(#|♯|b|♭|sharp|flat|(?:is|es|s)(?![a-z]))?[\s:_-]*([A-Za-z]*)", re.IGNORECASE
)
_CAMELOT = re.compile(r"(1[0-2]|[1-9])\s*([AB])", re.IGNORECASE)
# Keys around the circle of fifths, as the Camelot wheel numbers them.
_CAMELOT_MINOR = ("Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E", "B", "F#", "Db")
_CAMELOT_MAJOR = ("B", "F#", "Db", "Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E")
_YES = frozenset({"true", "yes", "y", "1", "t", "on", "instrumental"})
_NO = frozenset({"false", "no", "n", "0", "f", "off", "vocal", "vocals"})


def is_empty_value(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, or a text such as `N/A`."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and value.strip().lower() in EMPTY_VALUES


def _text_of(value: Any, name: str) -> str:
    """A cell as text. Raises ValueError for what is longer than any value of a field."""
    try:
        text = str(value).strip()
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists
        text = ""
    if not text or len(text) > _LONGEST:
        raise ValueError(f"{name} holds more than one value")
    return text


def read_bpm(value: Any) -> int | None:
    """Beats per minute as a whole number: of `96`, `"96.4"`, `"96 bpm"`, `"~96"`; None where there is none."""
    if is_empty_value(value):
        return None
    text = _text_of(value, "bpm")
    number = _NUMBER.search(text) if not isinstance(value, bool) else None
    if number is None or (isinstance(value, str) and len(_NUMBER.findall(text)) > 1):
        raise ValueError(f"bpm {value!r} is not one number")
    beats = float(number[0].replace(",", "."))
    bpm = round(beats) if math.isfinite(beats) else 0
    if not BPM_RANGE[0] <= bpm <= BPM_RANGE[1]:
        raise ValueError(f"bpm {value!r} is not within {BPM_RANGE[0]} to {BPM_RANGE[1]}")
    return bpm


def read_keyscale(value: Any) -> str:
    """A musical key as `A minor` or `F# major`: of `Am`, `a min`, `F♯`, `Bb major`, `A-Moll`, Camelot's `8A`.

    A note alone is its major key. Returns "" where there is none.
    """
    if is_empty_value(value):
        return ""
    text = _text_of(value, "key")
    if camelot := _CAMELOT.fullmatch(text):
        minor = camelot[2].upper() == "A"
        root = (_CAMELOT_MINOR if minor else _CAMELOT_MAJOR)[int(camelot[1]) - 1]
        return f"{root} {'minor' if minor else 'major'}"
    key = _KEY.fullmatch(text)
    mode, written = None, ""
    if key is not None:
        written = key[3]
        # "M" is major and "m" is minor; all other names are read in any case.
        mode = "major" if written in ("", "M") else _MODES.get(written.lower())
    if key is None or mode is None:
        raise ValueError(f"key {value!r} is none: write for example A minor or F# major")
    root, sign = key[1].upper(), _ACCIDENTALS[(key[2] or "").lower()]
    if written.lower() in _GERMAN_MODES and root == "B" and not sign:
        sign = "b"
    return f"{root.replace('H', 'B')}{sign} {mode}"


def read_timesignature(value: Any) -> str:
    """Beats in a bar, one of `TIME_SIGNATURES`: of `4`, `"4/4"`, `"6/8"`, 3.0. Returns "" where there is none."""
    if is_empty_value(value):
        return ""
    text = _text_of(value, "time signature")
    beats = re.fullmatch(r"(\d+)(?:\.0+)?(?:\s*[/:]\s*(\d+))?(?:\s*time)?", text, re.IGNORECASE)
    if isinstance(value, bool) or beats is None or beats[1] not in TIME_SIGNATURES:
        raise ValueError(f"time signature {value!r} is not 2, 3, 4 or 6 beats in a bar")
    return beats[1]


def read_instrumental(value: Any) -> bool | None:
    """Whether a song has no singing; None where that is not said."""
    if isinstance(value, bool):
        return value
    if is_empty_value(value):
        return None
    text = _text_of(value, "instrumental").lower().removesuffix(".0")
    if text in _YES:
        return True
    if text in _NO:
        return False
    raise ValueError(f"instrumental {value!r} is neither yes nor no")
