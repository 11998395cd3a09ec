"""Songs as a user keeps them: a folder of audio with texts beside it, or a table of songs.

Everything that is wrong is noted with its file, and reading goes on, so that all of it is told at once.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from acestep_ray.data.audio import AUDIO_SUFFIXES, UNSUPPORTED_SUFFIXES

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")

# Names of a table's columns, the dataset's own first. `recaption_NAME` is the recaption NAME.
_COLUMN_NAMES = {
    "keys": ("keys", "key"),
    "filename": ("filename", "audio", "path", "audio_file_original_path"),
    "tags": ("tags", "prompt", "tags_comma_separated"),
    "norm_lyrics": ("norm_lyrics", "lyrics", "lyrics_multiline"),
    "speaker_emb_path": ("speaker_emb_path", "speaker_emb_relative_path"),
    "language": ("language",),
    "recaption": ("recaption",),
}
_RECAPTION_PREFIX = "recaption_"

_PROMPT_ENDINGS = ("_prompt.txt", ".txt")
_LYRICS_ENDINGS = ("_lyrics.txt", ".lyrics")
_RECAPTION_ENDINGS = ("_recaption.json",)
_TEXT_ENDINGS = _PROMPT_ENDINGS + _LYRICS_ENDINGS + _RECAPTION_ENDINGS


@dataclass(frozen=True)
class SourceSong:
    """One song with its texts; the files are where the user keeps them."""

    origin: str  # the file or table row that a message names
    key: str
    audio: Path
    audio_place: str  # wanted path below audio/ in the dataset
    tags: list[str]
    lyrics: str
    recaption: dict[str, str]
    speaker: Path | None
    language: str


@dataclass
class Findings:
    """Problems stop the job; warnings are told in its summary."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def songs_of_folder(root: Path, findings: Findings) -> list[SourceSong]:
    """The audio files below `root`, each with the prompt, lyrics and recaptions that lie beside it."""
    files = sorted(_walk(root, findings))
    texts: dict[tuple[PurePosixPath, str, str], PurePosixPath] = {}
    audio: list[PurePosixPath] = []
    for file in files:
        if file.suffix.lower() in AUDIO_SUFFIXES | UNSUPPORTED_SUFFIXES:
            audio.append(file)
        for ending in _TEXT_ENDINGS:
            if file.name.lower().endswith(ending):
                texts[file.parent, file.name[: -len(ending)], ending] = file
    used: set[PurePosixPath] = set()

    def read_beside(song: PurePosixPath, endings: Iterable[str]) -> str | None:
        for ending in endings:
            file = texts.get((song.parent, song.stem, ending))
            if file is not None:
                used.add(file)
                return _read_text(root / file, str(file), findings)
        return None

    keys = _keys_of_files(audio)
    songs = []
    for file in audio:
        origin = str(file)
        _check_readable(root / file, origin, findings)
        if file.suffix.lower() in UNSUPPORTED_SUFFIXES:
            findings.warnings.append(
                f"{origin}: {file.suffix} is not read, precompute will reject it; convert it to FLAC, WAV or MP3"
            )
        prompt = read_beside(file, _PROMPT_ENDINGS)
        if not prompt:
            state = "no prompt" if prompt is None else "an empty prompt"
            findings.warnings.append(
                f"{origin}: {state}; {file.stem}_prompt.txt would hold its tags, with commas between them"
            )
        lyrics = read_beside(file, _LYRICS_ENDINGS) or ""
        recaption = read_beside(file, _RECAPTION_ENDINGS)
        songs.append(
            SourceSong(
                origin=origin,
                key=keys[file],
                audio=root / file,
                audio_place=str(file),
                tags=_split_tags(prompt or ""),
                lyrics=lyrics,
                recaption=_recaption(recaption, origin, findings),
                speaker=None,
                language="",
            )
        )
    findings.warnings += [
        f"{file}: belongs to no song, since no audio file has its name"
        for file in sorted(set(texts.values()) - used)
    ]
    return songs


def _walk(root: Path, findings: Findings) -> Iterator[PurePosixPath]:
    """Every file below `root` that is not hidden, relative to it. Linked folders are followed, each once."""

    def report(error: OSError) -> None:
        findings.problems.append(f"{error.filename}: the folder cannot be read ({error.strerror})")

    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=report):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if name.startswith("."):
                continue
            file = PurePosixPath(Path(folder, name).relative_to(root).as_posix())
            if _is_unicode(str(file)):
                yield file
            else:
                findings.problems.append(f"{str(file)!a}: the file name is not valid UTF-8, rename it")


def _keys_of_files(files: list[PurePosixPath]) -> dict[PurePosixPath, str]:
    """Keys made of the paths without suffix; of distinct paths that would give one key, each gets a hash."""
    stems = {file: str(file.with_suffix("")) for file in files}
    stems_of_key = defaultdict(set)
    for stem in stems.values():
        stems_of_key[_sanitized(stem)].add(stem)
    keys = {}
    for file, stem in stems.items():
        key = _sanitized(stem)
        if len(stems_of_key[key]) > 1:
            key = f"{key}_{hashlib.sha256(stem.encode()).hexdigest()[:8]}"
        keys[file] = key
    return keys


def _sanitized(stem: str) -> str:
    """A key of a path: letters of every script stay; spaces and what file systems reserve become "_"."""
    return re.sub(r'[\s\x00-\x1f/\\:*?"<>|]', "_", unicodedata.normalize("NFC", stem))


# --- a table of songs --------------------------------------------------------------------------------------


def songs_of_table(table: Path, findings: Findings) -> list[SourceSong]:
    """The rows of a .csv, .tsv, .jsonl or .ndjson file; columns may have any of several usual names."""
    text = _read_text(table, table.name, findings)
    read_rows = _csv_rows if table.suffix.lower() in (".csv", ".tsv") else _json_rows
    unused: dict[str, str] = {}
    songs = []
    for origin, row in read_rows(table, text, findings):
        song = _song_of_row(row, origin, table.parent, unused, findings)
        if song is not None:
            songs.append(song)
    findings.warnings += [
        f"{table.name}: the column {name!r} is not used, {why}" for name, why in unused.items()
    ]
    return songs


def _csv_rows(table: Path, text: str, findings: Findings) -> Iterator[tuple[str, dict[str, Any]]]:
    header = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    try:
        for number, row in enumerate(reader, start=1):
            origin = f"{table.name}, row {number}"
            if None in row:
                findings.problems.append(
                    f"{origin}: more cells than the header has; put quotes around texts with commas"
                )
            else:
                yield origin, row
    except csv.Error as error:
        findings.problems.append(f"{table.name}, line {reader.line_num}: {error}")


def _json_rows(table: Path, text: str, findings: Findings) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line:
            continue
        origin = f"{table.name}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            findings.problems.append(f"{origin}: not JSON ({error})")
            continue
        if isinstance(row, dict):
            yield origin, row
        else:
            findings.problems.append(f"{origin}: not a JSON object")


def _song_of_row(
    row: dict[str, Any], origin: str, folder: Path, unused: dict[str, str], findings: Findings
) -> SourceSong | None:
    """The song of one row of a table, or None if the row names no audio file."""
    cells, recaption_cells = _cells_by_column(row, unused)

    def text(column: str) -> str:
        return _text_cell(cells.get(column), column, origin, findings)

    filename = text("filename")
    if not filename:
        findings.problems.append(f"{origin}: names no audio file (column filename)")
        return None
    audio = Path(os.path.normpath(folder / filename))
    _check_readable(audio, f"{origin}: {filename}", findings)
    speaker_name = text("speaker_emb_path")
    speaker = Path(os.path.normpath(folder / speaker_name)) if speaker_name else None
    if speaker is not None:
        _check_readable(speaker, f"{origin}: {speaker_name}", findings)
    if isinstance(cells.get("tags"), list):
        tags = [_text_cell(tag, "tags", origin, findings) for tag in cells["tags"]]
    else:
        tags = _split_tags(text("tags"))
    if not any(tags):
        findings.warnings.append(f"{origin} ({filename}): no tags")
    # Files from elsewhere are stored under their own name.
    place = audio.relative_to(folder) if audio.is_relative_to(folder) else Path(audio.name)
    return SourceSong(
        origin=f"{origin} ({filename})",
        key=text("keys") or _sanitized(place.with_suffix("").as_posix()),
        audio=audio,
        audio_place=place.as_posix(),
        tags=[tag for tag in tags if tag],
        lyrics=text("norm_lyrics"),
        recaption=_recaption(recaption_cells, origin, findings)
        | _recaption(cells.get("recaption"), origin, findings),
        speaker=speaker,
        language=text("language").lower(),
    )


def _cells_by_column(row: dict[str, Any], unused: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cells by the dataset's names of the columns, and the cells of the columns `recaption_NAME` by NAME."""
    by_name = {name.strip().lower(): cell for name, cell in row.items()}
    cells = {}
    for column, names in _COLUMN_NAMES.items():
        present = [name for name in names if name in by_name]
        if present:
            cells[column] = by_name.pop(present[0])
        for name in present[1:]:
            del by_name[name]
            unused[name] = f"{present[0]!r} is taken instead"
    recaption = {
        name.removeprefix(_RECAPTION_PREFIX): by_name.pop(name)
        for name in list(by_name)
        if name.startswith(_RECAPTION_PREFIX)
    }
    unused.update(dict.fromkeys(by_name, "its name is unknown"))
    return cells, recaption


def _text_cell(cell: Any, column: str, origin: str, findings: Findings) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str) and _is_unicode(cell):
        return _clean(cell)
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    kind = "half of a surrogate pair" if isinstance(cell, str) else type(cell).__name__
    findings.problems.append(f"{origin}: {column} holds {kind}, not text")
    return ""


# --- texts and files ---------------------------------------------------------------------------------------


def _read_text(path: Path, origin: str, findings: Findings) -> str:
    """The cleaned text of a UTF-8 file; "" after a problem is noted."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        findings.problems.append(f"{origin}: not UTF-8 text (byte {error.start}), save it as UTF-8")
        return ""
    except OSError as error:
        findings.problems.append(f"{origin}: cannot be read ({error.strerror})")
        return ""
    if "\0" in text:
        findings.problems.append(f"{origin}: not UTF-8 text (it holds NUL bytes), save it as UTF-8")
        return ""
    return _clean(text)


def _clean(text: str) -> str:
    """Line ends as LF, no white space at the ends of lines, none at both ends of the text."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(line.rstrip() for line in lines).strip()


def _split_tags(text: str) -> list[str]:
    """Tags between commas or line ends; the full-width comma of Chinese and Japanese texts counts too."""
    return [tag.strip() for tag in re.split(r"[,，\n]", text) if tag.strip()]


def _recaption(recaption: Any, origin: str, findings: Findings) -> dict[str, str]:
    """Recaptions by name, blank ones dropped, from a dict or its JSON text."""
    if isinstance(recaption, str) and recaption.strip():
        try:
            recaption = json.loads(recaption)
        except json.JSONDecodeError as error:
            findings.problems.append(f"{origin}: its recaption is not JSON ({error})")
            return {}
    if not recaption:
        return {}
    if not isinstance(recaption, dict):
        findings.problems.append(f"{origin}: its recaption is not an object of names and texts")
        return {}
    texts = {
        name: _text_cell(text, f"recaption {name!r}", origin, findings) for name, text in recaption.items()
    }
    return {name: text for name, text in texts.items() if text}


def _is_unicode(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_readable(path: Path, origin: str, findings: Findings) -> None:
    if not os.path.exists(path):
        target = " (a broken link)" if os.path.islink(path) else ""
        findings.problems.append(f"{origin}: the file does not exist{target}")
    elif not os.path.isfile(path):
        findings.problems.append(f"{origin}: not a file")
    elif not os.access(path, os.R_OK):
        findings.problems.append(f"{origin}: the file may not be read (its permissions)")


# --- checks over all songs, and writing --------------------------------------------------------------------
