"""The dataset: its columns, how it is opened, and the reasons for which a song is rejected."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from acestep_ray.errors import InputError
from acestep_ray.foreign_files import seems_to_be
from acestep_ray.plain_files import JSON, read_limited
from acestep_ray.plain_json import load_json
from acestep_ray.storage import Store, is_url, scratch_folder

if TYPE_CHECKING:
    import datasets

REQUIRED_COLUMNS = ("keys", "filename")
OPTIONAL_COLUMNS = {
    "language": "string",
    "caption": "string",
    "bpm": "int32",
    "keyscale": "string",
    "timesignature": "string",
    "instrumental": "bool",
}
"""Columns that a dataset has where a song has a value for them, with their types."""

COLUMNS = (*REQUIRED_COLUMNS, "tags", "norm_lyrics", "speaker_emb_path", "recaption", *OPTIONAL_COLUMNS)
"""All that a row may have; others are left alone."""

CAPTION = "caption"
"""Name of the recaption that a caption is for a model that is prompted with tags."""

# An Arrow struct cannot be without fields; a dataset without any recaption gets this one, always null.
FALLBACK_RECAPTION = "simplified"

_AGAIN = "copy it again, or write it again with what made it, such as `acestep-ray prepare`"
# Files of `datasets.save_to_disk`: the one of a DatasetDict, and the one of a Dataset.
_SPLIT_LISTING = "dataset_dict.json"
_STATE = "state.json"
_INFO = "dataset_info.json"

_LISTED = 5


class RejectReason(str, Enum):
    """Why a song cannot be used. The value is what the feature cache stores.

    `meaning` is the reason in one sentence; `stage` is the stage that finds it: decode, text or encode.
    """

    stage: str
    meaning: str

    MISSING = "missing", "decode", "the audio file does not exist"
    UNREADABLE = "unreadable", "decode", "the audio file may not be read, or reading it failed"
    EMPTY = "empty", "decode", "the audio file holds no audio"
    UNSUPPORTED = "unsupported", "decode", "the file is no audio, or audio of a kind that is not read"
    CORRUPT = "corrupt", "decode", "the audio is damaged or cut off"
    SILENT = "silent", "decode", "the audio is mostly silence"
    BAD_PATH = "bad_path", "decode", "the file name is empty, malformed or leaves the dataset directory"
    BAD_TEXT = "bad_text", "text", "a text beside the song cannot be read"
    BAD_LYRICS = "bad_lyrics", "text", "the lyrics cannot be turned into tokens"
    BAD_SPEAKER = "bad_speaker", "text", "the speaker embedding is missing, malformed or of a wrong size"
    ENCODER = "encoder", "encode", "a model failed on the song or gave values that are not finite"

    def __new__(cls, value: str, stage: str, meaning: str) -> RejectReason:
        member = str.__new__(cls, value)
        member._value_ = value
        member.stage = stage
        member.meaning = meaning
        return member

    @classmethod
    def of(cls, value: str) -> RejectReason:
        """The reason that the feature cache stores as `value`. Raises ValueError for what is none."""
        return cls(value)  # type: ignore[call-arg]  # mypy takes it for a call of `__new__`

    @property
    def is_transient(self) -> bool:
        """Whether storage or a disk failed, not the song: such a song is tried again in every run."""
        return self is RejectReason.UNREADABLE

    def __str__(self) -> str:
        return self.value


def dataset_features(recaption_names: Iterable[str] = (), optional: Iterable[str] = ()) -> datasets.Features:
    """Columns of a dataset. `recaption` is a struct with one nullable string for every name in use; `optional` are
    the names in `OPTIONAL_COLUMNS` that are in use.

    A row reads as a plain dict, with None for the recaptions it lacks, as in a dataset made with
    `Dataset.from_list`. Without any name the struct has the single field `simplified`.
    """
    # Imported here and below: processes that decode know the reasons of rejects from this module, and need no datasets.
    from datasets import Features, List, Value

    names = sorted(set(recaption_names)) or [FALLBACK_RECAPTION]
    columns: dict[str, Any] = {
        "keys": Value("string"),
        "filename": Value("string"),
        "tags": List(Value("string")),
        "norm_lyrics": Value("string"),
        "speaker_emb_path": Value("string"),
        "recaption": {name: Value("string") for name in names},
    }
    columns |= {name: Value(OPTIONAL_COLUMNS[name]) for name in OPTIONAL_COLUMNS if name in set(optional)}
    return Features(columns)


def row_tags(row: Mapping[str, Any]) -> list[str]:
    """Tags of a row, stripped and without empty ones; a string is split at its commas."""
    tags = row.get("tags") or []
    if isinstance(tags, str):
        tags = tags.split(",")
    return [tag.strip() for tag in tags if tag and tag.strip()]


def row_recaption(row: Mapping[str, Any]) -> dict[str, str]:
    """Recaptions of a row by name; those that are None, blank or no text are dropped.

    The caption of a row without tags is one of them.
    """
    recaption = row.get("recaption") or {}
    found = {name: text.strip() for name, text in recaption.items() if isinstance(text, str) and text.strip()}
    caption = row_text(row, "caption").strip()
    return {**found, CAPTION: caption} if caption and not row_tags(row) else found


def row_metas(row: Mapping[str, Any]) -> list[str]:
    """Tempo and key of a row as tags: `96 bpm`, `A minor`."""
    bpm, keyscale = row.get("bpm"), row_text(row, "keyscale")
    metas = [keyscale] if keyscale else []
    if bpm is not None and math.isfinite(bpm):
        metas.insert(0, f"{round(bpm)} bpm")
    return metas


def with_metas(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose tempo and key are among its tags; of a row with a caption alone, behind the caption."""
    tags, metas = row_tags(row), row_metas(row)
    known = {tag.lower() for tag in tags}
    caption = row_text(row, "caption").strip()
    if caption and not tags:
        return {**row, "caption": ", ".join([caption, *metas])}
    return {**row, "tags": tags + [meta for meta in metas if meta.lower() not in known]}


def row_text(row: Mapping[str, Any], column: str) -> str:
    """A text column of a row (`norm_lyrics`, `speaker_emb_path`, `language`); "" where it is absent or null."""
    return row.get(column) or ""


def open_dataset(
    path: str | os.PathLike[str], split: str = "train", warnings: list[str] | None = None
) -> datasets.Dataset:
    """One split of a dataset directory, checked: columns and their types, keys unique, no empty file name.

    A directory that holds a single dataset has the split `train` alone. Of a directory in object storage, the rows
    are copied to a temporary place on disk (not the audio), and mapped into memory from there.

    Rows that repeat an earlier one wholly, as the original's converter writes them, are left out; `warnings` gets a
    line that says so. Raises InputError for every mistake.
    """
    store = Store.at(path)
    where = store.url if is_url(path) else str(path)
    if store.is_local:
        dataset = load_split(store.path, split, where)
    else:
        # Files that are mapped stay readable when they are deleted.
        with scratch_folder() as copy:
            _copy_split(store, split, copy)
            dataset = load_split(copy, split, where)
    dataset = dataset.with_format(None)
    if len(dataset) == 0:
        raise _no_rows(where)
    missing = [name for name in REQUIRED_COLUMNS if name not in dataset.column_names]
    if missing:
        raise InputError(
            f"the dataset lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}",
            where=where,
            fix=f"required are {' and '.join(REQUIRED_COLUMNS)}; it has {', '.join(dataset.column_names)}",
        )
    schema = dataset.features.arrow_schema
    _check_types(schema, where)
    if warnings is not None and (others := _recaptions_without_text(schema)):
        warnings.append(f"{where}: the recaptions {', '.join(others)} hold no text and are left out")
    if unfit := _unfit_columns(schema):
        dataset = dataset.remove_columns(unfit)
        if warnings is not None:
            warnings.append(
                f"{where}: the columns {', '.join(unfit)} hold values of another type and are not used"
            )
    _check_values(dataset, where)
    for name in REQUIRED_COLUMNS:
        _check_filled(name, dataset[name][:], where)
    once = _without_repeats(dataset)
    if warnings is not None and len(once) < len(dataset):
        warnings.append(
            f"{where}: {len(dataset) - len(once)} of its {len(dataset)} rows repeat another one and are left out; "
            "training goes over the songs as often as --max_steps says"
        )
    check_unique_keys(once["keys"][:], where)
    return once


def _check_values(dataset: datasets.Dataset, where: str) -> None:
    """Raise InputError for columns whose bytes are not those of their types, such as texts that are no UTF-8."""
    names = [name for name in COLUMNS if name in dataset.column_names]
    try:
        dataset.data.table.select(names).validate(full=True)
    except pa.ArrowException as error:
        raise InputError(
            f"the dataset is damaged and cannot be read ({error})", where=where, fix=_AGAIN
        ) from None


def _no_rows(where: str) -> InputError:
    return InputError("the dataset has no rows", where=where, fix="prepare it from at least one song")


def _copy_split(store: Store, split: str, target: Path) -> None:
    """Copies the rows of a dataset's split; files that are missing or damaged are left to `load_split`."""
    folder = ""
    with contextlib.suppress(FileNotFoundError):
        listing = store.read_bytes(_SPLIT_LISTING, JSON)
        (target / _SPLIT_LISTING).write_bytes(listing)
        folder = split
    try:
        state = store.read_bytes(posixpath.join(folder, _STATE), JSON)
        (target / folder).mkdir(exist_ok=True)
        (target / folder / _STATE).write_bytes(state)
        content = load_json(state)
        files = [
            entry["filename"] for entry in content["_data_files"] + (content.get("_indices_data_files") or [])
        ]
        for name in [_INFO, *files]:
            # A name with folders could lead anywhere on this machine.
            if name == posixpath.basename(name):
                store.download(posixpath.join(folder, name), target / folder / name)
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return


def load_split(directory: Path, split: str, where: str) -> datasets.Dataset:
    """One split of a local dataset directory, unchanged. Raises InputError."""
    import datasets

    if not os.path.isdir(directory):
        what = "is not a directory" if os.path.exists(directory) else "does not exist"
        raise InputError(
            f"the dataset {what}", where=where, fix="give the directory that `acestep-ray prepare` wrote"
        )
    try:
        splits = splits_of(directory, where)
        if split not in splits:
            raise InputError(
                f"the dataset has no split {split!r}",
                where=where,
                fix=f"it has: {', '.join(splits) or 'none'}",
            )
        state = load_json(read_limited(splits[split] / _STATE, JSON))
        if not state["_data_files"]:  # `datasets` writes this for a dataset without rows, and cannot load it
            raise _no_rows(where)
        for entry in state["_data_files"] + (state.get("_indices_data_files") or []):
            if entry["filename"] != posixpath.basename(entry["filename"]):
                raise ValueError(f"{_STATE} names a file outside the dataset, {entry['filename']}")
        dataset = datasets.load_from_disk(str(splits[split]))
        dataset.data.validate(full=True)  # offsets that lead out of the file would be followed
        return dataset
    except FileNotFoundError as error:
        raise InputError(
            f"the dataset is incomplete, a file is missing ({error})",
            where=where,
            fix=_AGAIN,
        ) from None
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        pa.ArrowException,
    ) as error:
        reason, fix = f"{type(error).__name__}: {error}", _AGAIN
        for file in sorted(directory.rglob("*")):
            if file.suffix in (".arrow", ".json", ".parquet") and (found := seems_to_be(file)):
                reason, fix = f"{file.relative_to(directory)} is {found.what}", found.fix
                break
        raise InputError(
            f"the dataset is damaged and cannot be read ({reason})", where=where, fix=fix
        ) from None


def splits_of(directory: Path, where: str) -> dict[str, Path]:
    """Where each split lies: a DatasetDict lists them in `dataset_dict.json`, a Dataset has `state.json`."""
    listing = directory / _SPLIT_LISTING
    if listing.is_file():
        return {name: directory / name for name in _split_names(listing, where)}
    if (directory / _STATE).is_file():
        return {"train": directory}
    if (directory / "manifest.json").is_file() and (directory / "samples").is_dir():
        fix = "this is a feature cache; give the dataset that it was computed from"
    else:
        fix = "make a dataset of your songs with `acestep-ray prepare`, and give its output directory"
    raise InputError("the directory holds no Hugging Face dataset", where=where, fix=fix)


def _split_names(listing: Path, where: str) -> list[str]:
    try:
        names = load_json(read_limited(listing, JSON))["splits"]
        # A name with folders could lead anywhere on this machine.
        is_plain = [posixpath.basename(name) == name and name not in ("", ".", "..") for name in names]
        if not isinstance(names, list) or not all(is_plain):
            raise ValueError("its splits are no plain names")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        found = seems_to_be(listing)
        reason = f"it is {found.what}" if found else f"{type(error).__name__}: {error}"
        raise InputError(
            f"the dataset is damaged and cannot be read ({_SPLIT_LISTING}: {reason})", where=where, fix=_AGAIN
        ) from None
    return names


def _check_types(schema: pa.Schema, where: str) -> None:
    for field in schema:
        expected = None
        if field.name in REQUIRED_COLUMNS and not _is_text(field.type):
            expected = "text"
        elif field.name in ("norm_lyrics", "speaker_emb_path", "language"):
            if not (_is_text(field.type) or pa.types.is_null(field.type)):
                expected = "text"
        elif field.name == "tags" and not _is_tags(field.type):
            expected = "a list of texts"
        elif field.name == "recaption" and not _is_recaption(field.type):
            expected = "a dict of texts"
        if expected is not None:
            raise InputError(f"the column {field.name} holds {field.type}, not {expected}", where=where)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_tags(kind: pa.DataType) -> bool:
    # A column whose every value is empty has the null type.
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return _is_text(kind) or pa.types.is_null(kind)


def _is_recaption(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) or pa.types.is_null(kind)


def _recaptions_without_text(schema: pa.Schema) -> list[str]:
    """Names of recaptions that hold something else, such as the `analysis` of the original's instructions."""
    if "recaption" not in schema.names or not pa.types.is_struct(schema.field("recaption").type):
        return []
    fields = schema.field("recaption").type
    return [field.name for field in fields if not (_is_text(field.type) or pa.types.is_null(field.type))]


def _unfit_columns(schema: pa.Schema) -> list[str]:
    """Optional columns of another type than the dataset's, such as numbers as texts: other programs have them too."""
    fits = {
        "string": _is_text,
        "int32": lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind),
        "bool": pa.types.is_boolean,
    }
    return [
        name
        for name, kind in OPTIONAL_COLUMNS.items()
        if name in schema.names and name != "language"
        if not (fits[kind](schema.field(name).type) or pa.types.is_null(schema.field(name).type))
    ]


def _without_repeats(dataset: datasets.Dataset) -> datasets.Dataset:
    """The dataset without rows that are the same as an earlier one in every column that is read."""
    keys = dataset["keys"][:]
    if len(set(keys)) == len(keys):
        return dataset
    # Of a column of audio every row would be decoded.
    rows = dataset.select_columns([name for name in COLUMNS if name in dataset.column_names])
    seen, first = set(), []
    for number, row in enumerate(rows):
        content = hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).digest()
        if content not in seen:
            seen.add(content)
            first.append(number)
    return dataset.select(first)


def _check_filled(column: str, values: list[str | None], where: str) -> None:
    rows = [str(row) for row, value in enumerate(values) if value is None or not value.strip()]
    if rows:
        raise InputError(
            f"{len(rows)} rows have nothing in the column {column}",
            where=f"{where}, {_list_first('row', rows)} (counted from 0)",
        )


def check_unique_keys(keys: list[str], where: str) -> None:
    """Raises InputError for keys that occur more than once."""
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    if repeated:
        raise InputError(
            f"{len(repeated)} keys occur more than once",
            where=f"{where}, {_list_first('key', repeated)}",
            fix="give every row a key of its own",
        )


def _list_first(noun: str, items: list[str]) -> str:
    plural = "s" if len(items) > 1 else ""
    more = ", …" if len(items) > _LISTED else ""
    return f"{noun}{plural} {', '.join(items[:_LISTED])}{more}"
