"""Names of languages as people write them: codes of any standard, English and native names, words for "unknown"."""

from __future__ import annotations

import re
from functools import cache

from acestep_ray.errors import InputError

# Country codes and slips that are in wide use for a language. `kr` is also Kanuri's code, `gr` and the others nobody's.
_USUAL = {
    "jp": "ja",
    "kr": "ko",
    "cn": "zh",
    "tw": "zh",
    "hk": "zh",
    "ua": "uk",
    "cz": "cs",
    "dk": "da",
    "gr": "el",
    "vn": "vi",
    "gb": "en",
    "us": "en",
    "mx": "es",
    "ir": "fa",
    "brazilian": "pt",
    "mandarin": "zh",
    "putonghua": "zh",
    "普通话": "zh",
    "國語": "zh",
    "国语": "zh",
    "汉语": "zh",
    "漢語": "zh",
    "castilian": "es",
    "castellano": "es",
    "farsi": "fa",
    "tagalog": "tl",
    "filipino": "tl",
    "bokmal": "no",
    "nynorsk": "no",
    "flemish": "nl",
}
_OPEN = frozenset(
    {
        *(
            "",
            "unknown",
            "unk",
            "und",
            "undefined",
            "undetermined",
            "unspecified",
            "not specified",
            "?",
            "??",
            "???",
        ),
        *(
            "auto",
            "automatic",
            "detect",
            "autodetect",
            "auto-detect",
            "default",
            "none",
            "null",
            "nil",
            "nan",
            "na",
        ),
        *(
            "n/a",
            "-",
            "–",
            "—",
            "mixed",
            "mix",
            "multi",
            "multiple",
            "multilingual",
            "bilingual",
            "mul",
            "mis",
            "zxx",
        ),
        *("other", "various", "any", "all", "false", "<na>", "no", "no language"),
    }
) - {"no"}  # Norwegian
_INSTRUMENTAL = frozenset(
    {
        *(
            "instrumental",
            "[instrumental]",
            "(instrumental)",
            "inst",
            "inst.",
            "[inst]",
            "instr",
            "no lyrics",
            "no vocals",
        ),
        *("no vocal", "without vocals", "vocalless", "纯音乐", "純音樂"),
    }
)
_BETWEEN_LANGUAGES = re.compile(r"\s*(?:[,;/+&|、，]|\band\b|\bund\b|\bet\b)\s*", re.IGNORECASE)
_BEHIND_NAME = re.compile(r"\s*[(\[（][^()\[\]（）]*[)\]）]\s*$")
_TAG = re.compile(r"[a-z]{2,3}(?:-[a-z0-9]{1,8})*")
_LISTED = "en, de, fr, es, it, pt, pl, tr, ru, cs, nl, ar, zh, ja, hu, ko, hi, …"


@cache
def language_code(text: str) -> str:
    """The ISO 639 code of a language: two letters where it has such a code, else three; "" where it is unknown.

    Read are codes of ISO 639-1, 639-2 and 639-3 with or without a region or script (`pt-BR`, `zh_Hans`, `deu`, `ger`),
    English and native names in any case (`German`, `Deutsch`), usual slips (`jp`, `kr`, `cn`), and words that name no
    language (`unknown`, `auto`, `mixed`, `n/a`, `nan`, `instrumental`): "". Several languages, `en, es`, are "" too.

    Raises InputError for anything else.
    """
    plain = " ".join(text.strip().strip("\"'").split()).casefold()
    if plain in _OPEN or plain in _INSTRUMENTAL:
        return ""
    # Before the whole: the lookup of names is lenient.
    if len(parts := [part for part in _BETWEEN_LANGUAGES.split(plain) if part]) > 1:
        codes = {"" if part in _OPEN or part in _INSTRUMENTAL else _code_of(part) for part in parts}
        if None not in codes:
            return (codes.pop() or "") if len(codes) == 1 else ""
    code = _code_of(plain)
    if code is None:
        raise InputError(
            f"no language is called {text!r}",
            fix=f"give a code ({_LISTED}) or an English name, or none to have it found line by line",
        )
    return code


def is_instrumental_language(text: str) -> bool:
    """Whether a column `language` says that there is no singing."""
    return " ".join(text.split()).casefold() in _INSTRUMENTAL


def _code_of(plain: str) -> str | None:
    """The code that one name or code in lower case stands for; None for nonsense."""
    import langcodes
    from langcodes.tag_parser import LanguageTagError

    plain = _BEHIND_NAME.sub("", plain).removesuffix(" language").strip()
    if plain in _USUAL:
        return _USUAL[plain]
    tag = plain.replace("_", "-").partition(".")[0]
    if _TAG.fullmatch(tag):
        if (first := tag.partition("-")[0]) in _USUAL:
            return _USUAL[first]
        try:
            language = langcodes.get(tag).prefer_macrolanguage().language
        except LanguageTagError:
            language = None
        # The lookup normalises `eng` and `ger`; only what it then knows is a language.
        if language and langcodes.Language.make(language).is_valid():
            return language
    try:
        return langcodes.find(plain).prefer_macrolanguage().language
    except LookupError:
        return None
