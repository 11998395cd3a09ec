"""Lyrics as the released model's vocabulary expects them: lower case, spelled out, in letters it knows."""

from __future__ import annotations

import re
import string
import unicodedata
from functools import cache
from typing import Any

from acestep_ray.data.lyrics.numbers import spell_chinese_numbers, spell_numbers
from acestep_ray.data.lyrics.tables import tables

_WHITESPACE = re.compile(r"\s+")
# Python lowers İ to two code points; the released model saw these three lowered by hand.
_TURKISH_CAPITALS = str.maketrans("İÖÜ", "iöü")


def clean(text: str, language: str) -> str:
    """Return the cleaned `text` of one line in `language`, one of `LANGUAGES`.

    The steps stand in the released model's order. Quotation marks `"` go, then capitals: words of numbers come
    later and keep theirs ("zwanzig Euro"). Numbers are spelled while their signs are still there ("$20" is "twenty
    dollars"), then abbreviations, then what symbols are left, then whitespace. At last Chinese becomes pinyin and
    Korean Latin letters. Japanese becomes romaji instead of all this; Hindi is only lowered and its spaces joined.
    """
    if language == "ja":
        return _romaji().romaji(text).lower()
    if language == "hi":
        return _WHITESPACE.sub(" ", text.lower())

    text = text.replace('"', "")
    if language == "tr":
        text = text.translate(_TURKISH_CAPITALS)
    text = text.lower()
    text = _spell_chinese(text) if language == "zh" else spell_numbers(text, language)
    for pattern, spoken in _abbreviations(language):
        text = pattern.sub(spoken, text)
    for symbol, spoken in tables()["symbols"][language].items():
        text = text.replace(symbol, spoken)
    text = _WHITESPACE.sub(" ", text).strip()

    if language == "zh":
        return _pinyin(text)
    if language == "ko":
        return _korean_romanizer().translit(text)
    return text


@cache
def _abbreviations(language: str) -> list[tuple[re.Pattern[str], str]]:
    """Patterns and their spoken forms: a short form ends with a dot, unless a hyphen is its mark ("г-н")."""
    return [
        (re.compile(rf"\b{short}" + (r"\b" if "-" in short else r"\."), re.IGNORECASE), spoken)
        for short, spoken in tables()["abbreviations"].get(language, {}).items()
    ]


def _spell_chinese(text: str) -> str:
    """Return `text` with its numbers in characters and a comma for every mark: ASCII, full-width, any of Unicode's.

    The released model saw all Chinese punctuation as commas, so that `&` or a lone `%` never meets the symbols.
    """
    return "".join("," if _is_mark(char) else char for char in spell_chinese_numbers(text))


def _is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] == "P" or unicodedata.normalize("NFKC", char) in string.punctuation


def _pinyin(text: str) -> str:
    from pypinyin import Style, lazy_pinyin

    return "".join(lazy_pinyin(text, style=Style.TONE3, neutral_tone_with_five=True))


@cache
def _romaji() -> Any:
    import cutlet

    return cutlet.Cutlet()


@cache
def _korean_romanizer() -> Any:
    from hangul_romanize import Transliter
    from hangul_romanize.rule import academic

    return Transliter(academic)
