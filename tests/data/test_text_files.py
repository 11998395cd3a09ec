"""Text files in the encodings that they say, and texts that name files."""

from __future__ import annotations

import pytest

from acestep_ray.data.text_files import decode_text, text_or_file
from acestep_ray.errors import InputError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_an_encoding_with_a_mark_is_read(encoding):
    assert decode_text("Noël\n你好".encode(encoding)) == "Noël\n你好"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("Noël".encode("cp1252"), "byte 2"),
        ("你好".encode("gb18030"), "not certain"),
        ("こんにちは".encode("shift-jis"), "save it as UTF-8"),
        ("hello".encode("utf-16-le"), "NUL bytes"),
        (b"\xff\xfeh", "damaged UTF-16"),
        (b"{\\rtf1 hello}", "RTF"),
        (b"%PDF-1.4", "PDF"),
        (b"PK\x03\x04", "Word"),
    ],
)
def test_other_content_is_refused_with_what_to_do(content, told):
    with pytest.raises(ValueError, match=told):
        decode_text(content)


@pytest.mark.parametrize(
    "name", ["a.txt", "a.lrc", "my song.TXT", "a.lyrics", "song.mp3", "x/y", "./x", "~/x", "/x/y", "a.docx"]
)
def test_a_missing_file_is_an_error(tmp_path, name):
    with pytest.raises(InputError, match="no such file"):
        text_or_file(name, tmp_path, words_name_files=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "love",
        "love / hate",
        "and so on...",
        "one\ntwo.txt",
        "words/one\n",
        r"x/y\n",
        "爱/恨",
        "Mr. Blue",
        "a" * 2000,
    ],
)
def test_lyrics_are_lyrics(tmp_path, text):
    assert text_or_file(text, tmp_path, words_name_files=True) == text


@pytest.mark.parametrize("text", ["pop/rock", "R&B, soul", "drum'n'bass", "folder", "file"])
def test_tags_are_tags(tmp_path, text):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("no tags")
    assert text_or_file(text, tmp_path, words_name_files=False) == text


def test_a_file_is_read_and_a_folder_refused(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words/one.lrc").write_text("hello", encoding="utf-16")
    (tmp_path / "plain").write_text("hello")
    assert text_or_file("words/one.lrc", tmp_path, words_name_files=True) == "hello"
    assert text_or_file("words/one.lrc", tmp_path, words_name_files=False) == "hello"
    assert text_or_file("plain", tmp_path, words_name_files=True) == "hello"
    for name in ("words", "./words", "words/"):
        with pytest.raises(InputError, match="a folder, not a text file"):
            text_or_file(name, tmp_path, words_name_files=True)


def test_a_file_in_another_encoding_is_named_with_its_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes("Noël".encode("cp1252"))
    with pytest.raises(InputError, match=r"a\.txt \(not UTF-8 text \(byte 2\)"):
        text_or_file("a.txt", tmp_path, words_name_files=True)
