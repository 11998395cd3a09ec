from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from acestep_ray.cache import commit as commit_module
from acestep_ray.cache.commit import commit, plan_commit, repack
from acestep_ray.cache.parts import CacheDamagedError, read_row, store_rejects, store_rows
from acestep_ray.cache.reader import CacheReader
from acestep_ray.cache.schema import LEDGER_SCHEMA, REJECT_SCHEMA
from acestep_ray.cache.stored import claim_output_dir, find_rejects, find_rows
from acestep_ray.errors import InputError
from acestep_ray.storage import Store
from tests.cache.rows import (
    contents,
    fingerprint_of,
    finish,
    keys_of,
    reject,
    rows_of_every_shape,
    song_row,
    write_rows,
)


@pytest.fixture
def cache(tmp_path) -> Store:
    return Store.at(tmp_path / "cache")


def test_finishing_again_changes_no_file(cache):
    for keys in ("ab", "cd"):
        store_rows(cache, [song_row(key) for key in keys])
    finish(cache, [reject("x")])
    before = contents(cache)
    inodes = {file: file.stat().st_ino for file in cache.path.glob("samples/*")}
    claim_output_dir(cache)
    finish(cache, [reject("x")])
    assert contents(cache) == before
    assert {file: file.stat().st_ino for file in cache.path.glob("samples/*")} == inodes


def test_the_same_songs_in_the_same_parts_make_the_same_files(tmp_path):
    caches = [Store.at(tmp_path / name) for name in ("one", "other")]
    for cache in caches:
        write_rows(cache, [song_row(key) for key in "bac"], [reject("y"), reject("x")])
    assert contents(caches[0]) == contents(caches[1])


def test_a_new_song_joins_the_old_ones_as_they_were(cache):
    rows = {key: song_row(key, frames=10 + len(key)) for key in ("a", "cc", "b")}
    write_rows(cache, [rows["a"], rows["cc"]])
    store_rows(cache, [rows["b"]])
    finish(cache)
    (part,) = cache.path.glob("samples/*")
    assert pq.read_table(part).equals(pa.concat_tables([rows["a"], rows["b"], rows["cc"]]))


def test_a_block_that_was_stored_twice_is_in_the_cache_once(cache):
    block = [song_row(key) for key in "abc"]
    store_rows(cache, block[:2])  # of the same songs, other blocks
    store_rows(cache, block)
    store_rows(cache, block)
    assert Counter(find_rows(cache)["key"].to_pylist()) == {"a": 3, "b": 3, "c": 2}
    finish(cache)
    assert keys_of(cache) == ["a", "b", "c"]
    assert Counter(find_rows(cache)["key"].to_pylist()) == {"a": 1, "b": 1, "c": 1}


def kept_and_repacked(ledger: pa.Table) -> tuple[list[str], list[list[str]]]:
    plan = plan_commit(ledger)
    return sorted(plan.kept["key"].to_pylist()), [group["key"].to_pylist() for group in plan.repack]


def ledger_of(files: dict[str, dict[str, int]], rows_in_file: dict[str, int] | None = None) -> pa.Table:
    """Files by name, each with its songs and their sizes."""
    entries = [
        {
            "key": key,
            "fingerprint": key,
            "file": file,
            "length": length,
            "rows_in_file": (rows_in_file or {}).get(file, len(songs)),
        }
        for file, songs in files.items()
        for key, length in songs.items()
    ]
    return pa.Table.from_pylist(entries, schema=LEDGER_SCHEMA)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(commit_module, "PART_BYTES", 100)
    monkeypatch.setattr(commit_module, "PART_ROWS", 6)


@pytest.mark.usefixtures("small_parts")
def test_large_parts_stay_and_small_ones_are_joined_in_the_order_of_keys():
    ledger = ledger_of(
        {
            "samples/1": {"a": 30, "z": 20},  # half a part by its bytes
            ".incoming/parts/2": {"c": 1, "b": 1, "d": 1},  # by its rows
            "samples/3": {"q": 20},
            ".incoming/parts/4": {"e": 1, "r": 20},
            ".incoming/parts/5": {"p": 49},
        }
    )
    assert kept_and_repacked(ledger) == (["a", "b", "c", "d", "z"], [["e", "p", "q", "r"]])


@pytest.mark.usefixtures("small_parts")
def test_a_part_with_songs_that_are_not_wanted_is_written_anew():
    ledger = ledger_of({"samples/1": {"a": 60, "b": 30}, "samples/2": {"c": 70}}, {"samples/1": 3})
    assert kept_and_repacked(ledger) == (["c"], [["a"], ["b"]])
    assert kept_and_repacked(ledger_of({"samples/1": {"a": 10}}, {"samples/1": 2})) == ([], [["a"]])


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("folder", ["samples", ".incoming/parts"])
def test_a_small_part_that_is_the_only_one_stays(folder):
    assert kept_and_repacked(ledger_of({f"{folder}/1": {"a": 10}, "samples/2": {"b": 90}})) == (
        ["a", "b"],
        [],
    )


@pytest.mark.usefixtures("small_parts")
def test_parts_stay_within_their_bounds():
    songs = {f"{i:03d}": 1 + 17 * i % 48 for i in range(200)} | {"050x": 180, "100x": 50}
    ledger = ledger_of({f".incoming/parts/{key}": {key: size} for key, size in songs.items()})
    kept, groups = kept_and_repacked(ledger)
    sizes = [sum(songs[key] for key in group) for group in groups]
    assert sorted(kept + [key for group in groups for key in group]) == sorted(songs)
    assert kept == ["050x", "100x"]  # alone in files that are large enough
    assert max(sizes) <= 100
    assert max(map(len, groups)) <= 6
    # What is written once is not written again: at most one of the new files is small.
    assert sum(size < 50 and len(group) < 3 for size, group in zip(sizes, groups, strict=True)) <= 1
    again = ledger_of({f"samples/{i}": {key: songs[key] for key in group} for i, group in enumerate(groups)})
    assert kept_and_repacked(again)[1] == []


@pytest.mark.usefixtures("small_parts")
def test_songs_of_half_a_part_do_not_make_the_next_run_repack():
    songs = {"a": 10, "b": 95, "c": 10, "d": 95, "e": 10}
    _, groups = kept_and_repacked(ledger_of({"samples/1": songs}, {"samples/1": 6}))
    assert sorted(groups) == [["a", "c", "e"], ["b"], ["d"]]


def test_a_plan_for_no_rows_is_empty():
    plan = plan_commit(LEDGER_SCHEMA.empty_table())
    assert (len(plan.kept), plan.repack) == (0, [])


def test_repacked_songs_are_the_same_bytes_in_another_part(cache):
    rows = rows_of_every_shape()
    ledger = pa.concat_tables([store_rows(cache, rows[:5]), store_rows(cache, rows[5:])])
    chosen = ledger.take(pa.array(range(1, len(rows), 2)))
    new = repack(cache, chosen)
    for before, after in zip(chosen.to_pylist(), new.to_pylist(), strict=True):
        assert after["key"] == before["key"]
        contents = [cache.read_range(one["file"], one["offset"], one["length"]) for one in (before, after)]
        assert contents[0] == contents[1]
    assert new["rows_in_file"].to_pylist() == [len(new)] * len(new)


def test_a_song_that_cannot_be_read_stops_the_repacking_and_names_its_file(cache):
    ledger = store_rows(cache, [song_row("a"), song_row("b")])
    (part,) = cache.names(".incoming/parts")
    offset = ledger["offset"][1].as_py()
    cache.write_bytes(part, cache.read_bytes(part)[:offset] + bytes(100_000))
    with pytest.raises(CacheDamagedError, match=f"'b' cannot be read from .*{part}"):
        repack(cache, ledger)


@contextmanager
def killed_at(monkeypatch, step: int) -> Iterator[Counter]:
    """Raises KeyboardInterrupt instead of the n-th change of a store; counts the changes.

    Deletions are one by one, and object storage moves by a copy and a deletion.
    """
    count = Counter()
    real = {name: getattr(Store, name) for name in ("write_bytes", "move", "delete")}

    def change(name: str):
        def changed(store, *arguments):
            count["changes"] += 1
            if count["changes"] == step:
                raise KeyboardInterrupt
            return real[name](store, *arguments)

        return changed

    def delete(store, names):
        for name in names:
            change("delete")(store, [name])

    def move(store, name, new_name):
        if store.is_local:
            change("move")(store, name, new_name)
        else:
            change("write_bytes")(store, new_name, store.read_bytes(name))
            delete(store, [name])

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write_bytes", change("write_bytes"))
        patched.setattr(Store, "move", move)
        patched.setattr(Store, "delete", delete)
        yield count


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_kill_at_any_step_leaves_the_old_cache_or_the_new_one(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(commit_module, "PART_BYTES", 60_000)
    old = [song_row(key) for key in "abcdefghij"]
    changed = [song_row("b", seed=1), song_row("k"), song_row("l"), song_row("m"), song_row("e", seed=1)]
    replaced = {"b", "e", "g", "h", "i"}
    wanted = [row for row in old if row["key"][0].as_py() not in replaced] + changed
    fingerprints = [sorted(map(fingerprint_of, rows)) for rows in (old, wanted)]

    def begin(name: str) -> Store:
        cache = Store.at(tmp_path / name if kind == "local" else f"memory://{tmp_path.name}/{name}")
        claim_output_dir(cache)
        for start in range(0, len(old), 3):
            store_rows(cache, old[start : start + 3])
        finish(cache, [reject("x")])
        return cache

    def rerun(cache: Store) -> None:
        claim_output_dir(cache)
        stored = set(find_rows(cache)["fingerprint"].to_pylist())
        for rows in (changed[:2], changed[2:]):
            if missing := [row for row in rows if fingerprint_of(row) not in stored]:
                store_rows(cache, missing)
        store_rejects(cache, [reject("y")])
        finish(cache, [reject("y")], wanted)

    uninterrupted = begin("uninterrupted")
    with killed_at(monkeypatch, step=0) as count:
        rerun(uninterrupted)
    expected = contents(uninterrupted)
    seen = Counter()
    for step in range(1, count["changes"] + 1):
        cache = begin(f"killed at {step}")
        with killed_at(monkeypatch, step), pytest.raises(KeyboardInterrupt):
            rerun(cache)
        reader = CacheReader(cache)
        found = [
            read_row(cache, f"samples/{reader.index.parts[part]}", int(offset), int(length), key)
            for key, part, offset, length in zip(
                reader.index.keys,
                reader.index.part_numbers,
                reader.index.offsets,
                reader.index.lengths,
                strict=True,
            )
        ]
        state = fingerprints.index(sorted(map(fingerprint_of, found)))
        assert find_rejects(cache)["key"].to_pylist()[0] == "xy"[state]
        seen[state] += 1
        rerun(cache)
        assert contents(cache) == expected
    assert min(seen[0], seen[1]) >= 3


def test_the_commit_refuses_a_part_that_holds_other_rows(cache):
    ledger = store_rows(cache, [song_row("a"), song_row("b")])
    with pytest.raises(AssertionError, match="holds other rows too"):
        commit(cache, ledger.slice(0, 1), [], {})
    assert not cache.status("manifest.json")


def test_the_commit_leaves_files_of_others_alone(cache):
    write_rows(cache, [song_row("a")])
    for name in ("README.md", "samples/notes.txt", "plots/part-1.parquet", "index.html"):
        cache.write_bytes(name, b"mine")
    finish(cache)
    assert {name for name, content in contents(cache).items() if content == b"mine"} == {
        "README.md",
        "samples/notes.txt",
        "plots/part-1.parquet",
        "index.html",
    }


def test_rejects_are_a_table_even_when_there_are_none(cache):
    write_rows(cache, [song_row("a")])
    assert keys_of(cache, "rejects") == []
    assert find_rejects(cache).schema == REJECT_SCHEMA
    rejects = [reject("y", window=2, is_last_window=False, fingerprint="f", audio_version="v"), reject("x")]
    finish(cache, rejects)
    expected = [vars(rejects[1]), vars(rejects[0])]
    assert pq.read_table(cache.path / "rejects").to_pylist() == expected
    assert find_rejects(cache).to_pylist() == expected


def test_the_manifest_names_the_files_of_the_cache(cache):
    write_rows(cache, [song_row("a")], [reject("x")])
    manifest = json.loads(cache.read_bytes("manifest.json"))
    files = {manifest["index"], manifest["ledger"], manifest["rejects"], "manifest.json"}
    assert set(cache.names()) - files == set(find_rows(cache)["file"].to_pylist())
    assert pc.all(
        pc.match_substring_regex(find_rows(cache)["file"], "^samples/part-[0-9a-f]{16}.parquet$")
    ).as_py()


def test_a_cache_in_object_storage_is_the_cache_on_a_disk(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(commit_module, "PART_ROWS", 4)
    remote, local = Store.at(s3.fresh()), Store.at(tmp_path / "cache")
    with pytest.raises(InputError, match="not a feature cache"):
        CacheReader(remote)
    for cache in (remote, local):
        write_rows(cache, [song_row(key) for key in "cab"], [reject("x")])
        store_rows(cache, [song_row(key, frames=50) for key in "bed"])
        store_rows(cache, [song_row("g")])
        store_rejects(cache, [reject("y")])
        assert find_rejects(cache)["key"].to_pylist() == ["x", "y"]
        claim_output_dir(cache)
        wanted = [song_row("a"), *(song_row(key, frames=50) for key in "bed"), song_row("g")]
        finish(cache, [reject("z")], wanted)
    assert contents(remote) == contents(local)
    reader = CacheReader(remote)
    assert [reader.read_key(key).latents.shape[-1] for key in "gabed"] == [30, 30, 50, 50, 50]
    before = contents(remote)
    finish(remote, [reject("z")])
    assert contents(remote) == before
