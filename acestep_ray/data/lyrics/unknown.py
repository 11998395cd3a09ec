"""Lyrics that the vocabulary has no tokens for, in words."""

from __future__ import annotations

from acestep_ray.data.lyrics.scripts import scripts_without_tokens
from acestep_ray.data.lyrics.tokenizer import LyricTokens

WARNED_UNKNOWN_SHARE = 0.03
"""Lyrics with more unknown tokens than this get a warning: texts in the 17 languages have less than 1 per cent."""
MAX_UNKNOWN_SHARE = 0.5
"""Lyrics with more unknown tokens than this leave nothing useful."""


def is_unusable(tokens: LyricTokens) -> bool:
    """Whether most of the lyrics' tokens are unknown."""
    return tokens.unknown_share > MAX_UNKNOWN_SHARE


def describe_unknown(lyrics: str, tokens: LyricTokens, language: str | None = None) -> str:
    """How many tokens of `lyrics` are unknown, with the scripts: `92 % of the lyrics' tokens are unknown (Thai)`.

    Of lyrics in scripts that the model knows, the `language` they were given is named: Chinese is unknown as English.
    """
    reason = ", ".join(scripts_without_tokens(lyrics)) or (f"read as {language!r}" if language else "")
    return f"{percent(tokens.unknown_share)} of the lyrics' tokens are unknown to the model" + (
        f" ({reason})" if reason else ""
    )


def percent(share: float) -> str:
    """A share as whole per cent, and never 0 % or 100 % of what is only nearly so."""
    whole = round(100 * share)
    if 0 < share < 1:
        whole = min(max(whole, 1), 99)
    return f"{whole} %"
