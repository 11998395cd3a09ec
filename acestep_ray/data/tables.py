"""Tables of songs: CSV, JSON and Parquet files as rows, one dict a song.

What is wrong with the table goes to the findings; rows that can be read are read all the same.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TextIO

import pyarrow as pa

from acestep_ray.data import metas
from acestep_ray.data.columnar import open_parquet, rows_at_once, short
from acestep_ray.data.fields import FILE_NAMES, plain_name
from acestep_ray.data.findings import Findings
from acestep_ray.data.layouts import V15_JSON, sample_fields
from acestep_ray.plain_files import LINE, SONG_LIST, TABLE, read_open
from acestep_ray.plain_json import load_json
from acestep_ray.plain_text import decode_text, encoding_of
from acestep_ray.storage import StoredFile

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather")

_MOST_COLUMNS = 4096
_MOST_ROWS = 10_000_000
# Problems of one table after which it is not read any further.
_MOST_PROBLEMS = 1000
_SHOWN_COLUMNS = 20
_TOO_LONG = f"longer than {LINE.size >> 20} MB, the limit of a table's rows"
_DELIMITERS = ",;\t|"
_EXCELS_LINE = re.compile(r"\s*\"?sep=(.)\"?\s*", re.IGNORECASE)
_TELLING = re.compile(r"[\s#♯♭]|m$|maj|min", re.IGNORECASE)

Row = tuple[str, dict[str, Any]]
"""Where a row is from, as a message names it, and its cells by the names of its columns."""


def rows_of_table(table: StoredFile, findings: Findings) -> Iterator[Row]:
    """The rows of a table, by its suffix. The delimiter of a CSV is found by its header or Excel's line `sep=;`;
    UTF-8, and UTF-16 with a byte order mark, are read."""
    name = PurePosixPath(table.name).name
    readers: dict[str, Callable[[str, BinaryIO, Findings], Iterator[Row]]] = {
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".parquet": _parquet_rows,
        ".arrow": _arrow_rows,
        ".feather": _arrow_rows,
    }
    before = len(findings.problems)
    try:
        with table.open() as file:
            _check_size(file, table.name)
            rows = readers.get(table.suffix, _json_rows)(name, file, findings)
            for number, row in enumerate(rows, start=1):
                if number > _MOST_ROWS:
                    findings.problems.append(
                        f"{name}: more than {_MOST_ROWS:,} rows; give it in several tables"
                    )
                    return
                yield row
                if len(findings.problems) - before > _MOST_PROBLEMS:
                    findings.problems.append(
                        f"{name}: the rows behind these {_MOST_PROBLEMS:,} problems are not read"
                    )
                    return
    except OSError as error:
        findings.problems.append(f"{table.name}: cannot be read ({error.strerror or error})")
    # Arrow allocates what a damaged file declares.
    except (pa.ArrowException, OverflowError, UnicodeDecodeError, MemoryError) as error:
        reason = (str(error).splitlines() or ["it declares more than there is memory"])[0]
        findings.problems.append(f"{name}: is damaged or no {table.suffix} file ({reason})")


def _check_size(file: BinaryIO, name: str) -> None:
    """Raise OSError for a table of more bytes than any that is read."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size > TABLE.size:
        raise TABLE.error(name)


def what_to_give(source: str) -> str:
    """Advice for a file that is no table of songs."""
    suffix = PurePosixPath(source).suffix.lower()
    if suffix in (".xlsx", ".xls", ".ods", ".numbers"):
        return "save the table as CSV (UTF-8), and give that file"
    if suffix in (".zip", ".rar", ".7z"):
        return "unpack it, and give the folder"
    return (
        "give a folder of songs, a dataset that `acestep-ray prepare` wrote, "
        f"or a table ({', '.join(TABLE_SUFFIXES)})"
    )


def plain_columns(schema: pa.Schema) -> list[str]:
    """The columns whose types are Arrow's own. Values of an extension type run its code when they are read, and Ray's
    type of Python objects unpickles them."""
    return [field.name for field in schema if not _has_extension(field.type)]


def _has_extension(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return True
    if pa.types.is_dictionary(kind):
        return _has_extension(kind.value_type)
    return any(_has_extension(kind.field(i).type) for i in range(kind.num_fields))


def names_audio(columns: Sequence[object]) -> bool:
    """Whether one of the columns names audio files."""
    return bool({plain_name(column) for column in columns} & set(FILE_NAMES))


def key_is_musical(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the column `key` of a table, of which `rows` are the first, holds musical keys rather than songs' names.

    It does if all its values are musical keys, and some are no plain letters, or repeat, or there are columns beside
    it that say so (names of songs, tempo, metre).
    """
    plain = [{plain_name(name): cell for name, cell in row.items()} for row in rows]
    values = [str(row["key"]).strip() for row in plain if not metas.is_empty_value(row.get("key"))]
    if not values:
        return False
    try:
        for value in values:
            metas.read_keyscale(value)
    except ValueError:
        return False
    beside = {"keys", "bpm", "tempo", "timesignature", "time_signature"}
    return (
        len(set(values)) < len(values)
        or any(_TELLING.search(value) for value in values)
        or any(not metas.is_empty_value(row.get(name)) for row in plain for name in beside)
    )


# --- CSV ---------------------------------------------------------------------------------------------------


def _csv_rows(table: str, file: BinaryIO, findings: Findings) -> Iterator[Row]:
    encoding = encoding_of(file.read(4))
    file.seek(0)
    lines = _Lines(io.TextIOWrapper(file, encoding=encoding, newline=""))
    number, problems = 0, len(findings.problems)
    try:
        header = next((line for line in lines if line.strip()), "")
        delimiter = None
        if excels := _EXCELS_LINE.fullmatch(header):
            delimiter = excels[1]
            header = next((line for line in lines if line.strip()), "")
        delimiter = delimiter or max(_DELIMITERS, key=header.count)
        reader = csv.DictReader(chain([header], lines), delimiter=delimiter)
        columns = [name.strip() for name in reader.fieldnames or ()]
        if len(columns) > _MOST_COLUMNS:
            findings.problems.append(
                f"{table}: has {len(columns):,} columns; up to {_MOST_COLUMNS:,} are read"
            )
            return
        if columns and not names_audio(columns):
            findings.problems.append(
                f"{table}: has no column filename (or {', '.join(FILE_NAMES[1:6])}, …); "
                f"it has {_columns_shown(columns)}"
            )
            return
        with _long_cells():
            for number, row in enumerate(reader, start=1):
                lines.start_row()
                if len(findings.problems) - problems > _MOST_PROBLEMS:
                    return
                origin = f"{table}, row {number}"
                if None in row:
                    findings.problems.append(
                        f"{origin}: more cells than the header has; put quotes around texts with "
                        f"{'tabs' if delimiter == chr(9) else 'commas' if delimiter == ',' else delimiter}"
                    )
                else:
                    yield origin, row
    except UnicodeError:
        findings.problems.append(f"{table}: not UTF-8 text (after row {number}), save it as UTF-8")
    except csv.Error as error:
        findings.problems.append(f"{table}, row {number + 1}: {error}")


class _Lines(Iterator[str]):
    """Lines of a table. Raises csv.Error for NUL, and for a row of more characters than a line may have."""

    def __init__(self, file: TextIO):
        self._file = file
        self._left = LINE.size

    def start_row(self) -> None:
        """Count the characters of the next row."""
        self._left = LINE.size

    def __next__(self) -> str:
        line = self._file.readline(self._left + 1)
        if not line:
            raise StopIteration
        self._left -= len(line)
        if "\0" in line:
            raise csv.Error("not UTF-8 text (it holds NUL bytes), save it as UTF-8")
        if self._left < 0:
            raise csv.Error(_TOO_LONG)
        return line


def _columns_shown(columns: Sequence[str]) -> str:
    more = ", …" if len(columns) > _SHOWN_COLUMNS else ""
    return f"{', '.join(columns[:_SHOWN_COLUMNS])}{more}"


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(LINE.size)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# --- JSON --------------------------------------------------------------------------------------------------


def _json_rows(table: str, file: BinaryIO, findings: Findings) -> Iterator[Row]:
    """A JSON array, an object with a list of songs, or an object a line."""
    head = file.read(64)
    file.seek(0)
    if (
        encoding_of(head[:4]).startswith(("utf-16", "utf-32"))
        or table.lower().endswith(".json")
        or _starts_array(head)
    ):
        content = read_open(file, SONG_LIST, table)
        try:
            document = load_json(content)
        except UnicodeError as error:
            findings.problems.append(f"{table}: not UTF-8 text ({error}), save it as UTF-8")
            return
        except (ValueError, RecursionError):  # a number may have too many digits
            # Perhaps an object a line, under a name of the other kind.
            with contextlib.suppress(UnicodeError):
                content = decode_text(content).encode()
            file = io.BytesIO(content)
        else:
            yield from _rows_of_document(table, document, findings)
            return
    yield from _rows_of_lines(table, file, findings)


def _starts_array(head: bytes) -> bool:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _rows_of_lines(table: str, file: BinaryIO, findings: Findings) -> Iterator[Row]:
    number, problems = 0, len(findings.problems)
    while line := file.readline(LINE.size + 1):
        number += 1
        origin = f"{table}, line {number}"
        if len(line) > LINE.size:
            findings.problems.append(f"{origin}: {_TOO_LONG}")
            return
        if len(findings.problems) - problems > _MOST_PROBLEMS:
            return
        try:
            text = line.decode("utf-8-sig").strip()
            row = load_json(text) if text else None
        except UnicodeDecodeError as error:
            findings.problems.append(f"{origin}: not UTF-8 text (byte {error.start}), save it as UTF-8")
            continue
        except (ValueError, RecursionError) as error:
            findings.problems.append(f"{origin}: not JSON ({error})")
            continue
        if isinstance(row, dict):
            yield origin, row
        elif text:
            findings.problems.append(f"{origin}: not a JSON object")


def _rows_of_document(table: str, document: Any, findings: Findings) -> Iterator[Row]:
    metadata: Mapping[str, Any] | None = None
    if isinstance(document, dict):
        lists = {name: value for name, value in document.items() if isinstance(value, list)}
        if isinstance(document.get("samples"), list):
            metadata = document.get("metadata") if isinstance(document.get("metadata"), dict) else {}
            lists = {"samples": document["samples"]}
        if not lists and names_audio(list(document)):
            lists = {"": [document]}
        if len(lists) != 1:
            findings.problems.append(
                f"{table}: is no list of songs; give an array of objects, or an object with one list of them"
            )
            return
        (document,) = lists.values()
    if metadata is not None:
        findings.kinds_of_tables[table] = V15_JSON
    if not isinstance(document, list):
        findings.problems.append(f"{table}: is no list of songs, but {type(document).__name__}")
        return
    problems = len(findings.problems)
    for number, row in enumerate(document, start=1):
        origin = f"{table}, song {number}"
        if len(findings.problems) - problems > _MOST_PROBLEMS:
            return
        if not isinstance(row, dict):
            findings.problems.append(f"{origin}: not a JSON object")
        elif metadata is None:
            yield origin, row
        else:
            try:
                fields = sample_fields(row, metadata, _uses_genre(row, metadata))
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists
                findings.problems.append(f"{origin}: a field is no text ({error})")
                continue
            yield origin, fields


def _uses_genre(sample: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    """Whether a sample is of the share that `genre_ratio` (per cent) gives to genres; the same in every run."""
    ratio = metadata.get("genre_ratio")
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool):
        return False
    name = str(sample.get("id") or sample.get("audio_path") or sample.get("filename"))
    return int(hashlib.sha256(f"genre/{name}".encode(errors="replace")).hexdigest()[:8], 16) % 100 < ratio


# --- Parquet and Arrow -------------------------------------------------------------------------------------


def _parquet_rows(table: str, file: BinaryIO, findings: Findings) -> Iterator[Row]:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    parquet = open_parquet(file)
    batches = parquet.iter_batches(rows_at_once(parquet, size))
    yield from _rows_of_batches(table, parquet.schema_arrow, map(short, batches), findings)


def _arrow_rows(table: str, file: BinaryIO, findings: Findings) -> Iterator[Row]:
    try:
        reader = pa.ipc.open_file(file)
        batches: Iterator[pa.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches))
    except pa.ArrowInvalid:
        file.seek(0)
        reader = pa.ipc.open_stream(file)
        batches = iter(reader)
    yield from _rows_of_batches(table, reader.schema, map(short, batches), findings)


def _rows_of_batches(
    table: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch], findings: Findings
) -> Iterator[Row]:
    if not names_audio(schema.names):
        findings.problems.append(f"{table}: has no column filename; it has {', '.join(schema.names)}")
        return
    names = plain_columns(schema)
    if not names_audio(names):
        findings.problems.append(f"{table}: the column that names the files is of a type that is not read")
        return
    number = 0
    for batch in batches:
        plain = batch.select(names)
        # Otherwise a text that is not UTF-8, or has no end, is an error of Python.
        plain.validate(full=True)
        for row in plain.to_pylist():
            number += 1
            yield f"{table}, row {number}", row
