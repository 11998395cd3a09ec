from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acestep_ray.cache import commit as commit_module
from acestep_ray.cache.parts import store_rejects, store_rows
from acestep_ray.cache.stored import claim_output_dir, find_rejects, find_rows, join_tables
from acestep_ray.errors import InputError
from acestep_ray.storage import Store
from tests.cache.rows import finish, keys_of, reject, song_row, write_rows


@pytest.fixture
def cache(tmp_path) -> Store:
    return Store.at(tmp_path / "cache")


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
    monkeypatch.setattr(commit_module, "PART_ROWS", 4)
    with monkeypatch.context() as patched:
        patched.setattr(commit_module, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            finish(cache)
    monkeypatch.delattr(Store, "open")  # no part is read
    assert not cache.names(".incoming/parts")
    assert sorted(find_rows(cache)["key"].to_pylist()) == ["a", "b", "c", "d"]
    with monkeypatch.context() as patched:
        patched.setattr(commit_module, "delete_leftovers", die)
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


def test_object_storage_that_holds_something_else_or_cannot_be_written_is_refused(s3):
    other = Store.at(s3.fresh())
    other.write_bytes("songs/a.wav", b"a song")
    with pytest.raises(InputError, match="no feature cache"):
        claim_output_dir(other)
    with pytest.raises(InputError, match=r"bucket does not exist.*no-such-bucket"):
        claim_output_dir(Store.at("s3://no-such-bucket/cache"))


def test_many_small_tables_become_one_whose_columns_are_whole(monkeypatch):
    monkeypatch.setattr("acestep_ray.cache.stored._TABLES_JOINED", 2)
    joined = join_tables(pa.table({"a": [i]}) for i in range(5))
    assert joined["a"].to_pylist() == [0, 1, 2, 3, 4]
    assert joined["a"].num_chunks == 1
