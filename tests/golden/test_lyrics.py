"""The lyric front end against the lines that the original cleaned and encoded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import acestep_ray.data.lyrics
from acestep_ray.data.lyrics import LANGUAGES, LyricTokenizer, clean, detect_line_languages


@pytest.fixture(scope="module")
def songs(golden) -> list[dict]:
    return golden.json("lyrics.json")


@pytest.fixture(scope="module")
def lines(songs) -> list[tuple[str, str, str, list[int]]]:
    """Every line with its language, cleaned text and ids; tags in other languages are encoded as English."""
    every = [tuple(line) for song in songs for line in song["lines"]]
    return [line for line in every if line[1] == "en" or not line[0].startswith("[")]


@pytest.fixture(scope="module")
def tokenizer() -> LyricTokenizer:
    path = os.environ.get("ACESTEP_LYRIC_VOCAB")
    if not path:
        pytest.skip(
            "needs the released lyric vocabulary: run `acestep-ray checkpoint fetch DIR`, "
            "or set ACESTEP_LYRIC_VOCAB to its vocab.json"
        )
    return LyricTokenizer.from_file(path)


def test_every_line_is_cleaned_as_in_the_original(lines):
    assert lines
    differing = [
        (language, line, expected, clean(line, language))
        for line, language, expected, _ in lines
        if clean(line, language) != expected
    ]
    assert differing == []


def test_every_line_has_the_ids_of_the_original(lines, tokenizer):
    differing = [
        (language, line) for line, language, _, ids in lines if tokenizer.encode_line(line, language) != ids
    ]
    assert differing == []


def test_whole_lyrics_are_walked_as_in_the_original(songs, tokenizer, monkeypatch):
    for song in songs:
        # The original's languages, its mistakes among them: the walk is compared here, not the detection.
        languages = [language for _, language in song["inference_langs"]]
        monkeypatch.setattr(
            "acestep_ray.data.lyrics.tokenizer.detect_line_languages", lambda lines, given=languages: given
        )
        assert tokenizer.encode(song["lyrics"]).ids == song["inference_token_idx"], song["name"]


def test_a_given_language_encodes_as_a_rightly_detected_one(songs, tokenizer):
    for song in songs:
        if song["name"] in LANGUAGES:
            assert tokenizer.encode(song["lyrics"], song["name"]) == tokenizer.encode(song["lyrics"])


def test_languages_of_single_language_lyrics_are_found(songs):
    right = total = 0
    for song in songs:
        if song["name"] in LANGUAGES:
            sung = [line for line in song["lyrics"].split("\n") if line.strip() and not line.startswith("[")]
            right += detect_line_languages(sung).count(song["name"])
            total += len(sung)
    assert right / total >= 0.97


def test_spoken_forms_are_those_of_the_original(golden):
    ours = json.loads(
        Path(acestep_ray.data.lyrics.__file__).with_name("tables.json").read_text(encoding="utf-8")
    )
    theirs = golden.json("lyric_tables.json")
    assert ours == {
        kind: {language: forms for language, forms in theirs[kind].items() if forms}
        for kind in ("abbreviations", "symbols", "ordinals", "currency_and")
    }
