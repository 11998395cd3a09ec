"""Lyrics as people have them become plain lines; lyrics that need no reading stay as they are."""

from __future__ import annotations

import random
import unicodedata

import pytest

from acestep_ray.data.lyric_text import LyricNotes, is_instrumental_tag, read_lyric_text, says_instrumental

ORDINARY = [
    "",
    '[verse]\nThe night is long (so long)\n\n[Chorus 2]\nLa la & la <3, R&B; "rock" — it’s 5:15',
    "[verse: soft piano]\nAC/DC\n[Verse 1: Anna & Bo]\nNa-na: [oh]\nChorus line, I walk\nBridge over the water",
    "[intro]\n\n我和你在街头走一走！「爱」\n愛ＬＯＶＥしてる〜\n사랑해 ㅋㅋ\nक़सम हूँ\nمی‌خواهم",
    "Noël à l’été\r\nça va\xa0?\r\n",
    "Tom (x2)\n(oh yeah)\n(break)\nSolo: a man",
    "【周杰伦】\n说好的幸福呢",
    "inst\u0259ad of you\nno lyrics for this song\nInstrumental moods",
]


@pytest.mark.parametrize("lyrics", ORDINARY)
def test_ordinary_lyrics_are_unchanged_byte_for_byte(lyrics):
    assert read_lyric_text(lyrics) == (lyrics, [])


LRC = """[ti:Song]
[ar:Somebody]
[al:Album] 
[by: me]
[offset:+500]
[length: 03:12]
[re:Editor]
[ve:1.0]
[#:note]
[00:01.00]作词 : 林夕
[00:02.00]Composed by: Somebody

[verse]
[00:10.00]First line
[00:12.50]Second line [12:34]
[00:14.00]
[chorus]
[00:20.00][01:00.00]Shine
[00:25.00][01:05.00]on me
[00:40.00]Last <00:40.10> words <00:41.00> here
"""


def test_an_lrc_file_becomes_its_lines_in_the_order_of_its_times_without_metadata():
    text, notes = read_lyric_text(LRC)
    assert text == (
        "[verse]\nFirst line\nSecond line [12:34]\n\n[chorus]\nShine\non me\nLast words here\n[chorus]\nShine\non me"
    )
    assert {str(note) for note in notes} == {
        "times within 1 line removed",
        "9 lines of LRC metadata removed",
        "times of 8 lines removed",
        "2 lines of credits removed",
        "2 lines with several times repeated at each",
    }


TIMED = {
    "[00:12.34]我和你在街头走一走": "我和你在街头走一走",
    "[00:12]one\n[00:15]two": "one\ntwo",
    "[01:02:10]one\n[01:05:20]two": "one\ntwo",
    "[0:01:02.10]later\n[0:01:01.10]sooner": "sooner\nlater",
    "[00:12.340]one\n[00:10.340]zero\n[00:15,340]two": "zero\none\ntwo",
    "［00：12.34］one\n［00：13.34］two": "one\ntwo",
    "[00:12.34] [verse]\n[00:13.00]one": "[verse]\none",
    "[00:01.0]<00:01.0>a <00:01.5>b\r\n[00:02.0]<00:02.0>c\r\n": "a b\nc",
    "[00:01.00]one\nhalf of it\n[00:03.00]two": "one\nhalf of it\ntwo",
    "[00:01.00]one[00:02.00] two[00:03.00]": "one two",
    "[171960,5040]<0,240,0>wo<240,300,0>rd\n[177000,10](177000,10,0)two": "word\ntwo",
    "0:01 first line\n0:05 second\n0:09 third": "first line\nsecond\nthird",
    "(0:01) first line\n(0:05) second\n(0:09) third": "first line\nsecond\nthird",
    "0:01\nfirst line\n0:05\nsecond\n0:09\nthird": "first line\nsecond\nthird",
    "some line\n[00:12.34]one line\nmore\nand more": "some line\none line\nmore\nand more",
    "[00:00.00]纯音乐，请欣赏": "",
    "1\n00:00:12,340 --> 00:00:15,000\n<i>Hello</i>\nthere\n\n2\n00:00:16,340 --> 00:00:18,000\n♪ you ♪\n": (
        "Hello\nthere\nyou"
    ),
    "2\n00:00:16,340 --> 00:00:18,000\nyou\n1\n00:00:12,340 --> 00:00:15,000\nHello\n": "Hello\nyou",
    "WEBVTT\nKind: captions\n\nNOTE x\n\nid1\n00:12.340 --> 00:15.000 align:start\n<v Bob>Hello "
    "<00:13.000><c.x>big</c> world\n\n00:16.340 --> 00:18.000\n99 balloons": "Hello big world\n99 balloons",
    "0:00:01.000,0:00:03.000\none\n\n0:00:03.000,0:00:05.000\ntwo": "one\ntwo",
}


@pytest.mark.parametrize("timed", TIMED)
def test_times_of_any_usual_form_are_removed(timed):
    text, notes = read_lyric_text(timed)
    assert text == TIMED[timed]
    assert notes


@pytest.mark.parametrize(
    ("lyrics", "told"),
    [
        ("I woke at\n[12:34] on the clock\nand slept", "times at the start of 1 line kept"),
        ("[12:34] on the clock", "times at the start of 1 line kept"),
        ("At 5:15 I rise\n6:30 in the morning\nand 7:10\nI am awake\nfor you\nfor me", None),
    ],
)
def test_a_time_in_a_sung_line_is_kept(lyrics, told):
    text, notes = read_lyric_text(lyrics)
    assert text == lyrics
    assert [str(note).partition(",")[0] for note in notes] == ([] if told is None else [told])


def test_a_translation_at_the_same_time_is_noted():
    text, notes = read_lyric_text("[00:10.00]こんにちは\n[00:10.00]Hello\n[00:12.00]さよなら\n[00:12.00]Bye")
    assert text.count("\n") == 3
    assert "same time as the line before in 2 lines" in str(notes[-1])


TYPED = {
    r"[verse]\nThe night is long\n[chorus]\nShine on me": "[verse]\nThe night is long\n[chorus]\nShine on me",
    r"one\r\ntwo": "one\ntwo",
    r"one\\ntwo": "one\ntwo",
    r"one \n\n two\tthree\n": "one\n\ntwo three",
    "[verse]\\none\ntwo\\n\nthree": "[verse]\none\ntwo\nthree",
    r"don\'t \"go\" \u2019cause": 'don\'t "go" ’cause',
    "one<br>\ntwo<br/>three &amp;#39;x&quot; R&amp;B": "one\ntwo\nthree 'x\" R&B",
    "<p>one</p><p><i>two</i></p>": "one\ntwo",
    "one\u2028two\rthree": "one\ntwo\nthree",
    "a\u200bb\ufeff c\u00ad": "ab c",
    unicodedata.normalize("NFD", "Noël à l’été 사랑 ガ"): "Noël à l’été 사랑 ガ",
    "𝓘 𝓵𝓸𝓿𝓮 ＹＯＵ": "I love YOU",
}


@pytest.mark.parametrize("typed", TYPED)
def test_what_a_shell_a_table_or_a_web_page_left_is_read(typed):
    text, notes = read_lyric_text(typed)
    assert text == TYPED[typed]
    assert notes


def test_a_typed_line_end_amid_real_ones_is_kept_and_noted():
    text, notes = read_lyric_text("one\ntwo\\nthree")
    assert text == "one\ntwo\\nthree"
    assert [str(note) for note in notes] == [
        r"1 typed \n kept, since the lyrics also have line ends: write line ends"
    ]


HEADINGS = {
    "【verse】\none": "[verse]\none",
    "［Verse 2］\none": "[Verse 2]\none",
    "【副歌】\n爱": "[副歌]\n爱",
    "(Chorus)\none\n（Verse 1）\ntwo": "[Chorus]\none\n[Verse 1]\ntwo",
    "Verse 1:\none\nPre-Chorus:\ntwo\nVerse 2\nthree": "[Verse 1]\none\n[Pre-Chorus]\ntwo\n[Verse 2]\nthree",
    "**Bridge**\none\n**[Outro]**\n## Chorus\ntwo": "[Bridge]\none\n[Outro]\n[Chorus]\ntwo",
}


@pytest.mark.parametrize("lyrics", HEADINGS)
def test_headings_with_a_mark_become_tags(lyrics):
    assert read_lyric_text(lyrics)[0] == HEADINGS[lyrics]


def test_a_heading_without_a_mark_is_kept_and_noted():
    text, (note,) = read_lyric_text("la la\n\nChorus\nshine")
    assert text == "la la\n\nChorus\nshine"
    assert str(note).startswith("headings without a mark, such as Chorus, on 1 line kept")


NOTHING_SUNG = [
    *(
        "instrumental",
        "Instrumental.",
        "(no lyrics)",
        "♪",
        "♪ ♫ ♪",
        "纯音乐，请欣赏",
        "[no lyrics]",
        "inst",
        "インスト",
    ),
    *("This song is an instrumental", "sans paroles"),
]


@pytest.mark.parametrize("lyrics", NOTHING_SUNG)
def test_lyrics_that_say_that_nothing_is_sung_are_none(lyrics):
    assert says_instrumental(lyrics)
    text, (note,) = read_lyric_text(lyrics)
    assert text == ""
    assert "no lyrics" in str(note)


@pytest.mark.parametrize("lyrics", ["[inst]", "[Instrumental]", " [instrumental]\n"])
def test_the_models_own_tag_for_instrumental_music_is_kept(lyrics):
    assert read_lyric_text(lyrics) == (lyrics, [])
    assert is_instrumental_tag(lyrics)
    assert says_instrumental(lyrics)


@pytest.mark.parametrize("lyrics", ["♪ la ♪", "[instrumental]\nla", "No lyrics can say it", "instant"])
def test_lyrics_that_merely_speak_of_it_are_lyrics(lyrics):
    assert not says_instrumental(lyrics)


@pytest.mark.parametrize("lyrics", [LRC, *TIMED, *TYPED, *HEADINGS, *NOTHING_SUNG])
def test_lyrics_that_were_read_stay_the_same(lyrics):
    once, _ = read_lyric_text(lyrics)
    assert read_lyric_text(once)[0] == once


def test_notes_of_many_songs_are_a_line_for_each_kind():
    notes = LyricNotes()
    for key in "abcde":
        notes.add(key, read_lyric_text("[00:12.34]one\n[00:13.34]two")[1])
    notes.add("f", read_lyric_text(r"one\ntwo")[1])
    assert notes.warnings() == [
        "lyrics of 5 songs (a, b, c, …): times of 10 lines removed",
        r"lyrics of 1 song (f): 1 typed \n read as line ends",
    ]


def test_any_mixture_stays_the_same_once_it_was_read():
    parts = ["[00:12.34]", "[00:12]", "<00:12.34>", "word ", "\\n", "\\t", "<br>", "&amp;", "0:01 "]
    parts += ["Verse 1:", "(Chorus)", "【verse】", "[verse]"]
    parts += [
        "\n",
        "\r\n",
        "1\n00:00:01,000 --> 00:00:02,000\n",
        "♪",
        "[ti:x]",
        "作词: a",
        "[12,34]",
        "e\u0301",
        "no lyrics",
    ]
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices(parts, k=draw.randint(1, 12)))
        once, _ = read_lyric_text(text)
        assert read_lyric_text(once)[0] == once, text


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "hostile",
    [
        "\\" * 50_000,
        r"\n" * 50_000 + "x",
        "♪ " * 30_000 + "x",
        "\\" + " " * 100_000 + "x",
        "[00:01.00]" * 20_000,
        "<" + "\t" * 100_000,
    ],
    ids=["backslashes", "line ends", "signs", "spaces", "times", "tabs"],
)
def test_a_hostile_text_takes_no_minutes(hostile):
    read_lyric_text(hostile)
