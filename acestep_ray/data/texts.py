"""Texts as users write them: files beside a song, cells of a table, names of files.

A text that cannot be read is empty, and what is wrong with it goes to the list of problems, each with its origin: the
file or table row that a message names.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any

from acestep_ray.plain_files import LINE, PROMPT, Limit
from acestep_ray.plain_json import load_json
from acestep_ray.plain_text import decode_text
from acestep_ray.storage import AccessDeniedError, StoredFile

_MOST_RECAPTIONS = 1000
# A whole cell with one of these, in lower case, is empty: programs write them for a missing value.
_NOTHING = frozenset({"nan", "null", "none", "<na>", "n/a"})


def read_text(file: StoredFile, origin: str, problems: list[str], limit: Limit) -> str:
    """The cleaned text of a UTF-8 file, or a UTF-16 file with a byte order mark; "" after a problem is noted."""
    try:
        text = decode_text(file.read_bytes(limit))
    except UnicodeDecodeError as error:
        problems.append(f"{origin}: not UTF-8 text (byte {error.start}), save it as UTF-8")
        return ""
    except OSError as error:
        problems.append(f"{origin}: cannot be read ({error.strerror or error})")
        return ""
    except AccessDeniedError:
        problems.append(f"{origin}: cannot be read (object storage denies access)")
        return ""
    if "\0" in text:
        problems.append(f"{origin}: not UTF-8 text (it holds NUL bytes), save it as UTF-8")
        return ""
    return clean(text)


def text_of_cell(cell: Any, column: str, origin: str, problems: list[str]) -> str:
    """The cleaned text of a cell, or of a number there; "" for None, NaN and `null`, and after a problem is noted."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    limit = LINE if column == "norm_lyrics" else PROMPT
    if isinstance(cell, str) and len(cell) > limit.size:
        problems.append(
            f"{origin}: {column} is longer than {limit.size >> 10:,} KB, the limit of {limit.kind}"
        )
        return ""
    if isinstance(cell, str) and is_unicode(cell):
        text = clean(cell)
        return "" if text.lower() in _NOTHING else text
    if isinstance(cell, (int, float)) and not isinstance(cell, bool):
        # A column of whole numbers with gaps is one of floats in most programs.
        is_whole = isinstance(cell, int) or cell.is_integer()
        try:
            return str(int(cell)) if is_whole else str(cell)
        except ValueError:  # more digits than Python writes
            problems.append(f"{origin}: {column} holds a number of thousands of digits, not text")
            return ""
    kind = "half of a surrogate pair" if isinstance(cell, str) else type(cell).__name__
    problems.append(f"{origin}: {column} holds {kind}, not text")
    return ""


def tags_of_cell(cell: Any, origin: str, problems: list[str]) -> list[str]:
    """Tags in a cell: a list of texts, a text with commas, or such a list as Python or JSON prints it."""
    if isinstance(cell, (list, tuple)):
        tags = [text_of_cell(tag, "tags", origin, problems) for tag in cell]
        return [tag for tag in tags if tag]
    text = text_of_cell(cell, "tags", origin, problems)
    if printed := re.fullmatch(r"\[\s*([\"'].*[\"'])\s*\]", text, re.DOTALL):
        return [tag.strip(" \t\n\"'") for tag in split_tags(printed[1]) if tag.strip(" \t\n\"'")]
    return split_tags(text)


def clean(text: str) -> str:
    """Line ends as LF, no white space at the ends of lines, none at both ends of the text."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(line.rstrip() for line in lines).strip()


def split_tags(text: str) -> list[str]:
    """Tags between commas or line ends; the full-width comma of Chinese and Japanese texts counts too."""
    return [tag.strip() for tag in re.split(r"[,，\n]", text) if tag.strip()]


def recaptions_of(recaption: Any, origin: str, problems: list[str]) -> dict[str, str]:
    """Recaptions by name, blank ones dropped, from a dict or its JSON text."""
    if isinstance(recaption, str) and recaption.strip():
        try:
            recaption = load_json(recaption)
        except ValueError as error:
            problems.append(f"{origin}: its recaption is not JSON ({error})")
            return {}
    if not recaption:
        return {}
    if not isinstance(recaption, dict):
        problems.append(f"{origin}: its recaption is not an object of names and texts")
        return {}
    if len(recaption) > _MOST_RECAPTIONS:
        problems.append(
            f"{origin}: it has {len(recaption):,} recaptions; up to {_MOST_RECAPTIONS:,} are read"
        )
        return {}
    texts = {
        name: text_of_cell(text, f"recaption {name!r}", origin, problems) for name, text in recaption.items()
    }
    return {name: text for name, text in texts.items() if text}


def is_unicode(name: str) -> bool:
    """Whether a text can be written as UTF-8: names of files may be any bytes, and JSON may hold half characters."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable(name: object) -> str:
    """A file's name; one that is not UTF-8 in ASCII, since it could be neither stored nor printed."""
    text = str(name)
    return text if is_unicode(text) else os.fsencode(text).decode("ascii", "backslashreplace")
