"""Lyrics: the language of each line, the cleaning, the tokens."""

from acestep_ray.data.lyrics.cleaners import clean
from acestep_ray.data.lyrics.segment import LANGUAGES, detect_line_languages, parse_language
from acestep_ray.data.lyrics.tokenizer import (
    MAX_LYRIC_TOKENS,
    LyricTokenizer,
    LyricTokens,
    build_tiny_vocabulary,
)

__all__ = [
    "LANGUAGES",
    "MAX_LYRIC_TOKENS",
    "LyricTokenizer",
    "LyricTokens",
    "build_tiny_vocabulary",
    "clean",
    "detect_line_languages",
    "parse_language",
]
