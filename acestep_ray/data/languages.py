"""Names of languages as people write them: codes of any standard, English and native names, words for "unknown"."""

from __future__ import annotations

import re
from functools import cache

from acestep_ray.errors import InputError

# Country codes and slips in wide use for a language. `kr` is also Kanuri's code; `gr` and the others are free.
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
    "zhongwen": "zh",
    "nihongo": "ja",
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
# In tables `nan` and `na` are empty cells, not Min Nan and Nauruan.
_OPEN_WORDS = (
    "|unknown|unk|und|undefined|undetermined|unspecified|not specified|?|??|???|auto|automatic|detect|autodetect"
    "|auto-detect|default|none|null|nil|nan|na|<na>|n/a|-|–|—|mixed|mix|multi|multiple|multilingual|bilingual|mul|mis|zxx"
    "|other|various|any|all|false|no language"
)
_OPEN = frozenset(_OPEN_WORDS.split("|"))
_INSTRUMENTAL_WORDS = (
    "instrumental|[instrumental]|(instrumental)|inst|inst.|[inst]|instr|no lyrics|no vocals|no vocal|without vocals"
    "|纯音乐|純音樂"
)
_INSTRUMENTAL = frozenset(_INSTRUMENTAL_WORDS.split("|"))
# Characters, of a list of languages too.
_LONGEST = 300
_SHOWN = 40
_BETWEEN_LANGUAGES = re.compile(r"\s*(?:[,;/+&|、，]|\band\b|\bund\b|\bet\b)\s*", re.IGNORECASE)
_BEHIND_NAME = re.compile(
    r"(?:\s*[(\[（][^()\[\]（）]*[)\]）]|\s+(?:language|lyrics|vocals?|songs?))\s*$", re.IGNORECASE
)
# Of names: in all languages of the world most short words are the name of one.
_NAMING_LANGUAGES = (
    *("en", "de", "fr", "es", "it", "pt", "pl", "tr", "ru", "cs", "nl", "ar", "zh", "ja", "hu", "ko", "hi"),
    *("uk", "sv", "da", "nb", "no", "fi", "el", "he", "th", "vi", "id", "ro"),
)
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
    if len(text) > _LONGEST:
        raise InputError(
            "a language's name is longer than any", where=f"{text[:_SHOWN]!r}…", fix="give a code, such as en"
        )
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

    plain = _BEHIND_NAME.sub("", plain)
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
        found = langcodes.find(plain)
    except LookupError:
        return None
    return found.prefer_macrolanguage().language if _is_named(found.to_tag(), plain) else None


def _is_named(code: str, plain: str) -> bool:
    """Whether a language has this name as a whole; the lookup also takes `cantopop` for Cant."""
    from language_data.names import code_to_names, normalize_name

    names = code_to_names(code)
    own = (code, code.partition("-")[0])
    return any(
        normalize_name(name) == normalize_name(plain)
        for language, name in names.items()
        if language.partition("-")[0] in (*own, *_NAMING_LANGUAGES)
    )
