"""Text files as people have them, and texts that may be names of files."""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path

from acestep_ray.errors import InputError

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
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


def decode_text(content: bytes) -> str:
    """The text of UTF-8 bytes, or of UTF-16 or UTF-32 with a byte order mark.

    Raises ValueError with what is wrong and what to do; other encodings cannot be told from each other.
    """
    for beginning, kind in _OTHER_KINDS:
        if content.startswith(beginning):
            raise ValueError(f"{kind}, not plain text: save it as text in UTF-8")
    for mark, encoding in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            try:
                return content.decode(encoding)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"damaged {encoding.upper()} text (byte {error.start}): save it as UTF-8"
                ) from None
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


def read_text_file(path: Path) -> str:
    """The text of a file. Raises InputError where it cannot be read or is no text."""
    try:
        return decode_text(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the text file {path} ({error.strerror or error})") from None
    except ValueError as error:
        what, _, fix = str(error).rpartition(": ")
        raise InputError(f"cannot read the text file {path} ({what})", fix=fix) from None


def text_or_file(text: str, folder: Path, *, slash_is_path: bool) -> str:
    """`text`, or what the file holds that it names, relative to `folder`.

    A name of a file is one line that names a file which exists, ends with a usual suffix of texts, or begins as a path
    (`./`, `../`, `/`, `~`); with `slash_is_path` also one word with a slash in it. Raises InputError where there is no
    such file, and for a folder or a file that is no text.
    """
    name = text.strip()
    if not name or "\n" in name or len(name) >= _LONGEST_PATH or "\0" in name:
        return text
    path = folder / os.path.expanduser(name)
    looks_like_path = _looks_like_path(name, folder, slash_is_path)
    try:
        if path.is_file():
            return read_text_file(path)
        is_folder = path.is_dir()
    except OSError:  # a name that no file can have, or a folder that may not be entered
        is_folder = False
    if is_folder and looks_like_path:
        raise InputError(f"a folder, not a text file ({path})", fix="give the text, or a file that holds it")
    if looks_like_path:
        raise InputError(
            f"no such file ({path})",
            fix="give the text, or a file that holds it; text that looks like a path is text with a line end in it",
        )
    return text


def _looks_like_path(name: str, folder: Path, slash_is_path: bool) -> bool:
    lower = name.lower()
    if lower.endswith(TEXT_SUFFIXES):
        return True
    if any(character.isspace() for character in name):
        return bool(re.match(r"(?:~?/|\.{1,2}/|[A-Za-z]:\\)", name)) and _SUFFIX.search(name) is not None
    if lower.endswith(_OTHER_SUFFIXES) or re.match(r"(?:~?/|~\w|\.{1,2}/|[A-Za-z]:\\|file://)", name):
        return True
    if "/" not in name or not slash_is_path:
        return "/" in name and _SUFFIX.search(name) is not None
    return name.isascii() or _SUFFIX.search(name) is not None or (folder / name).parent.is_dir()
