from __future__ import annotations

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acestep_ray.cache import parts as parts_module
from acestep_ray.cache.parts import (
    StoredRow,
    claim_output_dir,
    counted_attempt,
    find_rows,
    plan_parts,
    row_to_bytes,
    store_song,
)
from acestep_ray.cache.stages import Reject
from acestep_ray.errors import InputError
from tests.cache.conftest import decoded, finish, song


def stored(count: int, num_bytes: int = 1000) -> list[StoredRow]:
    return [
        StoredRow(f"song{i:05d}", f"{i:064x}", "a", None, 10, 1.0, num_bytes, f".incoming/{i}.parquet", 0)
        for i in range(count)
    ]


def keys_of(cache, folder="samples"):
    return pq.read_table(cache / folder, columns=["key"])["key"].to_pylist()


def test_parts_hold_every_row_once_in_order_within_their_bounds(monkeypatch):
    monkeypatch.setattr(parts_module, "PART_BYTES", 20_500)
    monkeypatch.setattr(parts_module, "PART_ROWS", 30)
    rows = stored(1000)
    parts = plan_parts(reversed(rows))
    assert [row for part in parts for row in part.rows] == rows
    assert max(len(part.rows) for part in parts) == 20
    monkeypatch.setattr(parts_module, "PART_BYTES", 1 << 30)
    assert max(len(part.rows) for part in plan_parts(rows)) == 30
    assert len({part.name for part in parts}) == len(parts)


def test_a_song_larger_than_a_part_has_a_part_of_its_own(monkeypatch):
    monkeypatch.setattr(parts_module, "PART_BYTES", 500)
    assert [len(part.rows) for part in plan_parts(stored(3))] == [1, 1, 1]


def test_a_changed_or_removed_song_renames_few_parts():
    rows = stored(3000)
    before = {part.name for part in plan_parts(rows)}
    without = {part.name for part in plan_parts(rows[:1500] + rows[1501:])}
    changed = {
        part.name
        for part in plan_parts([*rows[:1500], replace(rows[1500], fingerprint="f" * 64), *rows[1501:]])
    }
    assert len(before) > 20
    assert 1 <= len(before - without) <= 5
    assert len(before - changed) == 1


def test_songs_of_a_killed_run_are_found_and_become_the_cache(encoder, tmp_path):
    for key in ("b", "a"):
        store_song(tmp_path, row_to_bytes(encoder.encode_song(decoded(song(key)))))
    found = find_rows(tmp_path)
    assert {key: len(rows) for key, rows in found.items()} == {"a": 1, "b": 1}
    finish(tmp_path)
    assert keys_of(tmp_path) == ["a", "b"]
    assert not (tmp_path / ".incoming").exists()
    after = find_rows(tmp_path)
    assert [after[key][0].fingerprint for key in "ab"] == [found[key][0].fingerprint for key in "ab"]
    assert [after[key][0].num_bytes for key in "ab"] == [found[key][0].num_bytes for key in "ab"]


def test_finishing_again_changes_no_file(write_cache):
    cache = write_cache([decoded(song("a")), decoded(song("b"))])
    before = {file: (file.stat().st_ino, file.read_bytes()) for file in cache.glob("samples/*")}
    finish(cache)
    assert {file: (file.stat().st_ino, file.read_bytes()) for file in cache.glob("samples/*")} == before


def test_a_new_song_joins_the_old_ones_as_they_were(write_cache, encoder):
    cache = write_cache([decoded(song("a")), decoded(song("cc"), 4.0)])
    store_song(cache, row_to_bytes(encoder.encode_song(decoded(song("b")))))
    finish(cache)
    (part,) = cache.glob("samples/*")
    expected = [
        encoder.encode_song(decoded(song(key), seconds)) for key, seconds in (("a", 3), ("b", 3), ("cc", 4))
    ]
    assert pq.read_table(part).to_pylist() == pa.concat_tables(expected).to_pylist()


def test_a_damaged_file_holds_no_songs_and_goes_with_the_commit(write_cache):
    cache = write_cache([decoded(song("a"))])
    damaged = cache / "samples/part-0123456789abcdef.parquet"
    damaged.write_bytes(next(cache.glob("samples/*")).read_bytes()[:-100])
    unfinished = cache / "samples/.part-0123456789abcdef.parquet.1.tmp"
    unfinished.write_bytes(b"PAR1")
    assert list(find_rows(cache)) == ["a"]
    finish(cache)
    assert not damaged.exists()
    assert not unfinished.exists()


def test_until_the_manifest_is_written_the_old_cache_stands(write_cache, encoder, monkeypatch):
    cache = write_cache([decoded(song("a"))])
    manifest = (cache / "manifest.json").read_text()
    store_song(cache, row_to_bytes(encoder.encode_song(decoded(song("b")))))

    def die(path, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(parts_module, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        finish(cache)
    assert (cache / "manifest.json").read_text() == manifest
    assert (cache / json.loads(manifest)["index"]).exists()
    monkeypatch.undo()
    finish(cache)
    assert keys_of(cache) == ["a", "b"]
    assert len(list(cache.glob("index-*"))) == 1


def test_rejects_are_a_table_even_when_there_are_none(write_cache):
    reject = Reject("x", "x.wav", "decode", "missing", "the audio file does not exist")
    cache = write_cache([decoded(song("a"))])
    assert keys_of(cache, "rejects") == []
    finish(cache, [reject])
    assert pq.read_table(cache / "rejects").to_pylist() == [vars(reject)]


@pytest.mark.parametrize("files", [["notes.txt"], ["samples/kick.wav"], ["manifest.json"]])
def test_a_directory_that_is_no_cache_is_refused(tmp_path, files):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="no feature cache"):
        claim_output_dir(tmp_path)


def test_a_file_or_a_place_that_cannot_be_written_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "cache"):
        with pytest.raises(InputError, match="cannot write"):
            claim_output_dir(path)


def test_an_empty_directory_a_cache_and_a_killed_run_are_accepted(write_cache, tmp_path):
    cache = write_cache([decoded(song("a"))])
    new = tmp_path / "deep/new"
    for path in (new, new, cache):
        claim_output_dir(path)
    assert keys_of(cache) == ["a"]


def test_attempts_are_counted_only_over_dead_processes(tmp_path):
    claim_output_dir(tmp_path)
    for _ in range(2):
        with counted_attempt(tmp_path, "decode", "a") as attempt:
            assert attempt == 1
    killed = []

    def die_in(stage: str, key: str) -> int:
        killed.append(counted_attempt(tmp_path, stage, key))  # never left, like one whose process was killed
        return killed[-1].__enter__()

    assert [die_in("decode", "a"), die_in("decode", "a")] == [1, 2]
    assert die_in("encode", "a") == 1
    assert die_in("decode", "b") == 1
    with counted_attempt(tmp_path, "decode", "a") as attempt:
        assert attempt == 3
    assert die_in("decode", "b") == 2
    claim_output_dir(tmp_path)
    assert die_in("decode", "b") == 1
