"""Languages are known by the codes and names that people give them."""

from __future__ import annotations

import pytest

from acestep_ray.data.languages import is_instrumental_language, language_code
from acestep_ray.errors import InputError

NAMES = {
    "en": "en EN eng English english en-us en_GB.UTF-8 anglais 'English(US)' gb",
    "de": "de deu ger German DEUTSCH",
    "ja": "ja jp jpn Japanese 日本語",
    "ko": "ko kr kor Korean 한국어",
    "zh": "zh cn zh-CN zh_Hans zh-Hans-CN zho chi cmn Chinese Mandarin 中文 tw",
    "pt": "pt pt-BR por Portuguese Português Brazilian",
    "uk": "uk ua Ukrainian",
    "fa": "fa Persian farsi",
    "cs": "cz ces cze Czech",
    "he": "iw he Hebrew",
    "yue": "yue Cantonese",
    "sv": "sv Swedish",
}


@pytest.mark.parametrize("code", NAMES)
def test_codes_and_names_in_any_case(code):
    assert {name: language_code(name) for name in NAMES[code].split()} == dict.fromkeys(
        NAMES[code].split(), code
    )


@pytest.mark.parametrize("name", ["Brazilian Portuguese", "Chinese (Simplified)", "pt  language", "en,en"])
def test_names_of_several_words(name):
    assert language_code(name) in ("pt", "zh", "en")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            " ",
            "unknown",
            "Unknown",
            "und",
            "auto",
            "none",
            "n/a",
            "N/A",
            "nan",
            "NaN",
            "null",
            "mixed",
            "multi",
        ),
        *("en, es", "English/French", "Spanish and English", "instrumental", "-"),
    ],
)
def test_what_names_no_single_language_leaves_it_open(name):
    assert language_code(name) == ""


@pytest.mark.parametrize(
    "name", ["xx", "z", "1", "nonsense", "foo/bar", "lyrics", "male", "cantopop", "deutsch2"]
)
def test_nonsense_is_an_error_that_lists_codes(name):
    with pytest.raises(InputError, match="no language is called") as raised:
        language_code(name)
    assert "en, de, fr" in str(raised.value)


def test_instrumental_is_known_from_unknown():
    assert is_instrumental_language(" Instrumental ")
    assert not is_instrumental_language("unknown")
