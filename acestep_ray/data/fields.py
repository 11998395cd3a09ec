"""What the columns of tables and the keys of sidecar files are called, and what each is read as.

Tables, JSON, Side-Step's `key: value` lines and ai-toolkit's markup name the same facts in many ways. All become
`SongTexts`. A value that cannot be read is left out, with a note for the user; a text that is no text is a problem of
its song.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from acestep_ray.data import metas
from acestep_ray.data.languages import is_instrumental_language, language_code
from acestep_ray.data.texts import recaptions_of, tags_of_cell, text_of_cell
from acestep_ray.errors import InputError

Value = TypeVar("Value")

FILE_NAMES = (
    "filename",
    "file_name",
    "audio_path",
    "audio_file",
    "audio_filepath",
    "audio_file_original_path",
    "audio",
    "path",
    "file",
    "file_path",
    "filepath",
    "song_path",
    "wav",
)
"""Columns that name a song's audio file; the first that a row has and that leads to a file is taken."""

FIELD_NAMES: dict[str, tuple[str, ...]] = {
    "keys": ("keys", "key"),
    "tags": ("tags", "prompt", "tags_comma_separated", "genre", "genres", "tag"),
    "caption": ("caption", "text", "description"),
    "norm_lyrics": (
        "norm_lyrics",
        "lyrics",
        "lyrics_multiline",
        "lyric",
        "transcription",
        "transcript",
        "formatted_lyrics",
        "raw_lyrics",
    ),
    "speaker_emb_path": ("speaker_emb_path", "speaker_emb_relative_path"),
    "language": ("language", "languages", "lang", "vocal_language"),
    "recaption": ("recaption",),
    "bpm": ("bpm", "tempo"),
    "keyscale": ("keyscale", "key_scale", "musical_key"),
    "timesignature": (
        "timesignature",
        "time_signature",
        "signature",
        "time_sig",
        "timesig",
        "meter",
        "metre",
    ),
    "instrumental": ("instrumental", "is_instrumental"),
}
"""Every field of a song and the names that it goes by, the dataset's own first."""

SILENT_NAMES = frozenset(
    {
        "duration",
        "labeled",
        "id",
        "prompt_override",
        "custom_tag",
        "tag_position",
        "is_labeled",
        "repeat",
        "index",
        "",
    }
)
"""Names that other trainers write and that no field is read from; they need no warning."""

RECAPTION_PREFIX = "recaption_"
CAPTION_TAG = "custom_tag"


def plain_name(name: object) -> str:
    """A column's name in lower case, with `_` between its words."""
    return "_".join(str(name).strip().lower().replace("-", " ").replace("_", " ").split())


@dataclass
class SongTexts:
    """What a table's row or a sidecar file says of a song; empty values are facts that it does not say."""

    tags: list[str] = field(default_factory=list)
    caption: str = ""
    lyrics: str = ""
    language: str = ""
    recaption: dict[str, str] = field(default_factory=dict)
    bpm: int | None = None
    keyscale: str = ""
    timesignature: str = ""
    instrumental: bool | None = None

    def filled_with(self, other: SongTexts) -> list[str]:
        """Take what `other` says and this does not. Returns the names of the fields in which they differ."""
        differing = []
        for each in fields(self):
            ours, theirs = getattr(self, each.name), getattr(other, each.name)
            if theirs in ("", None, [], {}):
                continue
            if ours in ("", None, [], {}):
                setattr(self, each.name, theirs)
            elif ours != theirs:
                differing.append(each.name)
        return differing


def known_fields(names: Iterable[str]) -> set[str]:
    """The fields of a song that are among `names`, which `plain_name` has made plain."""
    wanted = set(names)
    return {name for name, aliases in FIELD_NAMES.items() if wanted & set(aliases)}


def cells_by_field(
    row: Mapping[str, Any], unused: dict[str, str], key_is_musical: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cells by the names of `FIELD_NAMES`, and the cells of columns `recaption_NAME` by NAME.

    Of several columns for one field, each row takes the first that is not empty. `unused` gets every column that no
    field is read from, and why.
    """
    by_name = {plain_name(name): cell for name, cell in row.items()}
    if key_is_musical and "key" in by_name:
        musical = by_name.pop("key")
        by_name.setdefault("musical_key", musical)
    cells: dict[str, Any] = {}
    for column, names in FIELD_NAMES.items():
        present = [name for name in names if name in by_name]
        filled = [name for name in present if not metas.is_empty_value(by_name[name])]
        for name in present[1:]:
            if name not in SILENT_NAMES and not name.endswith("_lyrics"):
                unused.setdefault(name, f"{present[0]!r} is taken where it is filled")
        if present:
            cells[column] = by_name[(filled or present)[0]]
        for name in present:
            del by_name[name]
    for name in FILE_NAMES:
        by_name.pop(name, None)
    recaption = {
        name.removeprefix(RECAPTION_PREFIX): by_name.pop(name)
        for name in list(by_name)
        if name.startswith(RECAPTION_PREFIX)
    }
    unused.update({name: "its name is unknown" for name in by_name if name not in SILENT_NAMES})
    return cells, recaption


def read_texts(
    cells: Mapping[str, Any], recaption: Mapping[str, Any], origin: str, problems: list[str], notes: list[str]
) -> SongTexts:
    """The texts in cells by the names of `FIELD_NAMES`.

    `problems` gets what makes the song unusable, `notes` the values that are left out, each with its origin.
    """

    def read(column: str, reader: Callable[[Any], Value], nothing: Value) -> Value:
        try:
            return reader(cells.get(column))
        except ValueError as error:
            notes.append(f"{origin}: {error}; it is left out")
            return nothing

    def text(column: str) -> str:
        return text_of_cell(cells.get(column), column, origin, problems)

    lyrics = cells.get("norm_lyrics")
    if isinstance(lyrics, (list, tuple)):
        lyrics = "\n".join(text_of_cell(line, "norm_lyrics", origin, problems) for line in lyrics)
    found = SongTexts(
        tags=tags_of_cell(cells.get("tags"), origin, problems),
        caption=text("caption"),
        lyrics=text_of_cell(lyrics, "norm_lyrics", origin, problems),
        recaption=recaptions_of(recaption, origin, problems)
        | recaptions_of(cells.get("recaption"), origin, problems),
        bpm=read("bpm", metas.read_bpm, None),
        keyscale=read("keyscale", metas.read_keyscale, ""),
        timesignature=read("timesignature", metas.read_timesignature, ""),
        instrumental=read("instrumental", metas.read_instrumental, None),
    )
    written = text("language")
    if is_instrumental_language(written):
        if found.instrumental is None:
            found.instrumental = True
    elif written:
        try:
            found.language = language_code(written)
        except InputError as error:
            problems.append(f"{origin}: {str(error).splitlines()[0]}")
    settle_instrumental(found, origin, notes)
    return found


def settle_instrumental(texts: SongTexts, origin: str, notes: list[str]) -> None:
    """Bring lyrics and `instrumental` together. Lyrics of `[Instrumental]` alone are how both models write none."""
    if texts.lyrics.strip().lower() in ("[instrumental]", "[inst]"):
        texts.instrumental = True
    elif texts.lyrics and texts.instrumental:
        notes.append(f"{origin}: is called instrumental and has lyrics; the lyrics are kept")
        texts.instrumental = False
