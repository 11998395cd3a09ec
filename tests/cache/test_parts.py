from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from acestep_ray.cache import parts as parts_module
from acestep_ray.cache.parts import (
    CacheDamagedError,
    _row_to_bytes,
    claim_output_dir,
    commit,
    find_rejects,
    find_rows,
    join_tables,
    plan_commit,
    read_dims,
    read_row,
    repack,
    store_rejects,
    store_rows,
)
from acestep_ray.cache.reader import CacheReader
from acestep_ray.cache.schema import LEDGER_SCHEMA, REJECT_SCHEMA, SAMPLE_SCHEMA
from acestep_ray.errors import InputError
from acestep_ray.storage import Store
from tests.cache.rows import (
    SSL_DIMS,
    TEXT_DIM,
    contents,
    fingerprint_of,
    finish,
    reject,
    song_row,
    write_rows,
)

FOOTER_BYTES = 2600  # of one song, magic and length included


@pytest.fixture
def cache(tmp_path) -> Store:
    return Store.at(tmp_path / "cache")


def rows_of_every_shape() -> list[pa.Table]:
    text_only = dict.fromkeys(("latents", "latent_frames", "ssl"))
    ssl_entry = {"name": "mert", "frames": 4500, "dim": 1024, "directions": bytes(4500 * 1024)}
    return [
        song_row("plain"),
        song_row("speaker", speaker=True),
        pa.Table.from_pylist([{"key": "nothing"}], schema=SAMPLE_SCHEMA),
        song_row("no latents", **text_only),
        song_row("empty", latents=b"", prompts=[], lyric_ids=[], ssl=[], speaker=b""),
        song_row("null ends", lyric_languages=["en", None], ssl=[None, ssl_entry, None]),
        song_row("\n\t🎵" * 1000, filename=""),
        song_row("many pages", lyric_ids=range(1_000_000), lyric_languages=["en"] * 300_000),
        song_row("values of many pages", text_embeddings=[bytes(300_000)] * 40 + [b""]),
        song_row("more values than a batch", text_embeddings=[bytes([i % 7]) for i in range(5000)]),
        song_row("a 240 s song", frames=2584, ssl_dims={"mert": 1024, "m-hubert": 768}),
        song_row("one value of many pages", latents=np.random.default_rng(0).bytes(9_000_000)),
        song_row("last"),
    ]


def part_file(cache: Store, ledger: pa.Table):
    (name,) = ledger["file"].unique().to_pylist()
    return cache.path / name


def keys_of(cache: Store, folder: str = "samples") -> list[str]:
    return sorted(pq.read_table(cache.path / folder, columns=["key"])["key"].to_pylist())


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


def test_songs_of_a_killed_run_are_found_and_become_the_cache(cache):
    stored = pa.concat_tables([store_rows(cache, [song_row(key)]) for key in "bca"])
    found = find_rows(cache)
    assert found.sort_by("key").equals(stored.sort_by("key"))
    finish(cache)
    assert keys_of(cache) == ["a", "b", "c"]
    assert not (cache.path / ".incoming").exists()
    after = find_rows(cache)
    for name in ("key", "fingerprint", "length"):
        assert after[name].equals(found.sort_by("key")[name])


def test_a_part_without_its_sidecar_does_not_exist(cache, monkeypatch):
    def die(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "write_bytes", die)
    with pytest.raises(KeyboardInterrupt):
        store_rows(cache, [song_row("a")])
    monkeypatch.undo()
    assert len(cache.names(".incoming/parts")) == 1
    assert len(find_rows(cache)) == 0


def test_after_a_killed_commit_sidecars_tell_of_the_parts_that_were_moved(cache, monkeypatch):
    def die(*arguments):
        raise KeyboardInterrupt

    for keys in ("ab", "cd"):
        store_rows(cache, [song_row(key) for key in keys])
    monkeypatch.setattr(parts_module, "PART_ROWS", 4)
    with monkeypatch.context() as patched:
        patched.setattr(parts_module, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            finish(cache)
    monkeypatch.delattr(Store, "open")  # no part is read
    assert not cache.names(".incoming/parts")
    assert sorted(find_rows(cache)["key"].to_pylist()) == ["a", "b", "c", "d"]
    with monkeypatch.context() as patched:
        patched.setattr(parts_module, "delete_leftovers", die)
        with pytest.raises(KeyboardInterrupt):
            finish(cache)
    assert cache.names(".incoming/ledgers")
    assert sorted(find_rows(cache)["key"].to_pylist()) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("folder", ["parts", "ledgers"])
def test_a_stored_file_that_is_cut_short_holds_no_songs(cache, folder):
    store_rows(cache, [song_row("a")])
    (name,) = cache.names(f".incoming/{folder}")
    cache.write_bytes(name, cache.read_bytes(name)[:-1])
    assert len(find_rows(cache)) == 0


def test_a_damaged_part_holds_no_songs_and_goes_with_the_commit(cache):
    write_rows(cache, [song_row("a")])
    (part,) = cache.names("samples")
    damaged = "samples/part-0123456789abcdef.parquet"
    cache.write_bytes(damaged, cache.read_bytes(part)[:-100])
    unfinished = cache.path / f"samples/.{'0' * 32}.tmp"
    unfinished.write_bytes(b"PAR1")
    assert find_rows(cache)["key"].to_pylist() == ["a"]
    finish(cache)
    assert list(cache.names("samples")) == [part]
    assert not unfinished.exists()


def test_without_their_ledger_parts_speak_for_themselves(cache):
    write_rows(cache, [song_row("a", speaker=True), song_row("b", lyric_ids=[]), song_row("c")])
    expected = find_rows(cache)
    assert len(expected) == 3
    (ledger,) = [name for name in cache.names() if name.startswith("ledger-")]
    content = cache.read_bytes(ledger)
    cache.write_bytes(ledger, content[:-10])
    assert find_rows(cache).equals(expected)
    cache.delete([ledger])
    assert find_rows(cache).equals(expected)
    finish(cache)
    assert cache.read_bytes(ledger) == content


def test_a_cache_of_another_format_holds_no_songs(cache):
    cache.write_bytes(
        "manifest.json", b'{"format_version": 1, "index": "index-0.parquet", "ledger": "index-0.parquet"}'
    )
    cache.write_bytes("index-0.parquet", b"")
    (cache.path / "samples").mkdir()
    pq.write_table(pa.table({"key": ["a"]}), cache.path / "samples/part-0.parquet")
    claim_output_dir(cache)
    assert len(find_rows(cache)) == len(find_rejects(cache)) == 0
    write_rows(cache, [song_row("b")])
    assert keys_of(cache) == ["b"]
    assert not cache.status("index-0.parquet")


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
    monkeypatch.setattr(parts_module, "PART_BYTES", 100)
    monkeypatch.setattr(parts_module, "PART_ROWS", 6)


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
    monkeypatch.setattr(parts_module, "PART_BYTES", 60_000)
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


def test_rejects_of_a_killed_run_are_found(cache):
    write_rows(cache, [song_row("a")], [reject("x")])
    store_rejects(cache, [reject("z"), reject("y")])
    store_rejects(cache, [])
    assert find_rejects(cache)["key"].to_pylist() == ["x", "z", "y"]
    finish(cache)
    assert find_rejects(cache)["key"].to_pylist() == []


@pytest.mark.parametrize("files", [["notes.txt"], ["samples/kick.wav"], ["manifest.json"]])
def test_a_directory_that_is_no_cache_is_refused(tmp_path, files):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="no feature cache"):
        claim_output_dir(Store.at(tmp_path))


def test_a_file_or_a_place_that_cannot_be_written_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "cache"):
        with pytest.raises(InputError, match="cannot write"):
            claim_output_dir(Store.at(path))


def test_an_empty_directory_a_cache_and_a_killed_run_are_accepted(cache, tmp_path):
    write_rows(cache, [song_row("a")])
    new = Store.at(tmp_path / "deep/new")
    for place in (new, new, cache):
        claim_output_dir(place)
    assert keys_of(cache) == ["a"]


def test_the_manifest_names_the_files_of_the_cache(cache):
    write_rows(cache, [song_row("a")], [reject("x")])
    manifest = json.loads(cache.read_bytes("manifest.json"))
    files = {manifest["index"], manifest["ledger"], manifest["rejects"], "manifest.json"}
    assert set(cache.names()) - files == set(find_rows(cache)["file"].to_pylist())
    assert pc.all(
        pc.match_substring_regex(find_rows(cache)["file"], "^samples/part-[0-9a-f]{16}.parquet$")
    ).as_py()


def test_a_cache_in_object_storage_is_the_cache_on_a_disk(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "PART_ROWS", 4)
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


def test_a_song_from_object_storage_is_one_request(s3):
    remote = write_rows(Store.at(s3.fresh()), [song_row(key) for key in "cab"])
    reader = CacheReader(remote)
    before = s3.requests(remote.url)
    for i in (2, 0, 2):
        reader.read(i)
    assert s3.requests(remote.url)[len(before) :] == ["GET"] * 3


def test_object_storage_that_holds_something_else_or_cannot_be_written_is_refused(s3):
    other = Store.at(s3.fresh())
    other.write_bytes("songs/a.wav", b"a song")
    with pytest.raises(InputError, match="no feature cache"):
        claim_output_dir(other)
    with pytest.raises(InputError, match=r"bucket does not exist.*no-such-bucket"):
        claim_output_dir(Store.at("s3://no-such-bucket/cache"))


def test_many_small_tables_become_one_whose_columns_are_whole(monkeypatch):
    monkeypatch.setattr("acestep_ray.cache.parts._TABLES_JOINED", 2)
    joined = join_tables(pa.table({"a": [i]}) for i in range(5))
    assert joined["a"].to_pylist() == [0, 1, 2, 3, 4]
    assert joined["a"].num_chunks == 1
