from __future__ import annotations

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from acestep_ray.cache.parts import CacheDamagedError, _row_to_bytes, read_dims, read_row, store_rows
from acestep_ray.cache.reader import CacheReader
from acestep_ray.cache.schema import LEDGER_SCHEMA, SAMPLE_SCHEMA
from acestep_ray.cache.stored import find_rows
from acestep_ray.storage import Store
from tests.cache.rows import SSL_DIMS, TEXT_DIM, rows_of_every_shape, song_row, write_rows

FOOTER_BYTES = 2700  # of one song, magic and length included


@pytest.fixture
def cache(tmp_path) -> Store:
    return Store.at(tmp_path / "cache")


def part_file(cache: Store, ledger: pa.Table):
    (name,) = ledger["file"].unique().to_pylist()
    return cache.path / name


def test_the_bytes_of_a_song_in_a_part_are_the_file_of_that_song_alone(cache):
    rows = rows_of_every_shape()
    ledger = store_rows(cache, rows)
    part = part_file(cache, ledger)
    metadata = pq.read_metadata(part)
    end = 0
    for i, (row, entry) in enumerate(zip(rows, ledger.to_pylist(), strict=True)):
        assert entry["offset"] == end
        end += entry["length"]
        content = cache.read_range(entry["file"], entry["offset"], entry["length"])
        assert content == _row_to_bytes(row).to_pybytes()
        alone = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        read = alone.read()
        assert read.schema == SAMPLE_SCHEMA
        assert read.equals(row)
        # What the part's footer says of the song is what the song's own says, further on in the file.
        own, whole = alone.metadata.row_group(0), metadata.row_group(i)
        for column in range(own.num_columns):
            described, expected = (group.column(column).to_dict() for group in (whole, own))
            expected["data_page_offset"] += entry["offset"]
            assert described == expected
    assert metadata.num_row_groups == len(rows)
    assert end < part.stat().st_size


def test_other_readers_find_plain_uncompressed_parquet(cache):
    rows = rows_of_every_shape()
    ledger = store_rows(cache, rows)
    part, expected = part_file(cache, ledger), pa.concat_tables(rows)
    assert pq.read_table(part).equals(expected)
    assert pq.ParquetFile(part, page_checksum_verification=True).read().equals(expected)
    assert pa.dataset.dataset(part.parent).to_table().equals(expected)
    assert pq.read_table(part, memory_map=True, columns=["key"])["key"].equals(expected["key"])
    assert pq.read_table(part).to_pandas()["key"].tolist() == expected["key"].to_pylist()
    metadata = pq.read_metadata(part)
    columns = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
    assert {column.compression for column in columns} == {"UNCOMPRESSED"}
    assert not any(column.has_dictionary_page for column in columns)


def test_the_footer_of_a_song_is_small(cache):
    row = song_row("0" * 40, frames=2584)
    (entry,) = store_rows(cache, [row]).to_pylist()
    group = pq.read_metadata(part_file(cache, find_rows(cache))).row_group(0)
    assert entry["length"] - group.total_byte_size < FOOTER_BYTES


def test_the_ledger_says_what_a_row_holds(cache):
    row = song_row(
        "a#1", song_key="a", window=1, is_last_window=False, speaker=True, lyric_languages=["en", "de", "en"]
    )
    stored = store_rows(cache, [row, song_row("b", lyric_ids=[])])
    assert stored.schema == LEDGER_SCHEMA
    entry = stored.to_pylist()[0]
    values = row.to_pylist()[0]
    shared = set(LEDGER_SCHEMA.names) & set(SAMPLE_SCHEMA.names)
    assert {name: entry[name] for name in shared} == {name: values[name] for name in shared}
    assert (entry["rows_in_file"], entry["prompt_count"], entry["languages"]) == (2, 3, ["de", "en"])
    assert entry["bytes_in_file"] == part_file(cache, stored).stat().st_size
    for name, features in (
        ("latents_bytes", len(values["latents"])),
        ("text_bytes", sum(map(len, values["text_embeddings"]))),
        ("ssl_bytes", sum(len(one["directions"]) for one in values["ssl"])),
    ):
        assert features <= entry[name] < features + 500
    assert find_rows(cache).equals(stored)


@pytest.mark.parametrize("place", [0, 0.3, 0.6, 1])
def test_a_changed_byte_is_found_with_checksums(cache, place):
    row = song_row("a", frames=500)
    (entry,) = store_rows(cache, [row]).to_pylist()
    content = bytearray(cache.read_bytes(entry["file"]))
    group = pq.read_metadata(pa.BufferReader(content)).row_group(0)
    names = [group.column(i).path_in_schema for i in range(group.num_columns)]
    start = group.column(names.index("latents")).data_page_offset
    content[start + 60 + int(place * 120_000)] ^= 1  # behind the page's header
    cache.write_bytes(entry["file"], content)
    where = [entry[name] for name in ("file", "offset", "length", "key")]
    assert not read_row(cache, *where).equals(row)
    with pytest.raises(CacheDamagedError, match=r"(?i)crc.*\n.*cache verify"):
        read_row(cache, *where, checksums=True)


def test_the_widths_of_the_features_are_read_from_a_row(cache):
    assert read_dims(cache, store_rows(cache, [song_row("a")])) == {"text_dim": TEXT_DIM, "ssl": SSL_DIMS}
    latents_only = song_row("b", prompts=[], text_embeddings=None, text_dim=None, ssl=None)
    assert read_dims(cache, store_rows(cache, [latents_only])) == {"text_dim": None, "ssl": {}}
    assert read_dims(cache, LEDGER_SCHEMA.empty_table()) == {"text_dim": None, "ssl": {}}


def test_a_song_from_object_storage_is_one_request(s3):
    remote = write_rows(Store.at(s3.fresh()), [song_row(key) for key in "cab"])
    reader = CacheReader(remote)
    before = s3.requests(remote.url)
    for i in (2, 0, 2):
        reader.read(i)
    assert s3.requests(remote.url)[len(before) :] == ["GET"] * 3
