"""Songs in a folder, a CSV or a JSON-lines file become a dataset that holds everything it needs.

Everything is read and checked first; if anything is wrong, every problem is told at once and nothing is written.
Audio is not decoded here: a damaged file becomes a reject of the feature cache.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Dataset, DatasetDict, disable_progress_bars

from acestep_ray.config import PrepareConfig
from acestep_ray.data.audio import AUDIO_SUFFIXES, UNSUPPORTED_SUFFIXES
from acestep_ray.data.schema import dataset_features
from acestep_ray.errors import InputError

MARKER = "prepare.json"
"""File in a dataset directory that says it was written here, and from what."""

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

_OUR_ENTRIES = re.compile(
    r"audio|speakers|train|test|prepare\.json|state\.json|dataset_info\.json|dataset_dict\.json"
    r"|(data|cache)-.*\.arrow"
)

_SHOWN_WARNINGS = 20


@dataclass(frozen=True)
class PrepareSummary:
    """What `prepare_dataset` wrote. `splits` counts rows; `warnings` name the file each is about."""

    output_dir: str
    songs: int
    rows: int
    splits: dict[str, int]
    without_lyrics: int
    warnings: list[str]

    def render(self) -> str:
        """The summary in a few lines for a terminal; the first 20 warnings are shown."""
        splits = ", ".join(f"{rows} {name}" for name, rows in self.splits.items())
        lines = [
            f"songs: {self.songs} ({self.without_lyrics} without lyrics), rows: {splits}, in {self.output_dir}"
        ]
        if self.warnings:
            lines.append(f"warnings: {len(self.warnings)}")
            lines += [f"  - {warning}" for warning in self.warnings[:_SHOWN_WARNINGS]]
        if len(self.warnings) > _SHOWN_WARNINGS:
            lines.append(f"  … and {len(self.warnings) - _SHOWN_WARNINGS} more")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Song:
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
class _Findings:
    """Problems stop the job; warnings are told in its summary."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def prepare_dataset(config: PrepareConfig) -> PrepareSummary:
    """Writes the dataset of `config.data_dir` to `config.output_dir`, whole or not at all.

    The audio files are hard-linked (copied, where that is not possible) below `audio/`, speaker embeddings
    below `speakers/`. A dataset that an earlier call wrote there is replaced.

    Raises InputError with every problem and its file: a missing audio file, a duplicate key, a text that is
    not UTF-8, no songs at all.
    """
    source, output = Path(config.data_dir).resolve(), Path(config.output_dir).resolve()
    _check_settings(config, source)
    _check_output(source, output)
    findings = _Findings()
    songs = _songs_of_folder(source, findings) if source.is_dir() else _songs_of_table(source, findings)
    if not songs and not findings.problems:
        raise InputError("there are no songs", where=str(source), fix=_expected_in(source))
    _check_keys(songs, findings)
    _stop_on_problems(findings, source)
    test_keys = _choose_test_songs([song.key for song in songs], config.test_fraction, config.seed)
    if not sys.stderr.isatty():
        disable_progress_bars()  # of `datasets`: they fill a log with lines
    splits = _write(songs, test_keys, config, output)
    return PrepareSummary(
        output_dir=str(output),
        songs=len(songs),
        rows=sum(splits.values()),
        splits=splits,
        without_lyrics=sum(not song.lyrics for song in songs),
        warnings=findings.warnings,
    )


def _check_settings(config: PrepareConfig, source: Path) -> None:
    if config.repeat_count < 1:
        raise InputError("--repeat_count must be at least 1", where=str(config.repeat_count))
    if not 0 <= config.test_fraction < 1:
        raise InputError("--test_fraction must be at least 0 and below 1", where=str(config.test_fraction))
    # os.path throughout: the methods of Path raise where a folder above may not be entered.
    if not os.path.exists(source):
        raise InputError("--data_dir does not exist", where=str(source))
    is_table = os.path.isfile(source) and source.suffix.lower() in TABLE_SUFFIXES
    if not (is_table or os.path.isdir(source)):
        raise InputError(
            "--data_dir is neither a folder nor a table of songs",
            where=str(source),
            fix=f"give a folder of songs or a {', '.join(TABLE_SUFFIXES)} file",
        )


def _check_output(source: Path, output: Path) -> None:
    inside = source.is_relative_to(output) or (source.is_dir() and output.is_relative_to(source))
    if inside:
        raise InputError(
            "--data_dir and --output_dir lie inside each other",
            where=f"{source} and {output}",
            fix="write the dataset to a directory of its own, outside the songs",
        )
    if not os.path.exists(output):
        return
    if not os.path.isdir(output):
        raise InputError("--output_dir is a file", where=str(output), fix="give a directory")
    try:
        entries = sorted(name for name in os.listdir(output) if not name.startswith("."))
    except OSError as error:
        raise InputError(f"--output_dir cannot be read ({error.strerror})", where=str(output)) from None
    foreign = [name for name in entries if not _OUR_ENTRIES.fullmatch(name)]
    if entries and (foreign or MARKER not in entries):
        found = foreign or entries
        raise InputError(
            "--output_dir holds files that `acestep-ray prepare` did not write",
            where=f"{output} ({', '.join(found[:5])}{', …' if len(found) > 5 else ''})",
            fix="move them, or give a new directory: an earlier dataset would be replaced whole",
        )


def _expected_in(source: Path) -> str:
    if source.is_dir():
        return (
            "put audio files there (.wav, .flac, .mp3, .ogg, .opus, .aiff), each with NAME_prompt.txt "
            "and NAME_lyrics.txt beside it"
        )
    return "write one row for each song, with at least the column filename"


# --- a folder of songs -------------------------------------------------------------------------------------


def _songs_of_folder(root: Path, findings: _Findings) -> list[_Song]:
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
            _Song(
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


def _walk(root: Path, findings: _Findings) -> Iterator[PurePosixPath]:
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


def _songs_of_table(table: Path, findings: _Findings) -> list[_Song]:
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


def _csv_rows(table: Path, text: str, findings: _Findings) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _json_rows(table: Path, text: str, findings: _Findings) -> Iterator[tuple[str, dict[str, Any]]]:
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
    row: dict[str, Any], origin: str, folder: Path, unused: dict[str, str], findings: _Findings
) -> _Song | None:
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
    return _Song(
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


def _text_cell(cell: Any, column: str, origin: str, findings: _Findings) -> str:
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


def _read_text(path: Path, origin: str, findings: _Findings) -> str:
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


def _recaption(recaption: Any, origin: str, findings: _Findings) -> dict[str, str]:
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


def _check_readable(path: Path, origin: str, findings: _Findings) -> None:
    if not os.path.exists(path):
        target = " (a broken link)" if os.path.islink(path) else ""
        findings.problems.append(f"{origin}: the file does not exist{target}")
    elif not os.path.isfile(path):
        findings.problems.append(f"{origin}: not a file")
    elif not os.access(path, os.R_OK):
        findings.problems.append(f"{origin}: the file may not be read (its permissions)")


# --- checks over all songs, and writing --------------------------------------------------------------------


def _check_keys(songs: list[_Song], findings: _Findings) -> None:
    origins: dict[str, list[str]] = defaultdict(list)
    for song in songs:
        origins[song.key].append(song.origin)
    findings.problems += [
        f"{', '.join(sharing)}: duplicate key {key!r}" for key, sharing in origins.items() if len(sharing) > 1
    ]


def _stop_on_problems(findings: _Findings, source: Path) -> None:
    if findings.problems:
        count = len(findings.problems)
        listed = "".join(f"\n  - {problem}" for problem in findings.problems)
        raise InputError(
            f"{count} problem{'s' * (count > 1)} in the songs, nothing was written",
            where=f"{source}{listed}",
            fix="correct this and run prepare again",
        )


def _choose_test_songs(keys: list[str], fraction: float, seed: int) -> set[str]:
    """Keys of the songs in the test split: at least one, and never all."""
    if fraction == 0:
        return set()
    if len(keys) < 2:
        raise InputError("one song cannot be split", where="--test_fraction", fix="set it to 0 or add songs")
    count = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    return set(sorted(keys, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())[:count])


def _write(songs: list[_Song], test_keys: set[str], config: PrepareConfig, output: Path) -> dict[str, int]:
    """Writes a dataset beside `output` and renames it into place; returns the number of rows of each split."""
    partial = output.with_name(f".{output.name}.partial")
    previous = output.with_name(f".{output.name}.previous")
    try:
        _remove(partial)
        partial.mkdir(parents=True)
        splits = _write_into(partial, songs, test_keys, config)
        if os.path.exists(output):
            _remove(previous)
            output.rename(previous)
        partial.rename(output)
        _remove(previous)
    except OSError as error:
        raise InputError(
            f"the dataset cannot be written ({error.strerror or error})",
            where=str(output),
            fix="check the permissions and the free space there",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _put_back(previous, output)
    return splits


def _put_back(previous: Path, output: Path) -> None:
    """Undoes the first of the two renames, if a failure came between them, now or in an earlier run."""
    if os.path.exists(previous) and not os.path.exists(output):
        previous.rename(output)


def _remove(directory: Path) -> None:
    if os.path.exists(directory):
        shutil.rmtree(directory)


def _write_into(
    directory: Path, songs: list[_Song], test_keys: set[str], config: PrepareConfig
) -> dict[str, int]:
    audio, speakers = _FileStore(directory, "audio"), _FileStore(directory, "speakers")
    recaption_names = {name for song in songs for name in song.recaption}
    language = any(song.language for song in songs)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for song in songs:
        row = {
            "filename": audio.add(song.audio, song.audio_place),
            "tags": song.tags,
            "norm_lyrics": song.lyrics,
            "speaker_emb_path": speakers.add(song.speaker, song.speaker.name) if song.speaker else "",
            "recaption": song.recaption,  # a dict in every row, also without recaptions: readers call its methods
        }
        if language:
            row["language"] = song.language
        split = rows["test" if song.key in test_keys else "train"]
        split.extend({"keys": key} | row for key in _repeated_keys(song.key, config.repeat_count))
    features = dataset_features(recaption_names, language=language)
    if test_keys:
        splits = {name: Dataset.from_list(split, features=features) for name, split in rows.items()}
        DatasetDict(splits).save_to_disk(directory)
    else:
        del rows["test"]
        Dataset.from_list(rows["train"], features=features).save_to_disk(directory)
    counts = {name: len(split) for name, split in rows.items()}
    marker = {"format": 1, "settings": asdict(config), "songs": len(songs), "rows": counts}
    (directory / MARKER).write_text(json.dumps(marker, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return counts


def _repeated_keys(key: str, repeat_count: int) -> list[str]:
    return [key] if repeat_count == 1 else [f"{key}_{i:04d}" for i in range(1, repeat_count + 1)]


class _FileStore:
    """Puts files into one folder of a dataset, each once, under names that do not collide."""

    def __init__(self, dataset_dir: Path, folder: str):
        self._root = dataset_dir
        self._folder = folder
        self._places: dict[Path, str] = {}

    def add(self, source: Path, place: str) -> str:
        """Path of `source` in the dataset, relative to its directory; near `place` in the folder."""
        if source not in self._places:
            wanted = PurePosixPath(self._folder, place)
            stored, number = wanted, 1
            while (self._root / stored).exists():
                number += 1
                stored = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
            self._places[source] = str(stored)
            target = self._root / stored
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source, target)
        return self._places[source]


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links, or somebody else's file
        shutil.copyfile(source, target)
