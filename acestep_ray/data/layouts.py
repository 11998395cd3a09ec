"""Sidecar files: what the text file beside a song holds, by its content.

`NAME.txt` means another thing in every trainer: tags here, lyrics in ACE-Step 1.5, `key: value` lines in Side-Step,
markup in ai-toolkit. Pure functions; reading the files is left to the caller.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from acestep_ray.data.fields import FIELD_NAMES, plain_name
from acestep_ray.errors import InputError
from acestep_ray.plain_json import load_json

TEXT_LAYOUTS = ("auto", "v1", "v15", "side-step", "ai-toolkit", "caption")
"""Values of `--texts`: what `NAME.txt` holds. `auto` decides by the content of each file."""

V1 = "ACE-Step v1's layout"
V15 = "ACE-Step 1.5's layout"
V15_JSON = "ACE-Step 1.5's dataset JSON"
SIDE_STEP = "Side-Step's layout"
AI_TOOLKIT = "ai-toolkit's layout"
CAPTIONS = "plain captions (NAME.txt)"

_MARKUP = (
    "caption",
    "lyrics",
    "bpm",
    "keyscale",
    "key",
    "timesignature",
    "time_sig",
    "duration",
    "language",
    "tags",
)
_OPENING = re.compile(rf"^[ \t]*<({'|'.join(_MARKUP)})>", re.IGNORECASE | re.MULTILINE)

# Keys of Side-Step's lines that the table of fields has under another meaning or not at all.
_LINE_KEYS = frozenset(
    {name for names in FIELD_NAMES.values() for name in names}
    | {
        "custom_tag",
        "prompt_override",
        "repeat",
        "duration",
        "title",
        "artist",
        "album",
        "year",
        "mood",
        "energy",
    }
)
_TELLING_KEYS = frozenset({"caption", "lyrics", "genre", "tags", "prompt", "text", "description"})
_META_KEYS = frozenset(
    {"bpm", "key", "keyscale", "signature", "timesignature", "is_instrumental", "language", "custom_tag"}
)
_LINE = re.compile(r"[ \t]*([A-Za-z][A-Za-z _-]{0,30}?)[ \t]*:(.*)", re.DOTALL)

_STRUCTURE = re.compile(
    r"^[^\S\n]*[\[【［](?:verse|chorus|pre-?chorus|post-?chorus|refrain|bridge|intro|outro|hook|break|drop|solo|inst|"
    r"instrumental|interlude|start|end|rap|spoken|build|ending)[^\]】］\n]*[\]】］]",
    re.IGNORECASE | re.MULTILINE,
)
_TIMED = re.compile(r"^[^\S\n]*(?:\[\d{1,3}:\d{2}|\d{1,2}:\d{2}:\d{2}[,.]\d{3}\s*-->)", re.MULTILINE)
# Few tags are longer than this, and few sung lines are shorter than half of it.
_TAG_CHARACTERS = 40
_TAG_WORDS = 4
_SUNG_LINES = 4
_LONGEST_TAG_WORDS = 6


def check_layout(layout: str) -> None:
    """Raise InputError for what is none of `TEXT_LAYOUTS`."""
    if layout not in TEXT_LAYOUTS:
        raise InputError(f"--texts is {layout!r}", fix=f"choose from {', '.join(TEXT_LAYOUTS)}")


def markup_fields(text: str) -> dict[str, str] | None:
    """The elements of ai-toolkit's markup (`<CAPTION>…</CAPTION>`, `<LYRICS>…`) by name; None for another text."""
    found: dict[str, str] = {}
    opened = {name.lower() for name in _OPENING.findall(text)}
    if not opened & {"caption", "lyrics"}:
        return None
    for name in opened:
        # An element that is never closed ends where the next one begins, or with the text.
        element = re.search(
            rf"^[ \t]*<{name}>(.*?)(?:</{name}>|(?=^[ \t]*<(?:{'|'.join(_MARKUP)})>)|\Z)",
            text,
            re.IGNORECASE | re.MULTILINE | re.DOTALL,
        )
        if element is not None:
            found[plain_name(name)] = element[1].strip()
    if "key" in found:
        found.setdefault("keyscale", found.pop("key"))
    return found


def line_fields(text: str) -> dict[str, str] | None:
    """The `key: value` lines of Side-Step by key, where `lyrics` extends to the end of the text; None for another text.

    A value includes the following lines that do not start with a known key.
    """
    found: dict[str, list[str]] = {}
    current = None
    for line in text.split("\n"):
        if current == "lyrics":
            found["lyrics"].append(line)
            continue
        if current not in (None, "caption") and _STRUCTURE.match(line):
            current = "lyrics"  # without the key
            found.setdefault("lyrics", []).append(line)
            continue
        match = _LINE.fullmatch(line)
        name = plain_name(match[1]) if match else ""
        if match and name in _LINE_KEYS:
            current = name
            found[name] = [match[2].strip()]
        elif current is not None:
            found[current].append(line)
        elif line.strip():
            return None
    if not _TELLING_KEYS & set(found) and len(_META_KEYS & set(found)) < 2:
        return None
    values = {name: "\n".join(lines).strip() for name, lines in found.items()}
    if "key" in values:
        values.setdefault("keyscale", values.pop("key"))
    return values


def json_fields(text: str) -> dict[str, Any] | None:
    """The object of a JSON sidecar, where it has a field of a song; None for another text. Raises ValueError."""
    content = load_json(text)
    if not isinstance(content, dict):
        return None
    names = {plain_name(name) for name in content}
    known = {name for names_of_field in FIELD_NAMES.values() for name in names_of_field} - {"keys", "key"}
    if not names & known:
        return None
    musical = "key" in names
    return {
        ("keyscale" if musical and plain_name(name) == "key" else name): value
        for name, value in content.items()
    }


def looks_like_lyrics(text: str) -> bool | None:
    """Whether a plain text is lyrics (True) or tags (False); None where it could be either."""
    if _STRUCTURE.search(text) or _TIMED.search(text):
        return True
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) <= 1:
        return False
    pieces = [piece.strip() for piece in re.split(r"[,，\n]", text) if piece.strip()]
    short = [len(piece) <= _TAG_CHARACTERS and len(piece.split()) <= _TAG_WORDS for piece in pieces]
    commas = len(re.findall(r"[,，]", text))
    if all(short) and commas >= 2 * len(lines):
        return False  # lists, perhaps on several lines
    if len(lines) >= _SUNG_LINES and sum(short) < 0.5 * len(short):
        return True
    return None


def looks_like_description(text: str) -> bool:
    """Whether a plain text is sentences about the music, which lose their meaning when they are split at commas."""
    ends_sentence = re.search(r"[.!?。！？]\s*$|[.!?]\s+[A-ZÀ-Þ]", text) is not None
    pieces = re.split(r"[,，\n]", text)
    return ends_sentence and any(len(piece.split()) > _LONGEST_TAG_WORDS for piece in pieces)


def with_custom_tag(caption: str, tag: str, position: str) -> str:
    """A caption with a trigger word, placed as ACE-Step 1.5's trainer places it: prepend, append or replace."""
    if not tag:
        return caption
    if position == "replace" or not caption:
        return tag
    return f"{caption}, {tag}" if position == "append" else f"{tag}, {caption}"


def sample_fields(sample: Mapping[str, Any], metadata: Mapping[str, Any], uses_genre: bool) -> dict[str, Any]:
    """A sample of ACE-Step 1.5's dataset JSON as one flat row: custom tag placed, caption or genre chosen.

    `uses_genre` says that the song is of the share (`genre_ratio`) that is described by its genre.
    """
    row = dict(sample)
    tag = str(row.pop("custom_tag", None) or metadata.get("custom_tag") or "").strip()
    position = str(metadata.get("tag_position") or "prepend")
    override = row.pop("prompt_override", None)
    genre, caption = (str(row.get(name) or "").strip() for name in ("genre", "caption"))
    if genre and (override == "genre" or (override != "caption" and uses_genre)):
        caption = genre
    row["caption"] = with_custom_tag(caption, tag, position)
    if genre and tag:
        row["genre"] = f"{tag}, {genre}"
    if metadata.get("all_instrumental") and row.get("is_instrumental") is None:
        row["is_instrumental"] = True
    return row
