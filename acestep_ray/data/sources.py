"""Songs as a user keeps them: a folder of audio with texts beside it, or a table of songs; local or in object storage.

What is wrong with one song is noted in it, what is wrong with the whole source in the findings; reading goes on, so
that all of it is told at once.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from acestep_ray.data.audio_formats import AUDIO_SUFFIXES, TORCHCODEC_SUFFIXES, UNSUPPORTED_SUFFIXES
from acestep_ray.data.texts import is_unicode, printable, read_text, recaptions_of, split_tags, text_of_cell
from acestep_ray.storage import Store, StoredFile, is_url

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


# A request for a small text is mostly waiting.
_READERS = 32
_SONGS_AT_ONCE = 1024

# Python's own limit for a cell, 128 K characters, is less than some lyrics.
_LONGEST_CELL = 2**26


@dataclass(frozen=True)
class SourceSong:
    """One song with its texts; the files are where the user keeps them."""

    origin: str  # the file or table row that a message names
    key: str
    filename: str  # relative to the source's folder, an absolute path, or a URL
    tags: list[str]
    lyrics: str
    recaption: dict[str, str]
    speaker: str  # as `filename`; "" for none
    language: str
    problems: list[str]  # why the song cannot be used, each with the file or row


@dataclass
class Findings:
    """Problems are those of the whole source and stop the job; warnings are told in its summary."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def songs_of_folder(root: Store, findings: Findings) -> Iterator[SourceSong]:
    """The audio files below `root`, each with the prompt, lyrics and recaptions that lie beside it."""
    # Names and not paths, which take kilobytes each: there may be millions.
    texts: dict[str, str] = {}
    audio: list[str] = []
    suffixes = AUDIO_SUFFIXES | TORCHCODEC_SUFFIXES | UNSUPPORTED_SUFFIXES
    # In the order of paths: a folder's files lie together.
    for name in sorted(_names_in(root, findings), key=lambda name: name.replace("/", "\0")):
        if posixpath.splitext(name)[1].lower() in suffixes:
            audio.append(name)
        for ending in _TEXT_ENDINGS:
            if name.lower().endswith(ending):
                texts[name[: -len(ending)] + ending] = name
    used: set[str] = set()
    shared_keys = _shared_keys(audio)

    def read_song(name: str) -> tuple[SourceSong, list[str]]:
        file, origin = PurePosixPath(name), printable(name)
        problems: list[str] = []
        warnings: list[str] = []

        def read_beside(endings: tuple[str, ...]) -> str | None:
            for ending in endings:
                text = texts.get(f"{file.with_suffix('')}{ending}")
                if text is not None:
                    used.add(text)
                    return read_text(root.file(text), printable(text), problems)
            return None

        if not is_unicode(name):
            problems.append(f"{origin}: the file name is not valid UTF-8, rename it")
        if file.suffix.lower() in UNSUPPORTED_SUFFIXES:
            warnings.append(f"{origin}: {file.suffix} is not read; convert it to FLAC, WAV or MP3")
        elif file.suffix.lower() in TORCHCODEC_SUFFIXES:
            warnings.append(
                f"{origin}: {file.suffix} is read where torchcodec is installed; "
                "elsewhere convert it to FLAC, WAV or MP3"
            )
        prompt = read_beside(_PROMPT_ENDINGS)
        if not prompt:
            state = "no prompt" if prompt is None else "an empty prompt"
            warnings.append(
                f"{origin}: {state}; {printable(file.stem)}_prompt.txt would hold its tags, with commas between them"
            )
        lyrics = read_beside(_LYRICS_ENDINGS) or ""
        recaption = recaptions_of(read_beside(_RECAPTION_ENDINGS), origin, problems)
        song = SourceSong(
            origin=origin,
            key=_key_of_file(name, shared_keys),
            filename=name,
            tags=split_tags(prompt or ""),
            lyrics=lyrics,
            recaption=recaption,
            speaker="",
            language="",
            problems=problems,
        )
        return song, warnings

    remaining = iter(audio)
    with ThreadPoolExecutor(_READERS) as pool:
        while some := list(islice(remaining, _SONGS_AT_ONCE)):
            for song, warnings in pool.map(read_song, some):
                findings.warnings += warnings
                yield song
    findings.warnings += [
        f"{printable(file)}: belongs to no song, since no audio file has its name"
        for file in sorted(set(texts.values()) - used)
    ]


def _names_in(root: Store, findings: Findings) -> Iterator[str]:
    """Every file below `root` that is not hidden, relative to it."""
    if root.is_local:
        yield from _walk(root.url, findings)
        return
    for name in root.names():
        if not any(part.startswith(".") for part in name.split("/")):
            yield name


def _walk(root: str, findings: Findings) -> Iterator[str]:
    """As `_names_in`, on this machine: linked folders are followed, each once."""

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
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root)


def _key_of_file(name: str, shared: set[str]) -> str:
    """A key made of the path without suffix; of distinct paths that would give one key, each gets a hash."""
    stem = _printable_stem(name)
    key = _sanitized(stem)
    return f"{key}_{hashlib.sha256(stem.encode()).hexdigest()[:8]}" if key in shared else key


def _shared_keys(files: list[str]) -> set[str]:
    """Keys that distinct paths without suffix would give."""
    counts = Counter(map(_sanitized, set(map(_printable_stem, files))))
    return {key for key, count in counts.items() if count > 1}


def _printable_stem(name: str) -> str:
    return printable(PurePosixPath(name).with_suffix(""))


def _sanitized(stem: str) -> str:
    """A key of a path: letters of every script stay; spaces and what file systems reserve become "_"."""
    return re.sub(r'[\s\x00-\x1f/\\:*?"<>|]', "_", unicodedata.normalize("NFC", stem))


# --- a table of songs --------------------------------------------------------------------------------------


def songs_of_table(table: StoredFile, findings: Findings) -> Iterator[SourceSong]:
    """The rows of a .csv, .tsv, .jsonl or .ndjson file; columns may have any of several usual names."""
    read_rows = _csv_rows if table.suffix in (".csv", ".tsv") else _json_rows
    folder = StoredFile.at(table.url).store
    unused: dict[str, str] = {}
    try:
        with table.open() as file:
            for origin, row in read_rows(PurePosixPath(table.name).name, file, findings):
                song = _song_of_row(row, origin, folder, unused, findings)
                if song is not None:
                    yield song
    except OSError as error:
        findings.problems.append(f"{table.name}: cannot be read ({error.strerror or error})")
    findings.warnings += [
        f"{table.name}: the column {name!r} is not used, {why}" for name, why in unused.items()
    ]


def _csv_rows(table: str, file: BinaryIO, findings: Findings) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = iter(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    number = 0
    try:
        header = next((line for line in lines if line.strip()), "")
        reader = csv.DictReader(chain([header], _without_nul(lines)), delimiter=max(",;\t", key=header.count))
        columns = [name.strip().lower() for name in reader.fieldnames or ()]
        if columns and not set(columns) & set(_COLUMN_NAMES["filename"]):
            findings.problems.append(f"{table}: has no column filename; it has {', '.join(columns)}")
            return
        with _long_cells():
            for number, row in enumerate(reader, start=1):
                origin = f"{table}, row {number}"
                if None in row:
                    findings.problems.append(
                        f"{origin}: more cells than the header has; put quotes around texts with commas"
                    )
                else:
                    yield origin, row
    except UnicodeDecodeError:
        findings.problems.append(f"{table}: not UTF-8 text (after row {number}), save it as UTF-8")
    except csv.Error as error:
        findings.problems.append(f"{table}, row {number + 1}: {error}")


def _without_nul(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if "\0" in line:
            raise csv.Error("not UTF-8 text (it holds NUL bytes), save it as UTF-8")
        yield line


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _json_rows(table: str, file: BinaryIO, findings: Findings) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        origin = f"{table}, line {number}"
        try:
            text = line.decode("utf-8-sig").strip()
            row = json.loads(text) if text else None
        except UnicodeDecodeError as error:
            findings.problems.append(f"{origin}: not UTF-8 text (byte {error.start}), save it as UTF-8")
            continue
        except (json.JSONDecodeError, RecursionError) as error:
            findings.problems.append(f"{origin}: not JSON ({error})")
            continue
        if isinstance(row, dict):
            yield origin, row
        elif text:
            findings.problems.append(f"{origin}: not a JSON object")


def _song_of_row(
    row: dict[str, Any], origin: str, folder: Store, unused: dict[str, str], findings: Findings
) -> SourceSong | None:
    """The song of one row of a table, or None if the row names no audio file."""
    cells, recaption_cells = _cells_by_column(row, unused)
    problems: list[str] = []

    def text(column: str) -> str:
        return text_of_cell(cells.get(column), column, origin, problems)

    filename = text("filename")
    if not filename:
        findings.problems += problems
        findings.problems.append(f"{origin}: names no audio file (column filename)")
        return None
    if isinstance(cells.get("tags"), list):
        tags = [text_of_cell(tag, "tags", origin, problems) for tag in cells["tags"]]
    else:
        tags = split_tags(text("tags"))
    if not any(tags):
        findings.warnings.append(f"{origin} ({filename}): no tags")
    return SourceSong(
        origin=f"{origin} ({filename})",
        key=text("keys") or _sanitized(posixpath.splitext(place_of(filename, folder))[0]),
        filename=filename,
        tags=[tag for tag in tags if tag],
        lyrics=text("norm_lyrics"),
        recaption=recaptions_of(recaption_cells, origin, problems)
        | recaptions_of(cells.get("recaption"), origin, problems),
        speaker=text("speaker_emb_path"),
        language=text("language").lower(),
        problems=problems,
    )


def place_of(filename: str, folder: Store) -> str:
    """Where a file of a table lies in the table's folder; of a file from elsewhere, its own name."""
    if not is_url(filename):
        filename = posixpath.normpath(posixpath.join(folder.url if folder.is_local else "", filename))
    is_absolute = is_url(filename) or filename.startswith("/")
    inside = filename.removeprefix(f"{folder.url.rstrip('/')}/")
    if (is_absolute and inside == filename) or inside.startswith("../"):
        return posixpath.basename(filename)
    return inside


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
