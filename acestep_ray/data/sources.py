"""Songs as a user keeps them: a folder of audio with texts beside it, or a table of songs; local or in object storage.

What is wrong with one song is noted in it, what is wrong with the whole source in the findings; reading goes on, so
that all of it is told at once.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any

from acestep_ray.data.audio_formats import AUDIO_SUFFIXES, TORCHCODEC_SUFFIXES, UNSUPPORTED_SUFFIXES
from acestep_ray.data.fields import FILE_NAMES, SongTexts, cells_by_field, plain_name, read_texts
from acestep_ray.data.findings import Findings
from acestep_ray.data.layouts import V15
from acestep_ray.data.lyric_text import read_lyric_text
from acestep_ray.data.same_names import Names, find_file
from acestep_ray.data.sidecars import Sidecars
from acestep_ray.data.tables import key_is_musical, rows_of_table
from acestep_ray.data.texts import is_unicode, printable, text_of_cell
from acestep_ray.plain_files import SONG_LIST
from acestep_ray.storage import Store, StoredFile, expand_home, is_url

# A request for a small text is mostly waiting.
_READERS = 32
_SONGS_AT_ONCE = 1024
# Rows of a table by which it is decided what its column `key` means.
_FIRST_ROWS = 1000
_LISTED = 3


@dataclass
class SourceSong:
    """One song with its texts; the files are where the user keeps them."""

    origin: str  # the file or table row that a message names
    key: str
    filename: str  # relative to the source's folder, an absolute path, or a URL
    texts: SongTexts
    speaker: str  # as `filename`; "" for none
    problems: list[str]  # why the song cannot be used, each with the file or row


@dataclass
class _TableRow:
    """What a table inside a folder of songs says about one song."""

    table: str
    texts: SongTexts
    speaker: str
    problems: list[str] = field(default_factory=list)


def songs_of_folder(root: Store, findings: Findings, layout: str = "auto") -> Iterator[SourceSong]:
    """The audio files below `root`, each with the texts that are beside it or in tables of the folder.

    `layout` is one of `TEXT_LAYOUTS`: what the files `NAME.txt` hold.
    """
    # Names and not paths, which take kilobytes each: there may be millions.
    audio: list[str] = []
    others: list[str] = []
    suffixes = AUDIO_SUFFIXES | TORCHCODEC_SUFFIXES | UNSUPPORTED_SUFFIXES
    # In the order of paths: a folder's files lie together.
    for name in sorted(_names_in(root, findings), key=lambda name: name.replace("/", "\0")):
        is_audio = posixpath.splitext(name)[1].lower() in suffixes
        (audio if is_audio else others).append(name)
    sidecars = Sidecars(root, audio, others, layout)
    rows = _rows_of_tables_within(root, audio, sidecars.tables, findings) if audio else {}
    shared_keys = _shared_keys(audio)

    def read_song(name: str) -> tuple[SourceSong, Findings]:
        file, origin = PurePosixPath(name), printable(name)
        row = rows.get(name)
        problems = list(row.problems) if row else []
        notes = Findings()
        if not is_unicode(name):
            problems.append(f"{origin}: the file name is not valid UTF-8, rename it")
        if file.suffix.lower() in UNSUPPORTED_SUFFIXES:
            notes.warnings.append(f"{origin}: {file.suffix} is not read; convert it to FLAC, WAV or MP3")
        elif file.suffix.lower() in TORCHCODEC_SUFFIXES:
            notes.warnings.append(
                f"{origin}: {file.suffix} is read where torchcodec is installed; "
                "elsewhere convert it to FLAC, WAV or MP3"
            )
        texts = sidecars.texts_of(name, (row.table, row.texts) if row else None, problems, notes)
        texts.lyrics = _clean_lyrics(texts.lyrics, origin, notes)
        song = SourceSong(
            origin=origin,
            key=_key_of_file(name, shared_keys),
            filename=name,
            texts=texts,
            speaker=row.speaker if row else "",
            problems=problems,
        )
        return song, notes

    remaining = iter(audio)
    with ThreadPoolExecutor(_READERS) as pool:
        while some := list(islice(remaining, _SONGS_AT_ONCE)):
            for song, notes in pool.map(read_song, some):
                findings.add(notes)
                yield song
    findings.close_groups()
    findings.warnings += sidecars.left_over()


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


def _clean_lyrics(lyrics: str, origin: str, findings: Findings) -> str:
    """Lyrics without the times of LRC files and the like; what was changed is a warning."""
    text, notes = read_lyric_text(lyrics)
    findings.lyrics.add(origin, notes)
    return text


# --- a table of songs --------------------------------------------------------------------------------------


def songs_of_table(table: StoredFile, findings: Findings) -> Iterator[SourceSong]:
    """The rows of a table (see `TABLE_SUFFIXES`); columns may have any of several usual names."""
    folder = StoredFile.at(table.url).store
    name = PurePosixPath(table.name).name
    unused: dict[str, str] = {}
    elsewhere = FilesBelow(folder)
    for origin, row, is_musical in _rows_with_meaning(table, findings):
        song = song_of_row(row, origin, folder, unused, findings, is_musical, elsewhere)
        if song is not None:
            findings.layouts[findings.kinds_of_tables.get(name, f"a table ({name})")] += 1
            yield song
    findings.close_groups()
    findings.warnings += [
        f"{table.name}: the column {name!r} is not used, {why}" for name, why in unused.items()
    ]


def _rows_with_meaning(table: StoredFile, findings: Findings) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Rows of a table, and whether their column `key` is a musical key."""
    rows = rows_of_table(table, findings)
    first = list(islice(rows, _FIRST_ROWS))
    is_musical = key_is_musical([row for _, row in first])
    for origin, row in chain(first, rows):
        yield origin, row, is_musical


class FilesBelow:
    """Audio files in a local folder by their own names, listed when they are first asked for."""

    def __init__(self, folder: Store):
        self._folder = folder
        self._names: dict[str, list[str]] | None = None

    def find(self, name: str) -> str | None:
        """The one file below the folder with this name; None where there are none or several."""
        if not self._folder.is_local:
            return None
        if self._names is None:
            self._names = {}
            for path in _walk(self._folder.url, Findings()):
                self._names.setdefault(posixpath.basename(path), []).append(path)
        found = self._names.get(name, [])
        return found[0] if len(found) == 1 else None


def song_of_row(
    row: dict[str, Any],
    origin: str,
    folder: Store,
    unused: dict[str, str],
    findings: Findings,
    is_musical: bool,
    elsewhere: FilesBelow,
) -> SourceSong | None:
    """The song of one row of a table, or None if the row names no audio file."""
    problems: list[str] = []
    names = _file_names_of(row, origin, problems)
    if not names:
        findings.problems += problems
        findings.problems.append(f"{origin}: names no audio file (column filename)")
        return None
    filename = _existing_of(names, folder, elsewhere)
    cells, recaption = cells_by_field(row, unused, is_musical)
    where = f"{origin} ({filename})"
    texts = read_texts(cells, recaption, origin, problems, findings.warnings)
    texts.lyrics = _clean_lyrics(texts.lyrics, where, findings)
    if not texts.tags and not texts.caption:
        findings.warnings.append(f"{where}: no tags")
    key = text_of_cell(cells.get("keys"), "keys", origin, problems)
    return SourceSong(
        origin=where,
        key=key or _sanitized(posixpath.splitext(place_of(filename, folder))[0]),
        filename=filename,
        texts=texts,
        speaker=expand_home(
            text_of_cell(cells.get("speaker_emb_path"), "speaker_emb_path", origin, problems)
        ),
        problems=problems,
    )


def _file_names_of(row: Mapping[str, Any], origin: str, problems: list[str]) -> list[str]:
    """The audio files that a row names, in the order of `FILE_NAMES`; usually one, sometimes a path and a name."""
    by_name = {plain_name(name): cell for name, cell in row.items()}
    names = []
    for column in FILE_NAMES:
        cell = by_name.get(column)
        if isinstance(cell, dict) and isinstance(cell.get("path"), str):
            cell = cell["path"]  # an Audio column of Hugging Face's datasets
        if name := text_of_cell(cell, "filename", origin, problems):
            names.append(expand_home(name))
    return names


def _existing_of(names: list[str], folder: Store, elsewhere: FilesBelow) -> str:
    """The file name of a row that leads to a file; the first where none does.

    Tables that were moved with their songs name places of another machine, of another system (with backslashes), or
    relative to a folder above: the file of this name in the table's folder is taken, where there is one only.
    """
    if not folder.is_local:
        return names[0]
    for name in names:
        if is_url(name):
            return name
        for written in dict.fromkeys((name, name.replace("\\", "/"))):
            path = os.path.normpath(os.path.join(folder.url, written))
            if os.path.exists(path):
                return written
            inside = path.removeprefix(f"{folder.url.rstrip('/')}/")
            if inside != path and (found := find_file(folder.file(inside))).name != inside:
                return found.name
    for name in names:
        written = name.replace("\\", "/")
        base = posixpath.basename(written)
        if (os.path.isabs(written) or written != base or re.match(r"[A-Za-z]:/", written)) and (
            found_below := elsewhere.find(base)
        ):
            return found_below
    return names[0]


def place_of(filename: str, folder: Store) -> str:
    """Where a file of a table lies in the table's folder; of a file from elsewhere, its own name."""
    if not is_url(filename):
        filename = posixpath.normpath(posixpath.join(folder.url if folder.is_local else "", filename))
    is_absolute = is_url(filename) or filename.startswith("/")
    inside = filename.removeprefix(f"{folder.url.rstrip('/')}/")
    if (is_absolute and inside == filename) or inside.startswith("../"):
        return posixpath.basename(filename)
    return inside


# --- tables within a folder of songs -----------------------------------------------------------------------


def _rows_of_tables_within(
    root: Store, audio: list[str], tables: list[str], findings: Findings
) -> dict[str, _TableRow]:
    """What tables within a folder of songs say of its songs, by the name of the audio file.

    Any file with songs counts: `metadata.csv` of a Hugging Face audiofolder, ACE-Step 1.5's CSV and dataset JSON. A
    table none of whose rows names a song of the folder is left aside.
    """
    rows: dict[str, _TableRow] = {}
    if not tables:
        return rows
    names = Names(audio)
    by_base: dict[str, list[str]] = {}
    for name in audio:
        by_base.setdefault(posixpath.basename(name), []).append(name)
    bases = Names(base for base, found in by_base.items() if len(found) == 1)
    # Of several tables the first wins, and Hugging Face's is written for this.
    for table in sorted(tables, key=lambda name: not posixpath.basename(name).startswith("metadata.")):
        status = root.status(table)
        if status is None:
            findings.group("is no regular file, and is not read", printable(table))
            continue
        if status.size > SONG_LIST.size:
            findings.group(
                f"is not read as a table of songs: it is larger than {SONG_LIST.size >> 20} MB",
                printable(table),
            )
            continue
        own = Findings()
        unused: dict[str, str] = {}
        found: dict[str, _TableRow] = {}
        missing: list[str] = []
        file = root.file(table)
        columns: set[str] = set()
        for origin, row, is_musical in _rows_with_meaning(file, own):
            columns = columns or {plain_name(name) for name in row}
            problems: list[str] = []
            given = _file_names_of(row, origin, problems)
            place = _song_named(given, posixpath.dirname(table), root, names, bases, by_base)
            if place is None:
                missing += given[:1]
                continue
            cells, recaption = cells_by_field(row, unused, is_musical)
            speaker = text_of_cell(cells.get("speaker_emb_path"), "speaker_emb_path", origin, problems)
            found[place] = _TableRow(
                table=table,
                texts=read_texts(cells, recaption, origin, problems, own.warnings),
                speaker=_beside(speaker, table),
                problems=problems,
            )
        if not found:
            continue
        findings.warnings += own.problems + own.warnings
        findings.warnings += [
            f"{printable(table)}: the column {name!r} is not used, {why}" for name, why in unused.items()
        ]
        if missing:
            more = ", …" if len(missing) > _LISTED else ""
            findings.warnings.append(
                f"{printable(table)}: {len(missing)} rows name no audio file of the folder "
                f"({', '.join(missing[:_LISTED])}{more})"
            )
        kind = own.kinds_of_tables.get(posixpath.basename(table), _kind_of_table(table, columns))
        for row_of_song in found.values():
            row_of_song.table = kind if kind == V15 else f"{kind} ({printable(table)})"
        for place, row_of_song in found.items():
            earlier = rows.setdefault(place, row_of_song)
            if earlier is not row_of_song and earlier.texts.filled_with(row_of_song.texts):
                findings.group(
                    f"{earlier.table}, which is used, and {row_of_song.table} differ", printable(place)
                )
    return rows


def _kind_of_table(table: str, columns: set[str]) -> str:
    """What a table within a folder of songs is called."""
    if "file" in columns and columns & {"bpm", "key", "caption"}:
        return V15
    if "file_name" in columns and posixpath.basename(table).startswith("metadata."):
        return "a Hugging Face audiofolder"
    return "a table"


def _song_named(
    given: list[str],
    table_folder: str,
    root: Store,
    names: Names,
    bases: Names,
    by_base: dict[str, list[str]],
) -> str | None:
    """The audio file of the folder that a row of a table in `table_folder` names, by its path or else by its name."""
    for name in given:
        written = name.replace("\\", "/") if "/" not in name else name
        inside = written.removeprefix(f"{root.url.rstrip('/')}/")
        for place in (posixpath.normpath(posixpath.join(table_folder, inside)), posixpath.normpath(inside)):
            if found := names.find(place):
                return found
    for name in given:
        base = bases.find(posixpath.basename(name.replace("\\", "/")))
        if base is not None:
            return by_base[base][0]
    return None


def _beside(speaker: str, table: str) -> str:
    """A file that a table in a folder names, relative to the folder of songs."""
    if not speaker or is_url(speaker) or speaker.startswith(("/", "~")):
        return expand_home(speaker)
    return posixpath.normpath(posixpath.join(posixpath.dirname(table), speaker))
