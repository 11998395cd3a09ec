"""Lyrics that a vocabulary has no tokens for are measured; lyrics in the 17 languages have them all."""

from __future__ import annotations

import os

import pytest

from acestep_ray.data.lyrics import (
    WARNED_UNKNOWN_SHARE,
    LyricTokenizer,
    build_tiny_vocabulary,
    describe_unknown,
    is_unusable,
    scripts_without_tokens,
)

TEXTS = {
    "en": "All human beings are born free and equal. I can’t stop — “don’t” you know… (oh-oh) yeah! 24/7, $20 & 50%",
    "de": "Alle Menschen sind frei und gleich an Würde geboren. Süße Straße, „Grüße“ – über",
    "fr": "Tous les êtres humains naissent libres. L’œuvre, le cœur, ça ira où ? « Noël » à l’aïeul",
    "es": "¿Quién eres tú? ¡Corazón, mañana, pingüino! Todos los seres humanos nacen libres",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità. Perché così più può è",
    "pt": "Todos os seres humanos nascem livres. Não há coração, você é minha canção, às três avó",
    "pl": "Wszyscy ludzie rodzą się wolni i równi. Zażółć gęślą jaźń, źdźbło łódź",
    "tr": "Bütün insanlar hür doğarlar. Işık ılık İstanbul ğ ş ç",
    "ru": "Все люди рождаются свободными. Съешь ещё этих мягких французских булок, э ю",
    "cs": "Všichni lidé rodí se svobodní. Příliš žluťoučký kůň úpěl ďábelské ódy, ňť",
    "nl": "Alle mensen worden vrij en gelijk geboren. Één coöperatie, zo’n ’s avonds, ideeën",
    "ar": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق، وقد وُهبوا عقلًا وضميرًا؟ آه يا حبيبي",
    "zh": "人人生而自由，在尊严和权利上一律平等。我和你在街头走一走！「爱」……",
    "ja": "すべての人間は、生まれながらにして自由であり、「夢」を見る。ラララ〜",
    "hu": "Minden emberi lény szabadon születik. Árvíztűrő tükörfúrógép, őű",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 사랑해",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता।",
}
WITHOUT_TOKENS = {
    "Thai": "คืนนี้ฝนตกหนัก",
    "Hebrew": "כל בני האדם נולדו בני חורין",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι",
    "Tamil": "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே",
    "Armenian": "Բոլոր մարդիկ ծնվում են ազատ",
    "Georgian": "ყველა ადამიანი იბადება თავისუფალი",
    "Bengali": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা",
}


@pytest.fixture(scope="module", params=["tiny", "released"])
def tokenizer(request, tmp_path_factory) -> LyricTokenizer:
    if request.param == "released":
        path = os.environ.get("ACESTEP_LYRIC_VOCAB")
        if not path:
            pytest.skip("set ACESTEP_LYRIC_VOCAB to the released lyric vocabulary")
        return LyricTokenizer.from_file(path)
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.json"
    build_tiny_vocabulary(path)
    return LyricTokenizer.from_file(path)


@pytest.mark.parametrize("language", TEXTS)
def test_texts_in_the_languages_of_the_model_have_hardly_an_unknown_token(tokenizer, language):
    assert tokenizer.encode(TEXTS[language]).unknown_share <= 0.01
    assert scripts_without_tokens(TEXTS[language]) == {}


@pytest.mark.parametrize("script", WITHOUT_TOKENS)
def test_other_scripts_are_unusable_and_named(tokenizer, script):
    lyrics = f"[verse]\n[chorus 2]\n{WITHOUT_TOKENS[script]}"
    tokens = tokenizer.encode(lyrics)
    assert tokenizer.may_lack_tokens(lyrics)
    assert tokens.unknown_share > 0.7
    assert is_unusable(tokens)
    assert describe_unknown(lyrics, tokens).endswith(f"unknown to the model ({script})")
    assert scripts_without_tokens(lyrics) == {script: 1.0}


def test_lyrics_in_two_scripts_are_measured_by_their_sung_tokens(tokenizer):
    # A third of the letters, and about half of the tokens.
    lyrics = "[verse]\nI feel alive tonight, tonight\nכל בני האדם\nnever let me go, never let me go"
    tokens = tokenizer.encode(lyrics)
    assert WARNED_UNKNOWN_SHARE < tokens.unknown_share < 0.5
    assert not is_unusable(tokens)
    (share,) = scripts_without_tokens(lyrics).values()
    assert share == pytest.approx(9 / 57)


def test_a_script_is_unknown_to_the_reading_of_another_language(tokenizer):
    lyrics = "我和你在街头走一走"
    tokens = tokenizer.encode(lyrics, "English")
    assert tokenizer.may_lack_tokens(lyrics, "English")
    assert is_unusable(tokens)
    assert describe_unknown(lyrics, tokens, "English").endswith("unknown to the model (read as 'English')")
    assert tokenizer.encode(lyrics, "Chinese").unknown_share == 0.0
    for language in (None, "", "Chinese", "unknown", "yue"):
        assert not tokenizer.may_lack_tokens(lyrics, language)
    assert tokenizer.may_lack_tokens(f"{lyrics}\n사랑해")


def test_a_tag_before_sung_words_does_not_hide_them(tokenizer):
    lyrics = f"[verse] {WITHOUT_TOKENS['Thai']}"
    assert is_unusable(tokenizer.encode(lyrics))
    assert scripts_without_tokens(lyrics) == {"Thai": 1.0}


def test_the_share_of_cached_tokens_is_that_of_their_lyrics(tokenizer):
    lyrics = f"[verse]\nhello there, my friend\n[chorus]\n{WITHOUT_TOKENS['Hebrew']}"
    tokens = tokenizer.encode(lyrics)
    assert tokenizer.unknown_share(tokens.ids) == pytest.approx(tokens.unknown_share)


@pytest.mark.parametrize("lyrics", ["", "[inst]", "[verse]\n[chorus]"])
def test_what_has_no_sung_text_has_no_unknown_tokens(tokenizer, lyrics):
    assert tokenizer.encode(lyrics).unknown_share == 0.0
    assert not tokenizer.may_lack_tokens(lyrics)


def test_lyrics_are_read_before_they_are_encoded(tokenizer):
    plain = tokenizer.encode("[verse]\nThe night is long\n[chorus]\nShine")
    assert tokenizer.encode(r"[verse]\nThe night is long\n[chorus]\nShine") == plain
    assert tokenizer.encode("[verse]\n[00:12.34]The night is long\n[chorus]\n[00:15.00]Shine") == plain


def test_a_language_of_no_lyrics_is_never_refused(tokenizer):
    assert tokenizer.encode("", "sv").is_empty
    assert tokenizer.encode(" \n", "nonsense").is_empty


def test_an_open_language_is_found_line_by_line(tokenizer):
    assert tokenizer.encode("мы идём домой", "unknown").languages == ["ru"]
    assert tokenizer.encode("la la", "German").languages == ["de"]
