"""The feature cache on disk: columns, files, manifest, and the song that training reads from it.

    manifest.json               what the cache is made of; written last, it names the three files below
    index-HASH.parquet          where each song lies and how long it is, sorted by key: all that training opens
    ledger-HASH.parquet         what a rerun and `cache stats` want to know of each song, in the order of the index
    rejects/part-HASH.parquet   songs that could not be used, and why
    samples/part-HASH.parquet   some dozens of songs
    .incoming/                  parts and rejects of a run that has not ended; gone when it has

A part is a Parquet file with one row and one row group a song. Before each row group it holds the magic `PAR1`, and
behind it the footer of a file of this one song:

    PAR1 [row group 0] [footer 0] PAR1   PAR1 [row group 1] [footer 1] PAR1   …   [footer of the part] PAR1
    └──────────── song 0 ────────────┘   └──────────── song 1 ────────────┘

So the bytes of a song are a complete Parquet file of one row, read in one request and without the part's own footer,
while other readers find a plain Parquet file: they follow the last footer, which does not mention what lies between
the row groups.

A HASH is that of what the file holds, so its name says its content and no file is ever changed in place.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    import torch

    from acestep_ray.storage import Store

FORMAT_VERSION = 2
LATENT_CHANNELS, LATENT_HEIGHT = 8, 16

MANIFEST = "manifest.json"
SAMPLES, REJECTS, INCOMING = "samples", "rejects", ".incoming"
INCOMING_PARTS, INCOMING_LEDGERS = f"{INCOMING}/parts", f"{INCOMING}/ledgers"
INCOMING_REJECTS = f"{INCOMING}/rejects"

_TABLE_NAME = re.compile(rf"(index|ledger|{REJECTS}/part)-[0-9a-f]+\.parquet")

FEATURE_GROUPS = ("latents", "text", "ssl")
"""Groups of features; a row's columns of a group that the run did not choose are null."""


def _list_of(kind: pa.DataType) -> pa.DataType:
    # Parquet's name for the items, so that what is read has the type of what was written.
    return pa.list_(pa.field("element", kind))


SAMPLE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("fingerprint", pa.string()),
        ("filename", pa.string()),
        # The key of the dataset's row: several windows of one song share it.
        ("song_key", pa.string()),
        ("window", pa.int32()),
        ("is_last_window", pa.bool_()),
        ("start_seconds", pa.float64()),
        ("audio_version", pa.string()),
        ("audio_sha256", pa.string()),
        ("speaker_sha256", pa.string()),
        ("speaker_version", pa.string()),
        ("duration_seconds", pa.float64()),
        # float16 (8, 16, latent_frames), little-endian, C order; so are all arrays below.
        ("latents", pa.binary()),
        ("latent_frames", pa.int32()),
        ("prompts", _list_of(pa.struct([("source", pa.string()), ("text", pa.string())]))),
        # float16 (tokens, text_dim), one for each prompt.
        ("text_embeddings", _list_of(pa.binary())),
        ("text_dim", pa.int32()),
        # Empty for a song without lyrics.
        ("lyric_ids", _list_of(pa.int32())),
        ("lyric_languages", _list_of(pa.string())),
        # float32 (speaker_dim,), or null.
        ("speaker", pa.binary()),
        # `frames` counts the features before the stride; `directions` is int8 (ceil(frames / stride), dim).
        (
            "ssl",
            _list_of(
                pa.struct(
                    [
                        ("name", pa.string()),
                        ("frames", pa.int32()),
                        ("dim", pa.int32()),
                        ("directions", pa.binary()),
                    ]
                )
            ),
        ),
        # Of the window's audio, null where all of it decodes: silence replaces the rest, or it is missing at the end.
        ("decoded_share", pa.float64()),
        # What disagrees in the song's file, and what was done about it; null where nothing does.
        ("warning", pa.string()),
    ]
)

ADDED_COLUMNS = ("decoded_share", "warning")
"""Columns that older versions did not write; where they are missing they are null."""

REJECT_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("song_key", pa.string()),
        ("window", pa.int32()),
        ("is_last_window", pa.bool_()),
        ("filename", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("fingerprint", pa.string()),
        ("audio_version", pa.string()),
    ]
)

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("latent_frames", pa.int32()),
        # Name of a file in samples/, and the song's bytes in it.
        ("part", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
    ]
)

LEDGER_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("song_key", pa.string()),
        ("window", pa.int32()),
        ("is_last_window", pa.bool_()),
        ("fingerprint", pa.string()),
        ("audio_sha256", pa.string()),
        ("audio_version", pa.string()),
        ("speaker_sha256", pa.string()),
        ("speaker_version", pa.string()),
        ("latent_frames", pa.int32()),
        ("duration_seconds", pa.float64()),
        # Name of the part in the cache, and the song's bytes in it.
        ("file", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        # Of the whole part: a part that is cut short, or that holds more songs than are wanted, shows.
        ("rows_in_file", pa.int32()),
        ("bytes_in_file", pa.int64()),
        # For `cache stats`.
        ("latents_bytes", pa.int64()),
        ("text_bytes", pa.int64()),
        ("ssl_bytes", pa.int64()),
        ("prompt_count", pa.int32()),
        ("languages", _list_of(pa.string())),
        ("decoded_share", pa.float64()),
        ("warning", pa.string()),
    ]
)
"""What is known of a stored song without reading it; the first columns are those of `SAMPLE_SCHEMA`."""


@dataclass
class CachedSong:
    """One song as training reads it. `W` is its number of latent frames."""

    key: str
    latents: torch.Tensor
    """(8, 16, W) float16."""
    prompts: list[str]
    prompt_sources: list[str]
    """Where each prompt comes from: the tags, or a recaption's name."""
    text_embeddings: list[torch.Tensor]
    """One (tokens, text_dim) float16 for each prompt."""
    lyric_ids: torch.Tensor
    """(L,) int64; a song without lyrics has the one id 0, to be masked out."""
    has_lyrics: bool
    speaker: torch.Tensor
    """(speaker_dim,) float32, zeros if the song has none."""
    ssl: dict[str, torch.Tensor]
    """Directions of the SSL features, int8 (frames kept, dim), for each SSL model of the cache."""
    ssl_frames: dict[str, int]
    """Frames of the same features before the stride."""

    def condition(self, device: torch.device | str) -> dict[str, torch.Tensor]:
        """First prompt, lyrics and speaker as the arguments of `ACEStepTransformer.encode_condition`, for one song."""
        # Processes that only read tables load no torch.
        import torch

        text = self.text_embeddings[0].float()
        condition = {
            "text": text[None],
            "text_mask": torch.ones(1, len(text), dtype=torch.bool),
            "speaker": self.speaker[None],
            "lyric_ids": self.lyric_ids[None],
            "lyric_mask": torch.full((1, len(self.lyric_ids)), self.has_lyrics),
        }
        return {name: value.to(device) for name, value in condition.items()}


def array_to_bytes(array: np.ndarray) -> bytes:
    """An array as the cache stores it: little-endian, C order."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def hash_of(*values: Any) -> str:
    """sha256 (hex) of JSON values; floats by their shortest exact form, keys sorted."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def song_writer(sink: Any) -> pq.ParquetWriter:
    """A writer of rows of `SAMPLE_SCHEMA` that makes each table a row group.

    Uncompressed: features hardly shrink, and plain pages read 4 × faster. With checksums, which `cache verify` reads.
    """
    return pq.ParquetWriter(
        sink,
        SAMPLE_SCHEMA,
        compression="NONE",
        use_dictionary=False,
        write_statistics=["key"],
        write_page_checksum=True,
        # 5 kB a song, and Parquet's own types are the schema's.
        store_schema=False,
    )


def table_to_bytes(table: pa.Table, repeated: str | None = None) -> pa.Buffer:
    """A compressed Parquet file; the values of the column `repeated` are written once each."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=[] if repeated is None else [repeated],
        dictionary_pagesize_limit=1 << 30,
        write_statistics=False,
    )
    return sink.getvalue()


def has_types(found: pa.Schema, schema: pa.Schema) -> bool:
    """Whether columns have these names and types; of one that is dictionary-encoded, its values.

    To be asked before any value is read: of Ray's own Arrow types, one is a pickle, which reading runs.
    """
    return found.names == schema.names and not _other_types(found, schema)


def without_added(schema: pa.Schema) -> pa.Schema:
    """The columns of a schema that older versions wrote."""
    return pa.schema([field for field in schema if field.name not in ADDED_COLUMNS])


def with_added(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table of a schema, also if an older version wrote it."""
    for name in ADDED_COLUMNS:
        if name in schema.names and name not in table.column_names:
            table = table.append_column(schema.field(name), pa.nulls(len(table), schema.field(name).type))
    return table


def _other_types(found: pa.Schema, schema: pa.Schema) -> list[str]:
    """Columns of the same names and other types."""
    kinds = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in found.types]
    pairs = zip(found.names, kinds, schema.types, strict=False)
    return [f"{name}: {kind}" for name, kind, wanted in pairs if kind != wanted]


def table_from_bytes(content: Any, schema: pa.Schema, repeated: str | None = None) -> pa.Table:
    """What `table_to_bytes` wrote; the column `repeated` is dictionary-encoded. Raises ArrowException or OSError."""
    try:
        parquet = pq.ParquetFile(
            pa.BufferReader(content), read_dictionary=None if repeated is None else [repeated]
        )
    except KeyError as error:
        raise pa.ArrowInvalid(f"it has no column {error}") from None
    except ValueError as error:  # of a type of Ray's own, whose description does not read
        raise pa.ArrowInvalid(str(error)) from None
    with parquet:
        found = parquet.schema_arrow
        if not has_types(found, schema) and not has_types(found, without_added(schema)):
            names = (schema.names, without_added(schema).names)
            others = found.names if found.names not in names else _other_types(found, schema)
            raise pa.ArrowInvalid(f"its columns are {', '.join(others)}")
        return with_added(parquet.read(), schema)


def is_table_name(name: Any) -> bool:
    """Whether a manifest may name a table so: within the cache's directory, and as `commit` names them."""
    return isinstance(name, str) and _TABLE_NAME.fullmatch(name) is not None


def write_json(store: Store, name: str, value: Any) -> None:
    """`value` as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    store.write_bytes(name, text.encode())
