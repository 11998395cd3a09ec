"""Songs with damaged files or wrong headers on their way into the cache, and caches of older versions."""

from __future__ import annotations

import io
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from acestep_ray.cache.decoding import decode_song, file_versions
from acestep_ray.cache.outcomes import Outcomes
from acestep_ray.cache.parts import ledger_of_part, read_row, store_rows
from acestep_ray.cache.prune import prune_cache
from acestep_ray.cache.reader import CacheReader
from acestep_ray.cache.schema import (
    ADDED_COLUMNS,
    LEDGER_SCHEMA,
    SAMPLE_SCHEMA,
    table_from_bytes,
    table_to_bytes,
    without_added,
)
from acestep_ray.cache.songs import DecodedSong, Recipe, Reject, build_row
from acestep_ray.cache.stats import cache_stats
from acestep_ray.cache.stored import find_rows
from acestep_ray.cache.transport import decoded_table, read_decoded
from acestep_ray.cache.verify import verify_cache
from acestep_ray.storage import Store
from tests.cache.conftest import RECIPE, SETTINGS, SongFolder, noise, song
from tests.cache.rows import reject, song_row, write_rows
from tests.cache.test_outcomes import ledger, stored

RATE = 48_000


def flac_bytes(seconds: float) -> bytearray:
    content = io.BytesIO()
    soundfile.write(content, noise(seconds), RATE, format="FLAC")
    return bytearray(content.getvalue())


def put(folder: SongFolder, content: bytes) -> None:
    folder.add("a", bytes(content))


def outcomes(folder: SongFolder, **changes) -> list[DecodedSong | Reject]:
    min_decoded = changes.pop("min_decoded", RECIPE.min_decoded)
    recipe = Recipe(replace(SETTINGS, **changes), RECIPE.models, min_decoded)
    root = Store.at(folder.path)
    return list(decode_song(root, song(), recipe, file_versions(root, song())))


def test_a_song_with_damage_in_its_middle_is_used_and_its_row_says_so(song_folder):
    content = flac_bytes(30)
    content[len(content) // 2] ^= 0xFF
    put(song_folder, content)
    (one,) = outcomes(song_folder)
    assert one.duration_seconds == 30
    assert 0.99 < one.decoded_share < 1
    assert "of it decodes" in one.warning
    table = build_row(read_decoded(decoded_table([one]), 0), {}, RECIPE)
    assert table["decoded_share"].to_pylist() == [one.decoded_share]
    assert table["warning"].to_pylist() == [one.warning]
    (refused,) = outcomes(song_folder, min_decoded=1.0)
    assert refused.reason == "corrupt"
    assert "--min_decoded is 1" in refused.message


def test_a_song_without_damage_has_neither_share_nor_warning(song_folder):
    song_folder.add("a", noise(4))
    (one,) = outcomes(song_folder)
    assert (one.decoded_share, one.warning) == (None, None)


def test_of_all_windows_only_the_damaged_one_is_rejected(song_folder):
    content = flac_bytes(20)
    middle = len(content) // 2
    content[middle : middle + len(content) // 20] = bytes(len(content) // 20)
    put(song_folder, content)
    found = outcomes(song_folder, window="all", window_seconds=4.0)
    assert [one.key for one in found] == [f"a#{i}" for i in range(5)]
    assert [isinstance(one, Reject) for one in found] == [False, False, True, False, False]
    assert [one.is_last_window for one in found] == [False] * 4 + [True]
    assert found[0].warning is None
    assert [one.decoded_share for one in found if isinstance(one, DecodedSong)] == [None] * 4


def test_the_windows_of_a_file_that_was_cut_off_end_with_a_reject(song_folder):
    content = flac_bytes(20)
    put(song_folder, content[: int(0.45 * len(content))])
    found = outcomes(song_folder, window="all", window_seconds=4.0)
    assert [isinstance(one, Reject) for one in found] == [False, False]
    put(song_folder, content[: int(0.58 * len(content))])
    found = outcomes(song_folder, window="all", window_seconds=4.0)
    assert [isinstance(one, Reject) for one in found] == [False, False, True]
    assert "--min_decoded" in found[-1].message
    assert found[-1].is_last_window


def test_windows_lie_in_all_of_a_song_whose_header_counts_too_few(song_folder):
    content = flac_bytes(20)
    content[21] &= 0xF0
    content[22:26] = (5 * RATE).to_bytes(4, "big")
    put(song_folder, content)
    assert len(outcomes(song_folder, window="all", window_seconds=4.0)) == 5
    starts = [
        outcomes(song_folder, window="random", window_seconds=4.0, seed=i)[0].start_seconds for i in range(12)
    ]
    assert max(starts) > 6


def test_the_flag_is_no_part_of_the_identity_of_a_row_and_retries_what_it_concerns(song_folder):
    song_folder.add("a", noise(3.0))
    root = Store.at(song_folder.path)
    other = replace(RECIPE, min_decoded=0.5)
    assert other.row_fingerprint(song(), "a", None) == RECIPE.row_fingerprint(song(), "a", None)
    versions = file_versions(root, song())
    assert other.reject_fingerprint(song(), versions) != RECIPE.reject_fingerprint(song(), versions)
    whole, damaged = ledger(stored(song("a"), root)), ledger(stored(song("a"), root, decoded_share=0.7))
    assert [len(Outcomes(whole, []).candidates(song("a"), recipe)) for recipe in (RECIPE, other)] == [1, 1]
    assert [len(Outcomes(damaged, []).candidates(song("a"), recipe)) for recipe in (RECIPE, other)] == [0, 1]


@pytest.fixture
def older(monkeypatch):
    """A function: within it, rows and ledgers are written as older versions wrote them."""

    def write(function):
        with pytest.MonkeyPatch.context() as patch:
            import acestep_ray.cache.parts as parts
            import acestep_ray.cache.schema as schema

            rows, entries = without_added(SAMPLE_SCHEMA), without_added(LEDGER_SCHEMA)
            patch.setattr(schema, "SAMPLE_SCHEMA", rows)
            patch.setattr(parts, "SAMPLE_SCHEMA", rows)
            patch.setattr(parts, "LEDGER_SCHEMA", entries)
            patch.setattr(parts, "_ROW_COLUMNS", [n for n in parts._ROW_COLUMNS if n not in ADDED_COLUMNS])
            patch.setattr(
                parts, "_READ_FOR_LEDGER", [n for n in parts._READ_FOR_LEDGER if n not in ADDED_COLUMNS]
            )
            return function()

    return write


def old_row(key: str) -> pa.Table:
    return song_row(key).drop_columns(list(ADDED_COLUMNS))


def test_a_cache_of_an_older_version_with_new_rows_is_read_verified_and_pruned(tmp_path, older):
    cache = Store.at(tmp_path / "cache")
    older(lambda: store_rows(cache, [old_row("a"), old_row("b")]))
    store_rows(cache, [song_row("c", decoded_share=0.97, warning="97.0% of it decodes")])
    write_rows(cache, [], [reject("x")])
    names = {
        name: pq.read_schema(tmp_path / "cache" / name).names for name in cache.names("samples", ".parquet")
    }
    assert len(names) >= 1
    reader = CacheReader(cache)
    assert [reader.read(i).key for i in range(len(reader))] == ["a", "b", "c"]
    rows = find_rows(cache).sort_by("key")
    assert rows["warning"].to_pylist() == [None, None, "97.0% of it decodes"]
    assert cache_stats(cache.url).songs == 3
    verify_cache(cache.url)
    assert prune_cache(cache.url).files == []


def test_parts_of_an_older_version_beside_new_ones_are_read(tmp_path, older, monkeypatch):
    monkeypatch.setattr("acestep_ray.cache.commit.PART_ROWS", 2)  # so that no part is joined with another
    cache = Store.at(tmp_path / "cache")
    older(lambda: store_rows(cache, [old_row("a"), old_row("b")]))
    store_rows(cache, [song_row("c"), song_row("d", warning="its header counts wrongly")])
    write_rows(cache, [], [])
    columns = [
        len(pq.read_schema(tmp_path / "cache" / name).names) for name in cache.names("samples", ".parquet")
    ]
    assert sorted(columns) == [len(SAMPLE_SCHEMA) - 2, len(SAMPLE_SCHEMA)]
    verify_cache(cache.url)
    for name in cache.names("samples", ".parquet"):
        entries = ledger_of_part(cache, name).to_pylist()
        assert [row["key"] for row in entries] in (["a", "b"], ["c", "d"])
        for row in entries:
            read = read_row(cache, name, row["offset"], row["length"], row["key"])
            assert read.schema == SAMPLE_SCHEMA
            assert read["warning"].to_pylist() == [row["warning"]]


def test_a_ledger_of_an_older_version_is_read_and_one_with_other_columns_is_not():
    old = pa.table({f.name: pa.nulls(2, f.type) for f in without_added(LEDGER_SCHEMA)})
    read = table_from_bytes(table_to_bytes(old), LEDGER_SCHEMA)
    assert read.schema.names == LEDGER_SCHEMA.names
    assert read["decoded_share"].null_count == 2
    with pytest.raises(pa.ArrowInvalid, match="its columns are"):
        table_from_bytes(table_to_bytes(old.rename_columns([*old.column_names[:-1], "other"])), LEDGER_SCHEMA)
