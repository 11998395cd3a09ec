"""Songs inside other files: tars (WebDataset), Parquet and Arrow files with an Audio column, saved datasets.

`prepare` unpacks them to a folder of audio files, which it then reads as any other. Nothing in them is run: tars give
regular files below the folder only, and no feature type of a dataset is decoded.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import posixpath
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from acestep_ray.data.audio_formats import AUDIO_SUFFIXES, TORCHCODEC_SUFFIXES
from acestep_ray.data.columnar import check_growth, checked, open_parquet, rows_at_once
from acestep_ray.data.fields import FILE_NAMES, plain_name
from acestep_ray.data.findings import Findings
from acestep_ray.data.schema import load_split, splits_of
from acestep_ray.data.tables import plain_columns
from acestep_ray.data.tars import NO_TAR, TarBombError, files_of_tar
from acestep_ray.errors import InputError
from acestep_ray.plain_files import JSON, read_limited
from acestep_ray.plain_json import load_json
from acestep_ray.storage import Store, StoredFile
from acestep_ray.storage.disk import full_disk_of
from acestep_ray.storage.scratch import scratch_folder
from acestep_ray.terminal import Progress

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_ARROW_SUFFIXES = (".parquet", ".arrow", ".feather")
_DATASET_FILES = ("dataset_dict.json", "state.json")
_ROWS_AT_ONCE = 8
_MOST_ROWS = 10_000_000
_MOST_PROBLEMS = 1000
_UNWRITABLE_NAMES = (
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.EINVAL,
    errno.EILSEQ,
)
# Bytes; a number and a suffix are put behind it, and file systems take 255.
_LONGEST_STEM = 200
_SUFFIX_OF_START = {b"fLaC": ".flac", b"OggS": ".ogg", b"RIFF": ".wav", b"ID3": ".mp3", b"FORM": ".aiff"}


@dataclass(frozen=True)
class Packed:
    """Files with songs inside."""

    kind: str
    """As a message names it: `a WebDataset`."""
    files: list[StoredFile]
    dataset: Path | None = None
    """A dataset that `datasets.save_to_disk` wrote."""


def find_packed(source: str) -> Packed | None:
    """The file or saved dataset at `source`, if it has songs inside; a folder is not looked into."""
    lower = source.lower()
    if lower.endswith((*TAR_SUFFIXES, *_ARROW_SUFFIXES)):
        file = StoredFile.at(source)
        if file.status() is not None:
            if lower.endswith(TAR_SUFFIXES):
                return Packed("a WebDataset", [file])
            return Packed("a table with audio inside", [file]) if _has_audio_inside(file) else None
    store = Store.at(source)
    if store.is_local and any(store.status(name) is not None for name in _DATASET_FILES):
        columns = _dataset_columns(store.path)
        if columns is None or "filename" in columns or not set(map(plain_name, columns)) & set(FILE_NAMES):
            return None
        return Packed("a Hugging Face dataset with audio inside", [], store.path)
    return None


def find_packed_in(folder: Store) -> Packed | None:
    """The files of a folder without audio files that have songs inside."""
    names = _names_in(folder)
    tars = [name for name in names if name.lower().endswith(TAR_SUFFIXES)]
    if tars:
        return Packed("a WebDataset", [folder.file(name) for name in tars])
    tables = [folder.file(name) for name in names if name.lower().endswith(_ARROW_SUFFIXES)]
    tables = [file for file in tables if _has_audio_inside(file)]
    return Packed("a Hugging Face dataset with audio inside", tables) if tables else None


def check_not_packed(packed: Packed | None, source: str) -> None:
    """Raise InputError for songs inside other files, which have no names that workers could open."""
    if packed is not None:
        raise InputError(
            f"the songs are inside other files ({packed.kind})",
            where=source,
            fix="unpack them first: acestep-ray prepare --data_dir … --output_dir DATASET, and give DATASET here",
        )


@contextlib.contextmanager
def unpacked(packed: Packed, output: Store, findings: Findings) -> Iterator[str]:
    """The songs as a folder, or a table of it, while inside; beside `output` if that is on this machine, so that the
    files can be moved there without a copy. What killed processes have left there is deleted."""
    with scratch_folder(output.path.parent if output.is_local else None, "unpacked") as folder:
        if packed.dataset is not None:
            yield str(_unpack_rows(_rows_of_dataset(packed.dataset), folder, findings))
        elif packed.files[0].name.lower().endswith(TAR_SUFFIXES):
            for file in Progress("unpacking", len(packed.files), "tars").over(packed.files):
                _unpack_tar(file, folder / _subfolder(file) if len(packed.files) > 1 else folder, findings)
            yield str(folder)
        else:
            yield str(_unpack_rows(_rows_of_files(packed.files, findings), folder, findings))


def _names_in(folder: Store) -> list[str]:
    """Names of files in a folder that are not hidden, sorted."""
    return [name for name in folder.names() if not any(part.startswith(".") for part in name.split("/"))]


# --- tars --------------------------------------------------------------------------------------------------


def _subfolder(file: StoredFile) -> str:
    name = file.name
    for suffix in TAR_SUFFIXES:
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name


def _unpack_tar(file: StoredFile, folder: Path, findings: Findings) -> None:
    try:
        with file.open() as content:
            for name, source in files_of_tar(content):
                if not _unpack_member(source, name, folder):
                    findings.group(
                        "has files with names that cannot be written, which are left out", file.name
                    )
    except TarBombError as error:
        findings.problems.append(f"{file.name}: {error}")
    except (tarfile.TarError, EOFError, OSError, *NO_TAR) as error:
        if full_disk_of(error) is not None:
            raise
        findings.problems.append(f"{file.name}: is damaged, cut off, or no tar ({error})")


def _unpack_member(source: IO[bytes], name: str, folder: Path) -> bool:
    """Write a file of a tar; False where it cannot have its name on this disk."""
    target = folder / name
    if "\0" in name:
        return False
    try:
        if os.path.lexists(target):
            return True
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as copy:
            shutil.copyfileobj(source, copy)
    except OSError as error:
        if error.errno in _UNWRITABLE_NAMES:
            return False
        raise
    return True


# --- tables with audio inside ------------------------------------------------------------------------------


def _audio_column(schema: pa.Schema) -> str | None:
    """The column that holds files' bytes: binary, or a struct with `bytes`, as Hugging Face's Audio is stored."""
    for name in FILE_NAMES:
        for field in schema:
            if plain_name(field.name) == name and _holds_bytes(field.type):
                return field.name
    return None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name in ("bytes", "array") for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _has_audio_inside(file: StoredFile) -> bool:
    """Whether the first rows of a table hold files' bytes, and not only their names."""
    try:
        _check_figures(file)
        for schema, batch in _batches(file):
            column = _audio_column(schema)
            if column is None:
                return False
            return any(
                _content_of(row[column])[0] is not None for row in checked(batch).slice(0, 1).to_pylist()
            )
    except (pa.ArrowException, OSError):
        pass  # reading it as a table says what is wrong
    return False


def _check_figures(file: StoredFile) -> None:
    """Raise ArrowInvalid for a Parquet file that unpacks to far more than it is."""
    if file.name.lower().endswith(".parquet"):
        with file.open() as content:
            size = content.seek(0, os.SEEK_END)
            content.seek(0)
            rows_at_once(open_parquet(content), size)


def _batches(file: StoredFile) -> Iterator[tuple[pa.Schema, pa.RecordBatch]]:
    with file.open() as content:
        if file.name.lower().endswith(".parquet"):
            parquet = pq.ParquetFile(content)
            names = plain_columns(parquet.schema_arrow)
            for batch in parquet.iter_batches(_ROWS_AT_ONCE):
                yield batch.select(names).schema, batch.select(names)
            return
        try:
            reader = pa.ipc.open_file(content)
            batches: Iterable[pa.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches))
        except pa.ArrowInvalid:
            content.seek(0)
            reader = batches = pa.ipc.open_stream(content)
        names = plain_columns(reader.schema)
        for whole in (batch.select(names) for batch in batches):
            for start in range(0, whole.num_rows, _ROWS_AT_ONCE):
                yield whole.schema, whole.slice(start, _ROWS_AT_ONCE)


def _rows_of_files(files: list[StoredFile], findings: Findings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with their audio column's name."""
    for file in Progress("unpacking", len(files), "files").over(files):
        try:
            yield from _rows_of_file(file)
        except (pa.ArrowException, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            findings.problems.append(f"{file.name}: is damaged, or no {file.suffix} file ({reason})")


def _rows_of_file(file: StoredFile) -> Iterator[tuple[str, dict[str, Any]]]:
    _check_figures(file)
    status, unpacked = file.status(), 0
    for schema, batch in _batches(file):
        unpacked += batch.nbytes
        check_growth(status.size if status else 0, unpacked)
        column = _audio_column(schema)
        if column is not None:
            for row in checked(batch).to_pylist():
                yield column, row


def _dataset_columns(directory: Path) -> list[str] | None:
    """Columns of a saved dataset, of its first split; None where that cannot be read, which opening it says."""
    try:
        first = next(iter(splits_of(directory, str(directory)).values()))
        info = load_json(read_limited(first / "dataset_info.json", JSON))
        return list(info["features"])
    except (InputError, OSError, ValueError, LookupError, TypeError, StopIteration):
        return None


def _rows_of_dataset(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of all splits of a saved dataset, its audio as stored."""
    for split in splits_of(directory, str(directory)):
        dataset = load_split(directory, split, str(directory)).with_format("arrow")
        for stored in Progress(f"unpacking {split}", len(dataset), "songs").over(dataset.iter(batch_size=1)):
            table = stored.select(plain_columns(stored.schema))
            column = _audio_column(table.schema)
            if column is None:
                column = next((name for name in table.schema.names if plain_name(name) in FILE_NAMES), None)
            if column is None:
                continue
            for row in table.to_pylist():
                yield column, row


def _unpack_rows(rows: Iterable[tuple[str, dict[str, Any]]], folder: Path, findings: Findings) -> Path:
    """Write the audio of rows as files, and all else as a table of JSON lines; returns the table."""
    table = folder / "songs.jsonl"
    taken: set[str] = set()
    with open(table, "w", encoding="utf-8") as lines:
        for number, (column, row) in enumerate(rows):
            if number >= _MOST_ROWS:
                findings.problems.append(f"more than {_MOST_ROWS:,} rows; give them in several parts")
                break
            try:
                content, name = _content_of(row.pop(column))
            except (ValueError, TypeError, OverflowError, RuntimeError, MemoryError) as error:
                findings.problems.append(f"row {number + 1}: its audio is no samples ({error})")
                if len(findings.problems) > _MOST_PROBLEMS:
                    break
                continue
            if content is not None:
                name = _file_name(name, content, number, taken)
                (folder / name).write_bytes(content)
            row["filename"] = name
            # Of no use, and perhaps of types that JSON has not.
            plain = {key: value for key, value in row.items() if not isinstance(value, bytes)}
            try:
                lines.write(json.dumps(plain, default=str, ensure_ascii=True) + "\n")
            except (ValueError, RecursionError):  # lists in lists in lists
                findings.problems.append(f"row {number + 1}: its fields are nested too deep")
    return table


def _content_of(cell: Any) -> tuple[bytes | None, str]:
    """The bytes in a cell of an audio column, or None, and the name that stands there."""
    if isinstance(cell, bytes):
        return cell, ""
    if not isinstance(cell, dict):
        return None, cell if isinstance(cell, str) else ""
    path = cell.get("path")
    name = path if isinstance(path, str) else ""
    if cell.get("bytes"):
        return cell["bytes"], name
    if cell.get("array") is not None and cell.get("sampling_rate"):
        return _wav(cell["array"], int(cell["sampling_rate"])), name
    return None, name


def _wav(samples: Any, sample_rate: int) -> bytes:
    """Decoded audio (samples,) or (channels, samples) as a WAV file of float32."""
    import numpy as np
    import soundfile

    content = io.BytesIO()
    soundfile.write(
        content, np.asarray(samples, dtype=np.float32).T, sample_rate, format="WAV", subtype="FLOAT"
    )
    return content.getvalue()


def _file_name(path: str, content: bytes, number: int, taken: set[str]) -> str:
    """A name within the folder, by the path that a row gives; its suffix is an audio file's."""
    base = posixpath.basename(path.replace("\\", "/").rstrip("/")).lstrip(".")
    base = "".join(character for character in base if character.isprintable())
    stem, suffix = posixpath.splitext(base)
    if suffix.lower() not in AUDIO_SUFFIXES | TORCHCODEC_SUFFIXES:
        by_content = [kind for start, kind in _SUFFIX_OF_START.items() if content.startswith(start)]
        stem, suffix = base, by_content[0] if by_content else ".mp3"
    stem = stem.encode()[:_LONGEST_STEM].decode(errors="ignore") or f"{number:06d}"
    name, again = f"{stem}{suffix}", 1
    while name.lower() in taken:
        again += 1
        name = f"{stem}-{again}{suffix}"
    taken.add(name.lower())
    return name
