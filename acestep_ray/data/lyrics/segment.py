"""The language of every line of a lyric: by its script, its words, and the song around it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from acestep_ray.data.languages import language_code
from acestep_ray.errors import InputError

LANGUAGES = (
    "en",
    "de",
    "fr",
    "es",
    "it",
    "pt",
    "pl",
    "tr",
    "ru",
    "cs",
    "nl",
    "ar",
    "zh",
    "ja",
    "hu",
    "ko",
    "hi",
)
# Languages in the script of another, which its reading serves.
_READ_AS = {"yue": "zh"}
LATIN_LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "pl", "tr", "cs", "nl", "hu")

_STRUCTURE_TAG = re.compile(r"\[.*?\]")
LETTERS = {
    "hangul": re.compile("[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]"),
    # Without the middle dot and the long-vowel mark, which Chinese texts use too.
    "kana": re.compile("[\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff\uff66-\uff6f\uff71-\uff9d]"),
    "han": re.compile("[々\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"),
    "cyrillic": re.compile("[\u0400-\u052f]"),
    "arabic": re.compile("[\u0620-\u064a\u066e-\u06d3\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc]"),
    "devanagari": re.compile("[\u0904-\u0939\u0958-\u0961\u0971-\u097f]"),
    "latin": re.compile("[A-Za-zÀ-ÖØ-öø-ɏḀ-ỿ]"),
}
_LANGUAGE_OF_SCRIPT = {"hangul": "ko", "kana": "ja", "cyrillic": "ru", "arabic": "ar", "devanagari": "hi"}

# Syllables that are sung in every language and tell none ("oh oh", "la la la", "hey yeah").
_VOCABLE = re.compile(
    r"(?:[aeou]+h+|o+|a+|y+e+a+h*|h+e+y+|a+y+|w+h*o+a*h*|[hm]+m+|(?:l|n|d|b|h|t|sh)[aeiou]+h?|d+o+m+|b+a+m+)",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]+")

# Neighbouring n-grams overlap, so naive Bayes is surer than it should be: its log-likelihoods are divided by this.
_TEMPERATURE = 3.0
# A language that fewer lines than this speak for, doubtful ones counted by their probability, is none of the song's.
_SPARSITY = 0.5
# Lines of English that every song is taken to have besides its own …
_ENGLISH_PRIOR = 0.1
# … and a song in another script: there, English is what Latin letters nearly always are.
_ENGLISH_PRIOR_BESIDE_OTHER_SCRIPT = 2.0
_ITERATIONS = 30


def parse_language(text: str) -> str | None:
    """Return the entry of `LANGUAGES` that `text` names, None where it says that the language is unknown.

    Read are the codes and names of `language_code`: "EN", "eng", "English", "zh-cn" and "jp". Raises `InputError` for
    any other language.
    """
    code = language_code(text)
    language = _READ_AS.get(code, code)
    if language and language not in LANGUAGES:
        raise InputError(
            f"lyrics in the language {text!r} are not supported",
            fix=f"use one of {', '.join(LANGUAGES)}, or give no language to have it found line by line",
        )
    return language or None


def is_structure_line(line: str) -> bool:
    """Whether `line` starts with a tag in brackets, such as `[verse]`: the released model reads it as English."""
    return _STRUCTURE_TAG.match(line) is not None


def detect_line_languages(lines: Sequence[str]) -> list[str]:
    """Return the language of each of `lines`, the lines of one song; structure tags are English.

    Scripts decide for Korean, Japanese, Russian, Arabic, Hindi and Chinese; lines of Han characters alone are
    Japanese if they read so in a song that has kana. Lines in Latin letters are a mixture of the song's languages:
    each line's py3langid scores and the languages' shares in the song are fitted together, so that a short line
    follows the song and a clear one stands for itself. A line without letters takes the language before it.
    """
    scripts = [None if is_structure_line(line) else _script(line) for line in lines]
    languages = [None if script is None else _LANGUAGE_OF_SCRIPT.get(script) for script in scripts]

    latin = [index for index, script in enumerate(scripts) if script == "latin"]
    if latin:
        beside_other_script = any(script not in (None, "latin") for script in scripts)
        english = _ENGLISH_PRIOR_BESIDE_OTHER_SCRIPT if beside_other_script else _ENGLISH_PRIOR
        prior = np.array([english if language == "en" else 0.0 for language in LATIN_LANGUAGES])
        likelihoods = np.stack([_log_likelihoods(lines[index], LATIN_LANGUAGES) for index in latin])
        for index, choice in zip(latin, _fit_mixture(likelihoods, prior), strict=True):
            languages[index] = LATIN_LANGUAGES[choice]

    han = [index for index, script in enumerate(scripts) if script == "han"]
    kana = scripts.count("kana")
    if han and kana:
        likelihoods = np.stack([_log_likelihoods(lines[index], ("zh", "ja")) for index in han])
        for index, choice in zip(han, _fit_mixture(likelihoods, np.array([0.0, kana])), strict=True):
            languages[index] = ("zh", "ja")[choice]
    else:
        for index in han:
            languages[index] = "zh"

    return _fill_gaps(languages, lines)


def _script(line: str) -> str | None:
    """Return the script that decides `line`'s language, or None where it has no letters of a known script."""
    counts = {script: len(letters.findall(line)) for script, letters in LETTERS.items()}
    # Only their own language's cleaning reads these scripts: one such letter outweighs any number of Latin ones.
    if counts["hangul"] > counts["kana"]:
        return "hangul"
    for script in ("kana", "han"):
        if counts[script]:
            return script
    # A tie goes to the script that is not Latin, which comes last.
    script = max(("cyrillic", "arabic", "devanagari", "latin"), key=counts.__getitem__)
    return script if counts[script] else None


def _log_likelihoods(line: str, languages: Sequence[str]) -> np.ndarray:
    """Return how well `line` fits each of `languages`: tempered log-likelihoods, all zero for vocables."""
    if all(_VOCABLE.fullmatch(word) for word in _WORD.findall(line)):
        return np.zeros(len(languages))
    ranked = dict(_identifier().rank(line))
    scores = np.array([ranked[language] for language in languages])
    # Text without a known n-gram scores the lowest float everywhere, which would swallow the song's shares.
    return (scores - scores.max()) / _TEMPERATURE


def _fit_mixture(likelihoods: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Return each line's most probable language (lines,) under a sparse mixture fitted to the whole song.

    `likelihoods` (lines, languages) are log-likelihoods, `prior` (languages,) counts lines seen elsewhere.
    Expectation maximisation; subtracting a constant from the counts is the MAP estimate under a Dirichlet prior
    below one, which empties languages that nothing but doubtful lines speaks for.
    """
    languages = likelihoods.shape[1]
    shares = (prior + 1 / languages) / (prior + 1 / languages).sum()
    for _ in range(_ITERATIONS):
        with np.errstate(divide="ignore"):
            joint = likelihoods + np.log(shares)
        posterior = np.exp(joint - joint.max(axis=1, keepdims=True))
        posterior /= posterior.sum(axis=1, keepdims=True)
        counts = np.maximum(posterior.sum(axis=0) + prior - _SPARSITY, 0.0)
        if not counts.any():
            break  # one line that fits many languages: nothing to share with
        shares = counts / counts.sum()
    return posterior.argmax(axis=1)


def _fill_gaps(languages: list[str | None], lines: Sequence[str]) -> list[str]:
    """Structure tags are English; other lines without a language take the one before, or the first after."""
    current = next((language for language in languages if language is not None), "en")
    filled = []
    for language, line in zip(languages, lines, strict=True):
        if is_structure_line(line):
            filled.append("en")
            continue
        current = language or current
        filled.append(current)
    return filled


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages([*LATIN_LANGUAGES, "zh", "ja"])
    return identifier
