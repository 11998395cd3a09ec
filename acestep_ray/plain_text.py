"""Text of files that people write with other programs: a byte order mark says which Unicode encoding it is in."""

from __future__ import annotations

import codecs
from pathlib import Path

from acestep_ray.plain_files import Limit, read_limited

_MARKS = (
    # The mark of UTF-16 begins that of UTF-32.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def read_utf8(path: Path, limit: Limit) -> str:
    """The text of a file in UTF-8 without a byte order mark. Raises OSError, also above the limit, and
    UnicodeDecodeError."""
    return read_limited(path, limit).decode("utf-8")


def encoding_of(start: bytes) -> str:
    """The encoding that the byte order mark in a file's first four bytes names; UTF-8 where there is none.

    Python's decoder strips the mark.
    """
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")


def decode_text(content: bytes) -> str:
    """The text without its byte order mark; UTF-8 where it has none. Raises UnicodeDecodeError."""
    return content.decode(encoding_of(content[:4]))


def read_text(path: Path, limit: Limit) -> str:
    """The text of a file with line feeds as its line ends. Raises OSError, also above the limit, and
    UnicodeDecodeError."""
    return decode_text(read_limited(path, limit)).replace("\r\n", "\n").replace("\r", "\n")
