"""Parquet files that unpack to much more than they are: looked at by their own figures, before a value is read."""

from __future__ import annotations

from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from acestep_ray.plain_files import LINE

_MOST_ROWS = 256
_BATCH_BYTES = 256 << 20
# Texts shrink to a tenth; what shrinks to a thousandth was made for that.
_LARGEST_RATIO = 100
_SMALL_BYTES = 64 << 20
_SMALL_TOTAL = 1 << 30
_LONGEST_NAMES = 16 << 20
_MOST_FIELDS = 1 << 20


def open_parquet(file: BinaryIO) -> pq.ParquetFile:
    """A Parquet file whose footer claims no more than it holds. Raises ArrowException."""
    return pq.ParquetFile(
        file, thrift_string_size_limit=_LONGEST_NAMES, thrift_container_size_limit=_MOST_FIELDS
    )


def checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, whose offsets lead into its buffers. Raises ArrowInvalid where they lead elsewhere in memory."""
    batch.validate(full=True)
    return batch


def short(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A checked batch of a table of texts. Raises ArrowInvalid where its rows are longer than those of any table."""
    if checked(batch).nbytes > LINE.size * max(1, batch.num_rows):
        raise pa.ArrowInvalid(f"rows are longer than {LINE.size >> 20} MB, the limit of a table's rows")
    return batch


def check_growth(size: int, unpacked: int) -> None:
    """Raise ArrowInvalid for a file that has unpacked to far more than it is."""
    if unpacked > max(_SMALL_TOTAL, _LARGEST_RATIO * size):
        raise pa.ArrowInvalid(f"it unpacks to more than {_LARGEST_RATIO} times its size")


def rows_at_once(parquet: pq.ParquetFile, size: int) -> int:
    """How many rows may be read together from a file of `size` bytes. Raises ArrowInvalid for a file that unpacks to
    far more than it is.

    A dictionary holds a value once that many rows repeat: each row may be as large as all the dictionary. Figures of
    single columns are not read: Arrow ends the process over statistics that are damaged.
    """
    metadata = parquet.metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    sizes = [group.total_byte_size for group in groups]
    if any(group.total_byte_size < 0 or group.num_rows < 0 for group in groups):
        raise pa.ArrowInvalid("its sizes are below zero")
    if sum(sizes) > _SMALL_BYTES and sum(sizes) > _LARGEST_RATIO * max(size, 1):
        raise pa.ArrowInvalid(f"it unpacks from {size:,} to {sum(sizes):,} bytes")
    return max(1, min(_MOST_ROWS, _BATCH_BYTES // max([1, *sizes])))
