"""Texts of users on matplotlib's figures: names, prompts and keys may hold any character."""

from __future__ import annotations

import re

# Of XML's characters: C0 but white space, C1, surrogates, and two that are none.
_NOT_DRAWN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def literal(text: str) -> str:
    """The text as matplotlib draws it letter by letter, without characters that an SVG must not hold.

    Between two `$` matplotlib would read a formula, or fail to.
    """
    return _NOT_DRAWN.sub("\N{REPLACEMENT CHARACTER}", text).replace("$", r"\$")


def with_fonts(text: str) -> tuple[str, list[str]]:
    """The text without characters that no font here has, and the families of those that have the others."""
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    families = list(rcParams["font.family"])

    def missing_in(path: str) -> set[str]:
        try:
            font = get_font(path)
        except (OSError, RuntimeError):  # damaged, or gone since matplotlib made its list
            return missing
        return {character for character in missing if not font.get_char_index(ord(character))}

    missing = {character for character in text if not character.isspace()}
    missing = missing_in(findfont(FontProperties()))
    for entry in fontManager.ttflist:
        if "Last Resort" in entry.name:  # comes with matplotlib, and has a box for every character
            continue
        if not missing:
            break
        left = missing_in(entry.fname)
        if left != missing:
            families.append(entry.name)
            missing = left
    return "".join(character for character in text if character not in missing), families
