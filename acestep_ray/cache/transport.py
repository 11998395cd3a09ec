"""Decoded songs on their way from the processes that decode to those that encode: rows of Arrow tables, no Ray."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from acestep_ray.cache.songs import DecodedSong, Reject
from acestep_ray.errors import InputError


def decoded_table(outcomes: Sequence[DecodedSong | Reject]) -> pa.Table:
    """One row each: `reject` or `decoded` as JSON, and the arrays."""
    songs = [outcome if isinstance(outcome, DecodedSong) else None for outcome in outcomes]
    rejects = [
        None if isinstance(outcome, DecodedSong) else json.dumps(asdict(outcome)) for outcome in outcomes
    ]
    return pa.table(
        {
            "reject": pa.array(rejects, pa.string()),
            "decoded": pa.array([song and json.dumps(song.header()) for song in songs], pa.string()),
            "wave": _binary([None if song is None else song.wave for song in songs]),
            "speaker": _binary([None if song is None else song.speaker for song in songs]),
        }
    )


def as_one_row(table: pa.Table) -> pa.Table:
    """The table as a row of lists, without a copy: Ray Data then keeps the songs of a batch together."""
    lists = {}
    for name in table.column_names:
        values = table[name].combine_chunks()
        values = values.chunk(0) if isinstance(values, pa.ChunkedArray) else values
        lists[name] = pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)
    return pa.table(lists)


def from_one_row(table: pa.Table, row: int = 0) -> pa.Table:
    """The table that `as_one_row` made row `row` of."""
    return pa.table({name: table[name][row].values for name in table.column_names})


def _binary(arrays: Sequence[np.ndarray | None]) -> pa.Array:
    """The bytes of each array; those of a single one are not copied."""
    contents = [
        np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays if array is not None
    ]
    # numpy asks for huge pages. In memory from Arrow's pool, the page faults take as long as half of the decoding.
    data = contents[0] if len(contents) == 1 else np.concatenate([np.empty(0, np.uint8), *contents])
    sizes = [0 if array is None else array.nbytes for array in arrays]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    is_there = pa.array([array is not None for array in arrays], pa.bool_()).buffers()[1]
    buffers = [is_there, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.large_binary(), len(arrays), buffers)


def read_decoded(batch: pa.Table, row: int) -> DecodedSong:
    """Row `row`, whose wave shares the memory of the batch; without one, it is empty."""
    header = json.loads(batch["decoded"][row].as_py())
    arrays = {}
    for name in ("wave", "speaker"):
        value = batch[name][row] if name in batch.column_names else None
        if value is not None and value.is_valid:
            arrays[name] = np.frombuffer(value.as_buffer(), np.float32)
    wave = arrays["wave"].reshape(2, -1) if "wave" in arrays else np.zeros((2, 0), np.float32)
    return DecodedSong.from_header(header, wave, arrays.get("speaker"))


@contextlib.contextmanager
def plain_faults(key: str) -> Iterator[None]:
    """Raises a fault as one that survives the way to the driver: some libraries' errors cannot be unpickled."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__} at song {key!r}: {error}") from error
