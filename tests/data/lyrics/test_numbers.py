"""Which numbers are spelled, in which way, and what happens where num2words cannot."""

from __future__ import annotations

import warnings

import pytest

from acestep_ray.data.lyrics.numbers import spell_chinese_numbers, spell_numbers


@pytest.mark.parametrize(
    ("language", "text", "spoken"),
    [
        ("en", "1,234 stars", "one thousand, two hundred and thirty-four stars"),
        ("en", "1,000,000 and 2", "one million and two"),
        ("ru", "1,000 звёзд", "одна тысяча звёзд"),
        ("de", "1.000 sterne", "eintausend sterne"),
        ("fr", "1.234.567", "un million deux cent trente-quatre mille cinq cent soixante-sept"),
        ("es", "1,5 litros", "uno punto cinco litros"),
    ],
)
def test_marks_between_thousands_are_not_read(language, text, spoken):
    assert spell_numbers(text, language) == spoken


@pytest.mark.parametrize(
    ("language", "text", "spoken"),
    [
        ("en", "$20 or 20$", "twenty dollars or twenty dollars"),
        ("en", "£1.50", "one pound sterling, fifty pence"),
        ("en", "$1,234.50", "one thousand, two hundred and thirty-four dollars, fifty cents"),
        ("en", "$1,200", "one thousand, two hundred dollars"),
        ("de", "€3 und 3€", "drei Euro und drei Euro"),
        ("de", "1.234,50€", "eintausendzweihundertvierunddreißig Euro und fünfzig Cent"),
        ("fr", "20,00€", "vingt euros"),
        ("it", "20,15€", "venti euro e quindici centesimi"),
        ("pl", "20,50€", "dwadzieścia euro, pięćdziesiąt centów"),
        ("ko", "$20", "이십달러 영센트"),
    ],
)
def test_amounts_of_money_are_read_with_their_currency(language, text, spoken):
    assert spell_numbers(text, language) == spoken


def test_a_whole_amount_is_cut_at_the_last_word_that_can_precede_cents():
    # "vinte e um euros" has no cents to cut off: the released model lost its last words all the same.
    assert spell_numbers("21€", "pt") == "vinte"
    assert spell_numbers("20€", "pt") == "vinte euros"


@pytest.mark.parametrize(
    ("language", "text", "spoken"),
    [
        ("en", "3.14", "three point one four"),
        ("en", "3,5", "three point five"),
        ("fr", "3,14", "trois virgule un quatre"),
        ("nl", "2,5", "twee komma vijf"),
        ("ru", "3,14", "три целых четырнадцать сотых"),
        ("tr", "3,5", "üç,beş"),
    ],
)
def test_decimals_are_read_as_one_number_except_in_turkish(language, text, spoken):
    assert spell_numbers(text, language) == spoken


@pytest.mark.parametrize(
    ("language", "text", "spoken"),
    [
        ("en", "the 22nd", "the twenty-second"),
        ("de", "am 3. mai", "am dritte mai"),
        ("de", "version 3.x", "version drei.x"),
        ("fr", "la 1re et la 2ème", "la premier et la deuxième"),
        ("es", "3er", "tercero"),
        ("it", "4°", "quarto"),
        ("pt", "5ª", "quinto"),
        ("pl", "5º", "piąty"),
        ("ru", "5-й", "пятый"),
        ("nl", "8ste", "achtste"),
        ("tr", "3üncü", "üçüncü"),
        ("hu", "2.", "második"),
        ("ar", "3ث", "ثالث"),
        ("ko", "3번째", "세 번째"),
    ],
)
def test_ordinals_are_read_as_such(language, text, spoken):
    assert spell_numbers(text, language) == spoken


@pytest.mark.parametrize("text", ["1.000 hvězd a 3,5", "20€", "tohle je 1. píseň"])
def test_czech_numbers_stay_digits(text):
    assert spell_numbers(text, "cs") == text


@pytest.mark.parametrize(
    ("language", "text", "spoken"),
    [
        ("tr", "20€", "yirmi€"),
        ("pl", "£20", "£dwadzieścia"),
        ("ko", "€5", "€오"),
    ],
)
def test_a_currency_that_cannot_be_read_leaves_the_number(language, text, spoken):
    assert spell_numbers(text, language) == spoken


def test_a_number_that_cannot_be_read_leaves_the_whole_text():
    text = f"1,000 and 3rd and {10**400}"
    assert spell_numbers(text, "en") == text


def test_chinese_years_are_read_by_digit_and_other_numbers_by_value():
    assert spell_chinese_numbers("2024年27颗50%3.14") == "二零二四年二十七颗百分之五十三点一四"


def test_a_chinese_number_without_a_reading_stays_and_the_others_are_read():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spell_chinese_numbers(f"3{'9' * 39}和27") == f"3{'9' * 39}和二十七"
