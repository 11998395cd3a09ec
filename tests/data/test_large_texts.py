"""Texts that no song has: they are read in seconds, and cut as documented."""

from __future__ import annotations

import random
import re

import pytest

from acestep_ray.data.lyrics import (
    LANGUAGES,
    MAX_LYRIC_TOKENS,
    LyricTokenizer,
    build_tiny_vocabulary,
    numbers,
)
from acestep_ray.data.lyrics.tables import tables
from acestep_ray.data.lyrics.tokenizer import MAX_LINE_CHARACTERS
from acestep_ray.data.prompts import MAX_CHARACTERS, prompt_variants

pytestmark = pytest.mark.timeout(90)

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> LyricTokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.json"
    build_tiny_vocabulary(path)
    return LyricTokenizer.from_file(path)


def test_ten_thousand_tags_are_shuffled_and_cut():
    tags = [f"tag {i}" for i in range(10_000)]
    variants = prompt_variants(tags, {}, key="k", shuffles=5, seed=0)
    assert len({variant.text for variant in variants}) == 5
    assert all(len(variant.text) == MAX_CHARACTERS for variant in variants)
    assert [v.text for v in prompt_variants(["x"] * 10_000, {}, key="k", shuffles=5, seed=0)] == [
        ", ".join(["x"] * 100)[:MAX_CHARACTERS]
    ]


def test_a_megabyte_of_lines_is_read_as_far_as_its_tokens_go(tokenizer):
    verse = "[verse]\nNever let me go\n\nJe ne sais pas pourquoi tu pars\n"
    whole = tokenizer.encode(verse * (MEGABYTE // len(verse)))
    assert len(whole.ids) == MAX_LYRIC_TOKENS
    assert whole == tokenizer.encode(verse * 500)


@pytest.mark.parametrize("line", ["Xy", "la", "", "[a]", "1", '"'])
def test_a_megabyte_of_short_lines_is_read(tokenizer, line):
    tokens = tokenizer.encode(f"{line}\n" * (MEGABYTE // (len(line) + 1)))
    assert len(tokens.ids) == (MAX_LYRIC_TOKENS if line else 1)


@pytest.mark.parametrize(
    "text", ["1", "12,", "$5 ", "never ", "1st ", '"', "\0", "我1", "あ", "사랑 ", "🎵", "[a] "]
)
def test_a_megabyte_in_one_line_is_cut(tokenizer, text):
    line = text * (MEGABYTE // len(text))
    tokens = tokenizer.encode(line)
    assert tokens == tokenizer.encode(line[:MAX_LINE_CHARACTERS])
    assert len(tokens.ids) == MAX_LYRIC_TOKENS or text == '"'


@pytest.mark.parametrize("language", sorted({*LANGUAGES} - {"zh", "ja", "hi"}))
def test_a_long_number_takes_no_longer_than_its_length(language):
    number = "1" * 200_000
    assert numbers.spell_numbers(number, language) == number


def test_numbers_are_found_where_they_are_without_the_look_behinds():
    rng = random.Random(0)
    texts = ["".join(rng.choices("0123456789.,$ est", k=rng.randrange(1, 14))) for _ in range(20_000)]
    amount = re.compile(r"\$[0-9.,]*[0-9]|[0-9.,]*[0-9]\$")
    dollars = dict(numbers._CURRENCIES)["USD"]
    pairs = [(amount, dollars), (re.compile("[0-9]+[.,][0-9]+"), numbers._DECIMAL)]
    pairs += [
        (re.compile(plain), numbers._ordinal_pattern(language))
        for language, plain in tables()["ordinals"].items()
    ]
    for plain, pattern in pairs:
        assert pattern.pattern != plain.pattern
        for text in texts:
            assert pattern.sub("<>", text) == plain.sub("<>", text), (pattern.pattern, text)
