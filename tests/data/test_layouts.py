from __future__ import annotations

import pytest

from acestep_ray.data.layouts import (
    json_fields,
    line_fields,
    looks_like_lyrics,
    markup_fields,
    sample_fields,
    with_custom_tag,
)

MARKUP = """<CAPTION>
slow pop, with piano
</CAPTION>
<LYRICS>
[verse]
I <3 you
</LYRICS>
<BPM>96</BPM>
<KEYSCALE>A minor</KEYSCALE>
<TIMESIGNATURE>4</TIMESIGNATURE>
<DURATION>60</DURATION>
<LANGUAGE>en</LANGUAGE>"""

LINES = """caption: slow pop: with piano
  and strings
genre: pop, ballad
bpm: 96
key: A minor
signature: 4/4
is_instrumental: false
lyrics:
[verse]
Note: this is sung
bpm: and this

[chorus]
la"""


def test_markup_of_ai_toolkit_is_read_element_by_element():
    assert markup_fields(MARKUP) == {
        "caption": "slow pop, with piano",
        "lyrics": "[verse]\nI <3 you",
        "bpm": "96",
        "keyscale": "A minor",
        "timesignature": "4",
        "duration": "60",
        "language": "en",
    }


def test_markup_on_single_lines_and_without_ends_is_read():
    text = "<caption>slow pop</caption>\n<lyrics>\nla la\n<bpm>96"
    assert markup_fields(text) == {"caption": "slow pop", "lyrics": "la la", "bpm": "96"}


@pytest.mark.parametrize("text", ["I <CAPTION> you", "<b>bold</b>", "<BPM>96</BPM>", "[verse]\nla", ""])
def test_other_texts_are_no_markup(text):
    assert markup_fields(text) is None


def test_lines_of_side_step_are_read_and_lyrics_reach_to_the_end():
    assert line_fields(LINES) == {
        "caption": "slow pop: with piano\n  and strings",
        "genre": "pop, ballad",
        "bpm": "96",
        "keyscale": "A minor",
        "signature": "4/4",
        "is_instrumental": "false",
        "lyrics": "[verse]\nNote: this is sung\nbpm: and this\n\n[chorus]\nla",
    }


def test_lyrics_without_their_key_begin_at_a_structure_tag():
    assert line_fields("caption: x\nbpm: 96\n\n[Verse 1]\nla: la\n")["lyrics"] == "[Verse 1]\nla: la"


@pytest.mark.parametrize(
    "text",
    [
        "pop, slow",
        "[verse]\nTell me: why",
        "Title: The Song\nArtist: The Band\n\nThe night is long",
        "She said: goodbye\nbpm: 96",
        "language: of love",
        "",
    ],
)
def test_other_texts_are_no_lines_of_side_step(text):
    assert line_fields(text) is None


@pytest.mark.parametrize(
    ("text", "is_lyrics"),
    [
        ("[verse]\nThe night is long", True),
        ("[Chorus 2: soft]\nla", True),
        ("【verse】\n夜", True),
        ("[00:12.34]我和你\n[00:14.00]走", True),
        ("pop, slow, piano", False),
        ("slow pop", False),
        ("pop, slow, piano\nfemale voice, sad, strings", False),
        ("", False),
        (
            "I was walking down the street tonight\nand you were standing in the neon light\n"
            "we never said a single word, my dear\nbut all of it was written very clear",
            True,
        ),
        ("la la la\nla la", None),
        ("pop\nslow\npiano\nsad\nfemale voice", None),
    ],
)
def test_lyrics_and_tags_are_told_apart_by_how_they_look(text, is_lyrics):
    assert looks_like_lyrics(text) is is_lyrics


def test_a_json_file_is_a_songs_if_it_has_a_songs_fields():
    assert json_fields('{"caption": "x", "key": "Am"}') == {"caption": "x", "keyscale": "Am"}
    assert json_fields('{"name": "package", "version": "1"}') is None
    assert json_fields("[1, 2]") is None


@pytest.mark.parametrize(
    ("position", "caption"), [("prepend", "ohwx, slow"), ("append", "slow, ohwx"), ("replace", "ohwx")]
)
def test_a_trigger_word_stands_where_its_position_says(position, caption):
    assert with_custom_tag("slow", "ohwx", position) == caption
    assert with_custom_tag("slow", "", position) == "slow"


def test_a_sample_is_described_by_its_genre_where_it_says_so():
    sample = {"caption": "slow", "genre": "pop, sad", "prompt_override": "genre"}
    assert sample_fields(sample, {}, uses_genre=False)["caption"] == "pop, sad"
    assert sample_fields({**sample, "prompt_override": "caption"}, {}, uses_genre=True)["caption"] == "slow"
    assert sample_fields({**sample, "prompt_override": None}, {}, uses_genre=True)["caption"] == "pop, sad"
