"""A file that holds a program is refused with a message, wherever a user's file is read, and the program does not run.

Embeddings of speakers are in tests/data/test_speaker.py, LoRAs in tests/export/test_reading.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from ray.data.extensions import ArrowPythonObjectType  # from now on Arrow knows Ray's types, as in every job

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.parts import CacheDamagedError, ledger_of_part
from acestep_ray.cache.reader import CacheReader
from acestep_ray.cache.schema import INDEX_SCHEMA, LEDGER_SCHEMA, MANIFEST
from acestep_ray.cache.stored import find_rows
from acestep_ray.cache.verify import verify_cache
from acestep_ray.config import PrepareConfig
from acestep_ray.data.prepare import prepare_dataset
from acestep_ray.data.schema import open_dataset
from acestep_ray.data.songs import SongTable
from acestep_ray.errors import InputError
from acestep_ray.models.weights import read_weights
from acestep_ray.storage import Store
from acestep_ray.training.scan import SCAN_SCHEMA, SONG_SCHEMA, SONGS, _read_scan, read_songs
from acestep_ray.training.state import (
    FORMAT,
    STATE_FILE,
    WEIGHTS_FILE,
    Checkpoints,
    DamagedCheckpointError,
)
from tests.cache.rows import song_row, write_rows
from tests.security.conftest import RunsCode


def pickled_column(canary, rows: int = 1) -> pa.Array:
    """Values of Ray's Arrow type of Python objects, which are unpickled when one is looked at."""
    return ArrowPythonObjectType().wrap_array(pa.array([pickle.dumps(canary)] * rows, pa.large_binary()))


def with_pickles(schema: pa.Schema, canary) -> pa.Table:
    """One row of a table, with a pickle in every column of texts."""
    columns = [
        pickled_column(canary) if pa.types.is_string(field.type) else pa.array([None], field.type)
        for field in schema
    ]
    return pa.table(columns, names=schema.names)


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_table_of_songs_is_read_without_columns_that_hold_programs(tmp_path, canary, suffix):
    """Beside the file names, in place of them, and in place of audio that `prepare` unpacks."""
    (tmp_path / "songs").mkdir()
    (tmp_path / "songs" / "a.wav").write_bytes(b"x")
    names, programs = pa.array(["a.wav"]), pickled_column(canary)
    nested = pa.StructArray.from_arrays([pa.array([b"x"]), programs], names=["bytes", "path"])
    for columns in ({"filename": names, "tags": programs}, {"filename": programs}, {"audio": nested}):
        table = pa.table(columns)
        place = tmp_path / "songs" / f"t{suffix}"
        if suffix == ".parquet":
            pq.write_table(table, place)
        else:
            with pa.ipc.new_file(place, table.schema) as writer:
                writer.write_table(table)
        for read in (SongTable.open, prepared):
            with contextlib.suppress(InputError):
                read(place)


def prepared(place: Path) -> None:
    prepare_dataset(PrepareConfig(data_dir=str(place), output_dir=str(place.parent.parent / "set")))


@pytest.fixture
def cache(tmp_path) -> Store:
    return write_rows(Store.at(tmp_path / "cache"), [song_row("a"), song_row("b")])


def test_an_arrow_file_with_pickles_would_run_them(tmp_path):
    """What the tests below rest on; where it fails, Ray has mended it."""
    table = pq.read_table(pa.BufferReader(parquet(with_pickles(INDEX_SCHEMA, RunsCode(tmp_path / "ran")))))
    table["key"].to_pylist()
    assert (tmp_path / "ran").exists()


def test_the_index_of_a_cache_is_looked_at_before_it_is_read(cache, canary):
    manifest = json.loads(cache.read_bytes(MANIFEST))
    cache.write_bytes(manifest["index"], parquet(with_pickles(INDEX_SCHEMA, canary)))
    with pytest.raises(InputError, match="index cannot be read"):
        CacheIndex.open(cache)


def test_a_song_of_a_cache_is_looked_at_before_it_is_read(cache, canary):
    index = CacheIndex.open(cache)
    row = song_row("a")
    content = parquet(row.set_column(0, "key", pickled_column(canary)))
    cache.write_bytes(f"samples/{index.parts[0]}", content)
    index = replace(index, offsets=np.zeros(2, np.int64), lengths=np.full(2, len(content)))
    with pytest.raises(CacheDamagedError, match="its columns are not those of this version"):
        CacheReader(index).read(0)


@pytest.mark.parametrize("column", ["prompts", "text_embeddings", "speaker"])
def test_nor_is_a_pickle_read_that_lies_deeper(cache, canary, column):
    index, row = CacheIndex.open(cache), song_row("a")
    place = row.schema.get_field_index(column)
    values = pickled_column(canary)
    if column != "speaker":
        values = pa.ListArray.from_arrays([0, 1], values)
    content = parquet(row.set_column(place, column, values))
    cache.write_bytes(f"samples/{index.parts[0]}", content)
    index = replace(index, offsets=np.zeros(2, np.int64), lengths=np.full(2, len(content)))
    with pytest.raises(CacheDamagedError):
        CacheReader(index).read(0)


def test_a_run_that_goes_on_with_a_strangers_cache_reads_no_pickles(cache, canary):
    manifest = json.loads(cache.read_bytes(MANIFEST))
    row = song_row("a")
    (part,) = CacheIndex.open(cache).parts
    cache.write_bytes(f"samples/{part}", parquet(row.set_column(0, "key", pickled_column(canary))))
    assert len(ledger_of_part(cache, f"samples/{part}")) == 0
    cache.write_bytes(manifest["ledger"], parquet(with_pickles(LEDGER_SCHEMA, canary)))
    cache.write_bytes(".incoming/ledgers/x.parquet", parquet(with_pickles(LEDGER_SCHEMA, canary)))
    assert len(find_rows(cache)) == 0
    with pytest.raises(CacheDamagedError, match="cannot be read"):
        verify_cache(cache.url, io.StringIO())


@pytest.mark.parametrize("metadata", [b"\x80\x04.", b"[", b"null"])
def test_a_description_of_a_type_that_does_not_read_is_one_message(cache, metadata):
    field = pa.field(
        "key",
        pa.list_(pa.int64()),
        metadata={"ARROW:extension:name": "ray.data.arrow_tensor", "ARROW:extension:metadata": metadata},
    )
    manifest = json.loads(cache.read_bytes(MANIFEST))
    cache.write_bytes(manifest["index"], parquet(pa.table([pa.array([[1]])], schema=pa.schema([field]))))
    with pytest.raises(InputError, match="index cannot be read"):
        CacheIndex.open(cache)


def test_what_a_run_noted_of_its_songs_is_looked_at_before_it_is_read(tmp_path, canary):
    table = with_pickles(SONG_SCHEMA, canary)
    with pa.OSFile(str(tmp_path / SONGS), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(pa.ArrowInvalid, match="other columns"):
        read_songs(Store.at(tmp_path)).to_pylist()
    (tmp_path / "scan.parquet").write_bytes(parquet(with_pickles(SCAN_SCHEMA, canary)))
    with pytest.raises(pa.ArrowInvalid, match="its columns are"):
        _read_scan(Store.at(tmp_path))


@pytest.mark.parametrize("column", ["keys", "filename", "tags", "norm_lyrics", "recaption", "another"])
def test_a_dataset_is_looked_at_before_it_is_read(tmp_path, canary, column):
    row = {
        "keys": "a",
        "filename": "a.wav",
        "tags": ["pop"],
        "norm_lyrics": "la",
        "recaption": {"simplified": "a"},
        "another": "x",
    }
    Dataset.from_list([row]).save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    table = pa.Table.from_pylist([row])
    table = table.set_column(table.schema.get_field_index(column), column, pickled_column(canary))
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match=r"damaged and cannot be read|holds .*, not"):
        list(SongTable.open(tmp_path / "set"))


def test_a_loading_script_beside_a_dataset_is_not_run(tmp_path, canary):
    script = f"open({str(canary.place)!r}, 'w')\n"
    Dataset.from_list([{"keys": "a", "filename": "a.wav"}]).save_to_disk(tmp_path / "set")
    for folder in (tmp_path / "set", tmp_path / "folder"):
        folder.mkdir(exist_ok=True)
        (folder / f"{folder.name}.py").write_text(script)
        (folder / "__init__.py").write_text(script)
        (folder / "a.wav").write_bytes(b"")
    assert len(open_dataset(tmp_path / "set")) == len(SongTable.open(tmp_path / "folder")) == 1


@pytest.mark.parametrize("zipped", [True, False])
def test_a_models_bin_file_is_not_unpickled(tmp_path, canary, zipped):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"weight": canary}, path) if zipped else path.write_bytes(pickle.dumps(canary))
    with pytest.raises(InputError) as refused:
        list(read_weights(tmp_path))
    assert str(path) in str(refused.value)
    assert "weights_only" not in str(refused.value)


@pytest.mark.parametrize("content", [["no dict"], {"a": 1}])
def test_a_models_bin_file_without_tensors_is_told(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="no tensors by name"):
        list(read_weights(tmp_path))


def test_a_training_checkpoint_that_is_a_pickle_is_damaged(tmp_path, canary):
    folder = tmp_path / "step=3"
    folder.mkdir()
    torch.save(canary, folder / WEIGHTS_FILE)
    content = Path(folder / WEIGHTS_FILE).read_bytes()
    files = {WEIGHTS_FILE: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    state = {"format": FORMAT, "step": 3, "losses": {}, "files": files}
    (folder / STATE_FILE).write_text(json.dumps(state))
    with pytest.raises(DamagedCheckpointError, match="does not read"):
        Checkpoints(Store.at(tmp_path)).read_weights(3)
