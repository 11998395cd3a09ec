"""Numbers as the words a singer would sing: amounts, decimals, ordinals, integers.

The readings are num2words' and, for Chinese, cn2an's; which number is read in which way follows the released model.
"""

from __future__ import annotations

import re
from functools import cache, partial

from acestep_ray.data.lyrics.tables import tables

# Digit groups of three. The mark is a comma in English and Russian and a dot in every other language.
_GROUPED_BY_COMMAS = re.compile(r"\b\d{1,3}(?:,\d{3})*(?:\.\d+)?\b")
_GROUPED_BY_DOTS = re.compile(r"\b\d{1,3}(?:\.\d{3})*(?:,\d+)?\b")
_COMMA_GROUPING_LANGUAGES = frozenset({"en", "ru"})

# The look-behinds change no match: they keep a long number from being tried anew at each of its digits.
_AMOUNT = r"[0-9.,]*[0-9]"
# In the order in which they are read: the first currency that fails leaves those after it as signs.
_CURRENCIES = tuple(
    (code, re.compile(rf"{sign}{_AMOUNT}|(?<![0-9.,]){_AMOUNT}{sign}"))
    for code, sign in (("GBP", "£"), ("USD", r"\$"), ("EUR", "€"))
)
_DECIMAL = re.compile(r"(?<![0-9])[0-9]+[.,][0-9]+")
_INTEGER = re.compile(r"[0-9]+")
_DIGIT = re.compile(r"\d")
_TOO_LONG_IN_CHINESE = re.compile(r"((?<![\d.])\d{17,})")

# The released model saw Czech numbers as digits, whether or not num2words knows Czech.
_LANGUAGES_WITH_DIGITS = frozenset({"cs"})


def spell_numbers(text: str, language: str) -> str:
    """Return lower-case `text` with its numbers in words of `language` (any but zh, ja and hi).

    Steps, in the released model's order: marks between thousands go; amounts of £, $ and €; decimals (not in
    Turkish); ordinals; integers. What num2words cannot read stays as it is written: a currency leaves its amount
    to the later steps, any other number leaves the whole text untouched.
    """
    if language in _LANGUAGES_WITH_DIGITS or not _DIGIT.search(text):
        return text
    try:
        return _spell(text, language)
    except Exception:  # num2words has no error class of its own: OverflowError, KeyError, TypeError …
        return text


def _spell(text: str, language: str) -> str:
    from num2words import num2words

    if language in _COMMA_GROUPING_LANGUAGES:
        text = _GROUPED_BY_COMMAS.sub(lambda match: match[0].replace(",", ""), text)
    else:
        text = _GROUPED_BY_DOTS.sub(lambda match: match[0].replace(".", ""), text)

    text = _spell_amounts(text, language)
    if language != "tr":
        text = _DECIMAL.sub(lambda match: num2words(float(match[0].replace(",", ".")), lang=language), text)
    text = _ordinal_pattern(language).sub(
        lambda match: num2words(int(match[1]), ordinal=True, lang=language), text
    )
    return _INTEGER.sub(lambda match: num2words(int(match[0]), lang=language), text)


def _spell_amounts(text: str, language: str) -> str:
    from num2words import num2words

    before_subunit: str = tables()["currency_and"][language]

    def spell(match: re.Match[str], currency: str) -> str:
        amount = float(re.sub(r"[^0-9.]", "", match[0].replace(",", ".")))
        words = num2words(amount, to="currency", currency=currency, lang=language)
        # "twenty dollars, zero cents": the cut falls on the last `before_subunit`, wherever that is.
        return words.rpartition(before_subunit)[0] or words if amount.is_integer() else words

    try:
        for currency, pattern in _CURRENCIES:
            text = pattern.sub(partial(spell, currency=currency), text)
    except Exception:  # num2words reads few currencies in Polish, Russian and Korean, and none in Turkish
        return text
    return text


@cache
def _ordinal_pattern(language: str) -> re.Pattern[str]:
    return re.compile("(?<![0-9])" + tables()["ordinals"][language])


def spell_chinese_numbers(text: str) -> str:
    """Return `text` with its numbers in Chinese characters; years are read digit by digit.

    Numbers of more than sixteen digits have no reading in cn2an and stay.
    """
    from cn2an import transform

    parts = _TOO_LONG_IN_CHINESE.split(text)
    parts[::2] = [transform(part, "an2cn") for part in parts[::2]]
    return "".join(parts)
