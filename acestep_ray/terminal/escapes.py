"""Characters that a terminal obeys, or that hide or turn what is read, shown as their codes.

Names of files and tensors, keys, texts and messages of other programs are a stranger's: written to a terminal as they
are, they could clear it, move its cursor, forge a line, or set a clipboard. Everything that this program prints passes
`visible`; what must stay in one line passes `visible_line`.
"""

from __future__ import annotations

import re

_UNSEEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and line feed, DEL, C1
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"  # zero width, line ends, bidi
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_HIDDEN = re.compile(f"[{_UNSEEN}]")
_HIDDEN_IN_LINE = re.compile(f"[{_UNSEEN}\t\n]")
_BAR_MOVES = re.compile(r"[\r\n]*(?:\x1b\[A)*")
_BAR_START = re.compile(r"\r|(?:\x1b\[\d{1,2}m)+\([\w=:,. -]*\)\x1b\[0m ?")
_SHORT = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


def visible(text: str) -> str:
    """The text with characters of control, of direction and without width as codes; line feeds and tabs stay."""
    return text if text.isascii() and text.isprintable() else _HIDDEN.sub(_code, text)


def visible_line(text: object) -> str:
    """As `visible`, in one line: line feeds and tabs are codes too."""
    line = str(text)
    return line if line.isascii() and line.isprintable() else _HIDDEN_IN_LINE.sub(_code, line)


def visible_message(text: str) -> str:
    """As `visible`, of a message: lines behind the first are indented, so that no text in it looks like a message."""
    first, *more = visible(text).split("\n")
    return "\n".join([first, *(line if not line or line[0].isspace() else f"  {line}" for line in more)])


def visible_output(text: str) -> str:
    """As `visible`, of what libraries write: the moves of their progress bars and the colour of Ray's prefix stay."""
    if _BAR_MOVES.fullmatch(text):
        return text
    kept = _BAR_START.match(text)
    start = kept[0] if kept else ""
    return start + visible(text[len(start) :].replace("\r\n", "\n"))


def _code(match: re.Match[str]) -> str:
    character = match[0]
    number = ord(character)
    if character in _SHORT:
        return _SHORT[character]
    if number < 0x20:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"
