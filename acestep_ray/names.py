"""Names and output paths that every later command takes: what others are refused for, at the start."""

from __future__ import annotations

import os
import unicodedata

from acestep_ray.errors import InputError

LONGEST_NAME = 200
"""In bytes. File systems take 255, and files derived from the name have suffixes."""
_LONGEST_PART = 255
# Control characters, halves of characters and bytes that are no Unicode, ends of lines and of paragraphs.
_UNUSABLE = ("Cc", "Cs", "Zl", "Zp")


def check_run_name(name: str, flag: str = "--exp_name", *, is_new: bool = True) -> None:
    """Raise InputError for a run's name that is no plain name of a folder.

    A new one must also be usable in lists (`--lora_path A,B`), in command lines and in messages; runs that were begun
    under other names are continued.
    """
    where = f"{flag} {name!r}"
    if name.strip(".") == "" or any(character in "/\\\0" for character in name):
        raise InputError("not a plain name", where=where, fix="use no slashes")
    check_text(name, where)
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise InputError("the name is too long", where=where, fix=f"at most {LONGEST_NAME} bytes")
    if is_new and (name != name.strip() or name.startswith("-") or "," in name):
        raise InputError(
            "other commands could not take this name",
            where=where,
            fix="use no comma, no `-` at its beginning, and no space at its ends",
        )


def check_output_place(place: str, flag: str) -> None:
    """Raise InputError for a path to write that cannot be shown, noted in files, or made on a disk."""
    where = f"{flag} {place!r}"
    check_text(place, where)
    if any(len(os.fsencode(part)) > _LONGEST_PART for part in place.split("/")):
        raise InputError("the name is too long", where=where, fix=f"at most {_LONGEST_PART} bytes")


def check_text(text: str, where: str) -> None:
    """Raise InputError for control characters, ends of lines, and bytes that are no Unicode text."""
    unusable = [character for character in text if unicodedata.category(character) in _UNUSABLE]
    if unusable:
        raise InputError(
            f"the name holds {unusable[0]!a}, which is no character to name a file with",
            where=where,
            fix="use letters, digits and punctuation, in UTF-8",
        )
