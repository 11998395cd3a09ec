"""The cleaning steps of each language and their order."""

from __future__ import annotations

import subprocess
import sys

import pytest

from acestep_ray.data.lyrics import clean


@pytest.mark.parametrize(
    ("language", "text", "cleaned"),
    [
        ("en", "Mrs. Jones & Mr. Smith Jr.", "misess jones and mister smith junior"),
        ("en", "DR. Moon at last. The St. Claire", "doctor moon at last. the saint claire"),
        ("de", "Fr. Weber", "frau weber"),
        ("it", "Sig. Rossi", "signore rossi"),
        ("cs", "Ing. Novák a p. Dvořák", "inženýr novák a pan dvořák"),
        ("hu", "Nőv. Kiss", "nővér kiss"),
        ("ru", "Г-жа Вьюга и д-р Снег", "госпожа вьюга и доктор снег"),
        ("ru", "к г-ну Ветру", "к г-ну ветру"),
    ],
)
def test_abbreviations_are_spelled_where_they_stand_as_words(language, text, cleaned):
    assert clean(text, language) == cleaned


@pytest.mark.parametrize(
    ("language", "text", "cleaned"),
    [
        ("en", "100% @ 20°", "one hundred percent at twenty degree"),
        ("es", "tú & yo #1", "tú y yo numeral uno"),
        ("tr", "%50", "yüzde elli"),
        ("ru", "50%", "пятьдесят процентов"),
        ("cs", "50% & $20", "50 procento a dolar 20"),
        ("pl", "£20", "funt dwadzieścia"),
        ("nl", "20 $", "twintig dollar"),
    ],
)
def test_symbols_are_spelled_after_numbers(language, text, cleaned):
    assert clean(text, language) == cleaned


def test_words_of_numbers_keep_their_capitals():
    assert clean("NUR 20€", "de") == "nur zwanzig Euro"


def test_quotation_marks_go_and_whitespace_is_collapsed():
    assert clean('  "Quoted"\t words \u00a0 here ', "en") == "quoted words here"


def test_turkish_capitals_become_one_letter_each():
    assert clean("İstanbul ÖÜ", "tr") == "istanbul öü"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("我的爱", "wo3de5ai4"),
        ("Oh baby 直到天亮", "oh baby zhi2dao4tian1liang4"),
        ("你说，“好”！", "ni3shuo1,,hao3,,"),
        ("风 & 雨…（yeah）", "feng1 , yu3,,yeah,"),
        ("20°", "er4shi2 du4"),
    ],
)
def test_chinese_becomes_pinyin_with_tone_digits_and_commas_for_marks(text, cleaned):
    assert clean(text, "zh") == cleaned


def test_korean_is_romanised_after_its_numbers_and_symbols():
    assert clean('"별" 3번째 & 50% Baby', "ko") == "byeol se beon-jjae geuligo osib peosenteu baby"


def test_japanese_becomes_romaji():
    assert clean("風が歌う", "ja") == "kaze ga utau"


def test_hindi_is_only_lowered():
    assert clean("मैं 25% OK &  तुम", "hi") == "मैं 25% ok & तुम"


def test_importing_the_front_end_loads_no_language_library():
    libraries = ["num2words", "cn2an", "pypinyin", "cutlet", "hangul_romanize", "py3langid"]
    script = f"import sys, acestep_ray.data.lyrics; print([m for m in {libraries} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
