"""The language of a line: by script, by its words, by the song."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from acestep_ray.data.lyrics import LANGUAGES, detect_line_languages, parse_language
from acestep_ray.data.lyrics.segment import LATIN_LANGUAGES, is_structure_line
from acestep_ray.errors import InputError

SONGS = json.loads(Path(__file__).with_name("songs.json").read_text(encoding="utf-8"))


def sung_lines(song: str) -> list[str]:
    return [line for line in song.split("\n") if not is_structure_line(line)]


def share_of_right_lines(transform=str, lines_at_once=None) -> float:
    """Share of the single-language songs' lines that are found, each song cut into pieces of `lines_at_once`."""
    right = total = 0
    for language, songs in SONGS["single"].items():
        for song in songs:
            lines = [transform(line) for line in sung_lines(song)]
            step = lines_at_once or len(lines)
            for start in range(0, len(lines), step):
                right += detect_line_languages(lines[start : start + step]).count(language)
            total += len(lines)
    return right / total


def test_the_songs_cover_every_language_in_latin_letters():
    assert set(SONGS["single"]) == set(LATIN_LANGUAGES)


def test_lines_of_songs_in_one_language_are_found():
    assert share_of_right_lines() >= 0.97


def test_songs_in_capitals_are_found():
    assert share_of_right_lines(str.upper) >= 0.97


def test_four_lines_are_enough_for_a_song():
    assert share_of_right_lines(lines_at_once=4) >= 0.97


@pytest.mark.parametrize(
    "song", SONGS["mixed"], ids=lambda song: "-".join(sorted({lang for _, lang in song}))
)
def test_lines_of_mixed_songs_are_found_one_by_one(song):
    found = detect_line_languages([line for line, _ in song])
    assert list(zip([line for line, _ in song], found, strict=True)) == [tuple(pair) for pair in song]


@pytest.mark.parametrize(
    ("line", "language"),
    [
        ("너를 기다려", "ko"),
        ("ひとりの夜", "ja"),
        ("留下来不要走", "zh"),
        ("硅谷 那个 coder 调试 neural network", "zh"),
        ("Oh baby stay 直到天亮", "zh"),
        ("愛をください baby baby", "ja"),
        ("사랑 愛", "ko"),
        ("Останься со мной", "ru"),
        ("ابق معي", "ar"),
        ("सुबह होने तक", "hi"),
        ("Baby, baby, only you, Наташа", "en"),
    ],
)
def test_a_script_tells_its_language(line, language):
    assert detect_line_languages([line]) == [language]


def test_han_characters_alone_are_chinese_without_kana_in_the_song_and_japanese_with_it():
    assert detect_line_languages(["花火", "永遠"]) == ["zh", "zh"]
    assert detect_line_languages(["花火", "夏の終わりに", "君を待つ", "永遠"]) == ["ja"] * 4


def test_vocables_take_the_language_of_the_song():
    assert detect_line_languages(["Oh oh oh", "La la la", "Na na hey"]) == ["en"] * 3
    song = ["La la la", "Ich kann nicht mehr schlafen", "Oh oh oh", "Der Mond ist nur ein Spiegel", "Hey"]
    assert detect_line_languages(song) == ["de"] * 5


def test_lines_without_letters_take_the_language_before_or_else_after_them():
    song = ["…", "Останься со мной", "123", "", "너를 기다려", "♪"]
    assert detect_line_languages(song) == ["ru", "ru", "ru", "ru", "ko", "ko"]
    assert detect_line_languages(["1, 2, 3"]) == ["en"]


def test_structure_tags_are_english_and_tell_nothing_about_the_song():
    song = ["[куплет]", "Останься со мной", "[drop] бас", "..."]
    assert detect_line_languages(song) == ["en", "ru", "en", "ru"]


def test_a_tag_in_another_language_does_not_colour_the_song():
    assert detect_line_languages(["[Strophe: wir sind wieder da und singen]"] * 3 + ["Hello"]) == ["en"] * 4


def test_a_word_too_short_to_tell_takes_the_language_that_most_lines_have():
    song = [
        ("Je", "fr"),
        ("ne dors plus depuis que tu es partie", "fr"),
        ("La ville est grise sans toi", "fr"),
        ("Baby, I will wait for you tonight", "en"),
        ("Je", "fr"),
    ]
    assert detect_line_languages([line for line, _ in song]) == [language for _, language in song]


def test_words_in_latin_letters_amid_another_script_are_english_unless_they_clearly_are_not():
    korean = ["너를 기다려", "밤하늘의 별처럼"]
    assert detect_line_languages([*korean, "Dynamite"])[2] == "en"
    spanish = ["Quédate conmigo hasta el amanecer", "No me dejes nunca, corazón"]
    assert detect_line_languages([*korean, *spanish])[2:] == ["es", "es"]


def test_no_lines_have_no_languages():
    assert detect_line_languages([]) == []


@pytest.mark.parametrize(
    ("code", "language"),
    [
        ("zh-cn", "zh"),
        ("zh_CN", "zh"),
        ("EN", "en"),
        ("pt-BR", "pt"),
        (" ja ", "ja"),
        ("English", "en"),
        ("yue", "zh"),
    ],
)
def test_language_codes_are_read_in_their_common_spellings(code, language):
    assert parse_language(code) == language


@pytest.mark.parametrize("code", ["sv", "swedish", "z"])
def test_an_unsupported_language_is_an_error_that_lists_the_supported(code):
    with pytest.raises(InputError) as raised:
        parse_language(code)
    assert ", ".join(LANGUAGES) in str(raised.value)
