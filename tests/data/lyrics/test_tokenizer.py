"""Lyrics to ids, with the tiny vocabulary."""

from __future__ import annotations

import json
import pickle
import string

import pytest
from tokenizers import Tokenizer

from acestep_ray.data.lyrics import (
    LANGUAGES,
    MAX_LYRIC_TOKENS,
    LyricTokenizer,
    LyricTokens,
    build_tiny_vocabulary,
    clean,
)
from acestep_ray.errors import InputError


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.json"
    build_tiny_vocabulary(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(vocabulary) -> LyricTokenizer:
    return LyricTokenizer.from_file(vocabulary)


@pytest.fixture(scope="module")
def spelled(vocabulary):
    """Ids as the text they stand for."""
    tokens = Tokenizer.from_file(str(vocabulary))
    return lambda ids: "".join(tokens.id_to_token(token) for token in ids)


def test_every_line_is_led_by_its_language_and_closed_by_a_space(tokenizer, spelled):
    tokens = tokenizer.encode("[verse]\nNever let me go\n\nJe ne sais pas pourquoi tu pars\n")
    assert tokens.languages == ["en", "en", "fr"]
    assert spelled(tokens.ids) == (
        "[START][en][verse][SPACE][en]never[SPACE]let[SPACE]me[SPACE]go[SPACE][SPACE]"
        "[fr]je[SPACE]ne[SPACE]sais[SPACE]pas[SPACE]pourquoi[SPACE]tu[SPACE]pars[SPACE][SPACE]"
    )


def test_a_given_language_decides_for_all_lines_but_tags(tokenizer, spelled):
    tokens = tokenizer.encode("[couplet] ah\nHello 20€\nДа", language="DE")
    assert tokens.languages == ["en", "de", "de"]
    assert spelled(tokens.ids) == (
        "[START][en][couplet][SPACE]ah[SPACE][de]hello[SPACE]zwanzig[SPACE]Euro[SPACE][de]да[SPACE]"
    )


def test_chinese_has_the_token_of_its_region(tokenizer, spelled):
    assert spelled(tokenizer.encode("我").ids) == "[START][zh-cn]wo3[SPACE]"


def test_lines_are_stripped_and_line_ends_of_other_systems_read(tokenizer):
    assert tokenizer.encode("  Let me go \r\n \t\r\nAgain\r\n") == tokenizer.encode("Let me go\n\nAgain\n")


def test_encode_is_made_of_encoded_lines(tokenizer):
    line = tokenizer.encode_line("Let me go", "en")
    start, *rest = tokenizer.encode("Let me go\nLet me go").ids
    space = rest[len(line)]
    assert rest == [*line, space, *line, space]
    assert start not in rest


@pytest.mark.parametrize("lyrics", ["", " \n\t\n", "\r\n"])
def test_no_lyrics_are_one_masked_token(tokenizer, lyrics):
    tokens = tokenizer.encode(lyrics)
    assert tokens == LyricTokens([0], [])
    assert tokens.is_empty
    assert tokens.mask == [0]


def test_the_mask_of_lyrics_is_all_ones(tokenizer):
    tokens = tokenizer.encode("Let me go")
    assert not tokens.is_empty
    assert tokens.mask == [1] * len(tokens.ids)


def test_ids_are_cut_at_the_model_s_limit(tokenizer):
    line = tokenizer.encode_line("Never let me go", "en")
    tokens = tokenizer.encode("Never let me go\n" * 1000)
    assert len(tokens.ids) == MAX_LYRIC_TOKENS == 4096
    assert tokens.ids[1 : 1 + len(line)] == line
    # Languages are those of the lines of which something is left.
    assert len(tokens.languages) == -(-(MAX_LYRIC_TOKENS - 1) // (len(line) + 1))


def test_an_unsupported_language_is_an_input_error(tokenizer):
    with pytest.raises(InputError, match="'sv' are not supported"):
        tokenizer.encode("Hej", language="sv")


def test_a_missing_vocabulary_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read.*absent\.json"):
        LyricTokenizer.from_file(tmp_path / "absent.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00", b'{"model": 3}'])
def test_a_corrupt_vocabulary_is_an_input_error(tmp_path, content):
    path = tmp_path / "vocab.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"not a Hugging Face tokenizers JSON.*"):
        LyricTokenizer.from_file(path)


def test_a_vocabulary_of_another_model_is_an_input_error_naming_what_it_lacks(tmp_path, vocabulary):
    content = vocabulary.read_text(encoding="utf-8").replace("[zh-cn]", "[zh]").replace("[START]", "[BEGIN]")
    path = tmp_path / "vocab.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"lacks the tokens \[START\], \[zh-cn\]"):
        LyricTokenizer.from_file(path)


def test_the_fingerprint_follows_the_vocabulary(tmp_path, vocabulary, tokenizer):
    copy = tmp_path / "copy.json"
    copy.write_bytes(vocabulary.read_bytes())
    assert LyricTokenizer.from_file(copy).fingerprint == tokenizer.fingerprint
    build_tiny_vocabulary(copy, size=400)
    assert LyricTokenizer.from_file(copy).fingerprint != tokenizer.fingerprint


def test_a_tokenizer_travels_to_another_process(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("Let me go") == tokenizer.encode("Let me go")
    assert copy.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("size", [160, 300, 512, 2000])
def test_the_tiny_vocabulary_keeps_to_its_size_and_is_the_same_each_time(tmp_path, size):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    build_tiny_vocabulary(first, size)
    build_tiny_vocabulary(second, size)
    assert first.read_bytes() == second.read_bytes()
    ids = Tokenizer.from_file(str(first)).get_vocab().values()
    assert sorted(ids) == list(range(len(ids)))
    assert len(ids) <= size


def test_the_tiny_vocabulary_has_the_form_of_the_released_one(vocabulary):
    content = json.loads(vocabulary.read_text(encoding="utf-8"))
    assert content["model"]["type"] == "BPE"
    assert content["model"]["unk_token"] == "[UNK]"
    assert content["pre_tokenizer"] == {"type": "Whitespace"}
    tokens = Tokenizer.from_file(str(vocabulary))
    assert [tokens.token_to_id(name) for name in ("[STOP]", "[UNK]", "[SPACE]", "a", "b")] == [0, 1, 2, 3, 4]
    special = {token["content"] for token in content["added_tokens"]}
    assert {"[START]", "[zh-cn]", "[hi]", "[verse]", "[pre-chorus]", "[inst]"} <= special
    assert len(special) == 3 + len(LANGUAGES) + 12 + 1


def test_the_tiny_vocabulary_reads_ascii_and_the_letters_of_every_language(vocabulary):
    tokens = Tokenizer.from_file(str(vocabulary))
    for character in string.ascii_letters + string.digits + string.punctuation:
        assert tokens.token_to_id(character) is not None, character
    lines = {
        "en": "The quick brown fox, isn't it?",
        "de": "Füße über Öl",
        "fr": "Où êtes-vous, garçon ? Ça œuvre",
        "es": "¿Qué mañana?",
        "it": "Perché no, città",
        "pt": "Não é você, coração",
        "pl": "Zażółć gęślą jaźń",
        "tr": "Şişli'de ığdır çağı",
        "ru": "Съешь ещё этих булок",
        "cs": "Příliš žluťoučký kůň úpěl ďábelské ódy",
        "nl": "Eén ogenblik",
        "ar": "ابق معي حتى يطلع الصباح",
        "zh": "城市的霓虹",
        "ja": "街の灯り",
        "hu": "Árvíztűrő tükörfúrógép",
        "ko": "도시의 불빛이",
        "hi": "सुबह होने तक मेरे साथ रहो",
    }
    assert set(lines) == set(LANGUAGES)
    unknown = tokens.token_to_id("[UNK]")
    for language, line in lines.items():
        assert unknown not in tokens.encode(clean(line, language)).ids, language


def test_a_vocabulary_without_room_for_ascii_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least"):
        build_tiny_vocabulary(tmp_path / "vocab.json", size=64)
