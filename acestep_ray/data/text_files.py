"""Text files as people have them, and texts that may be names of files."""

from __future__ import annotations

import os
import re
from pathlib import Path

from acestep_ray.errors import InputError
from acestep_ray.paths import expand_home
from acestep_ray.plain_files import LYRICS, Limit, read_limited
from acestep_ray.plain_text import encoding_of

_OTHER_KINDS = (
    (b"{\\rtf", "an RTF document"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a Word document or an archive"),
    (b"\xd0\xcf\x11\xe0", "a Word document"),
)

TEXT_SUFFIXES = (
    ".txt",
    ".lrc",
    ".lyrics",
    ".lyric",
    ".srt",
    ".vtt",
    ".sbv",
    ".md",
    ".text",
    ".prompt",
    ".caption",
)
_OTHER_SUFFIXES = (
    *(
        ".rtf",
        ".doc",
        ".docx",
        ".odt",
        ".pdf",
        ".html",
        ".htm",
        ".json",
        ".jsonl",
        ".csv",
        ".tsv",
        ".yaml",
        ".yml",
    ),
    *(".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac"),
)
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,4}$")
_LONGEST_PATH = 1024
_FIX = r"give a text file, or the text: words that look like a path are text with \n behind them"


def decode_text(content: bytes) -> str:
    """The text of UTF-8 bytes, or of UTF-16 or UTF-32 with a byte order mark.

    Raises ValueError with what is wrong and what to do; other encodings cannot be told from each other.
    """
    for beginning, kind in _OTHER_KINDS:
        if content.startswith(beginning):
            raise ValueError(f"{kind}, not plain text: save it as text in UTF-8")
    encoding = encoding_of(content[:4])
    if encoding != "utf-8":
        try:
            return content.decode(encoding)
        except UnicodeDecodeError as error:
            name = encoding.removesuffix("-sig").upper()
            raise ValueError(f"damaged {name} text (byte {error.start}): save it as UTF-8") from None
    if b"\0" in content:
        raise ValueError(
            "not UTF-8 text (it holds NUL bytes; UTF-16 needs a byte order mark): save it as UTF-8"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 text (byte {error.start}), and its encoding, such as Windows-1252, GB18030 or Shift JIS, "
            "is not certain: save it as UTF-8"
        ) from None


def read_text_file(path: Path, limit: Limit) -> str:
    """The text of a file, line ends as LF. Raises InputError where it cannot be read, is too large, or is no text."""
    try:
        return decode_text(read_limited(path, limit)).replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise InputError(f"cannot read the text file {path} ({error.strerror or error})") from None
    except ValueError as error:
        what, _, fix = str(error).rpartition(": ")
        raise InputError(f"cannot read the text file {path} ({what})", fix=fix) from None


def text_or_file(text: str, folder: Path, *, words_name_files: bool, limit: Limit = LYRICS) -> str:
    """`text`, or what the text file holds that it names, relative to `folder`.

    A name is one line without a line end, also a typed one, that ends with a usual suffix of text files or begins as a
    path (`./`, `../`, `/`, `~`). With `words_name_files` it is also the name of any file or folder that exists, and
    one word with a slash in it. Raises InputError where there is no such file, and for a folder or a file that is no
    text.
    """
    name = text.strip()
    if not name or len(name) >= _LONGEST_PATH or any(mark in text for mark in ("\n", "\r", "\0", "\\n")):
        return text
    path = folder / _with_home(name)
    is_name = _looks_like_path(name, folder, words_name_files)
    try:
        is_there, is_folder = os.path.lexists(path), path.is_dir()
    except OSError:  # no file can have this name
        is_there = is_folder = False
    if is_there and not is_folder and (is_name or (words_name_files and path.is_file())):
        return read_text_file(path, limit)
    if is_folder and (is_name or words_name_files):
        raise InputError(f"a folder, not a text file ({path})", fix=_FIX)
    if is_name:
        raise InputError(f"no such file ({path})", fix=_FIX)
    return text


def _with_home(path: str) -> str:
    """A path with its home folder, or the words as they are: a text may begin with `~`."""
    try:
        return expand_home(path)
    except InputError:
        return path


def _looks_like_path(name: str, folder: Path, words_name_files: bool) -> bool:
    lower = name.lower()
    begins_as_path = re.match(r"~?/|~\w+/|\.{1,2}/|[A-Za-z]:\\|file://", name) is not None
    if lower.endswith(TEXT_SUFFIXES):
        return True
    if any(character.isspace() for character in name):
        return begins_as_path and _SUFFIX.search(name) is not None
    if begins_as_path or lower.endswith(_OTHER_SUFFIXES):
        return True
    if "/" not in name:
        return False
    if _SUFFIX.search(name):
        return True
    return words_name_files and (name.isascii() or (folder / name).parent.is_dir())
