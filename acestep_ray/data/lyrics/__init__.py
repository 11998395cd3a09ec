"""Lyrics: the language of each line, the cleaning, the tokens."""

from acestep_ray.data.lyrics.cleaners import clean
from acestep_ray.data.lyrics.scripts import scripts_without_tokens
from acestep_ray.data.lyrics.segment import LANGUAGES, detect_line_languages, parse_language
from acestep_ray.data.lyrics.tokenizer import (
    MAX_LYRIC_TOKENS,
    LyricTokenizer,
    LyricTokens,
    build_tiny_vocabulary,
)
from acestep_ray.data.lyrics.unknown import (
    MAX_UNKNOWN_SHARE,
    WARNED_UNKNOWN_SHARE,
    describe_unknown,
    is_unusable,
    percent,
)

__all__ = [
    "LANGUAGES",
    "MAX_LYRIC_TOKENS",
    "MAX_UNKNOWN_SHARE",
    "WARNED_UNKNOWN_SHARE",
    "LyricTokenizer",
    "LyricTokens",
    "build_tiny_vocabulary",
    "clean",
    "describe_unknown",
    "detect_line_languages",
    "is_unusable",
    "parse_language",
    "percent",
    "scripts_without_tokens",
]
