from __future__ import annotations

import pytest

from acestep_ray.cache.parts import store_rejects, store_rows
from acestep_ray.cache.prune import prune_cache
from acestep_ray.cache.verify import verify_cache
from acestep_ray.errors import InputError
from acestep_ray.storage import Store
from tests.cache.changes import rewrite_manifest
from tests.cache.rows import contents, reject, song_row, write_rows


def test_prune_deletes_what_the_manifest_does_not_reach_and_nothing_else(cache):
    before = contents(cache)
    left = {
        "index-0123456789abcdef.parquet",
        "ledger-0123456789abcdef.parquet",
        "samples/part-0123456789abcdef.parquet",
        "rejects/part-0123456789abcdef.parquet",
        ".incoming/attempts/decode-1",
    }
    others = {"README.md", "samples/notes.txt", "plots/part-1.parquet"}
    for name in left | others:
        cache.write_bytes(name, b"1234")
    store_rows(cache, [song_row("e")])
    store_rejects(cache, [reject("f")])
    half = cache.path / f"samples/.{'a' * 32}.tmp"
    half.write_bytes(b"PAR1")
    everything = contents(cache)

    listed = prune_cache(cache.url, dry_run=True)
    assert contents(cache) == everything
    assert half.exists()
    incoming = {name for name in everything if name.startswith(".incoming/")}
    assert len(incoming) == 4
    assert set(listed.files) == left | incoming
    assert listed.num_bytes == sum(len(everything[name]) for name in listed.files)
    assert listed.render().startswith("would delete 8 files")
    assert all(f"  {name}" in listed.render().splitlines() for name in left)

    pruned = prune_cache(cache.url)
    assert pruned.files == listed.files
    assert pruned.render().startswith("deleted 8 files")
    assert {name: content for name, content in contents(cache).items() if name not in others} == before
    assert others < set(contents(cache))
    assert not half.exists()
    assert not (cache.path / ".incoming").exists()
    assert verify_cache(cache.url).leftovers == 0
    assert prune_cache(cache.url).files == []


def test_prune_leaves_a_run_that_was_killed_before_its_first_commit_alone(tmp_path):
    cache = Store.at(tmp_path / "cache")
    store_rows(cache, [song_row("a")])
    before = contents(cache)
    with pytest.raises(InputError, match=r"not complete(?s:.*)precompute"):
        prune_cache(cache.url)
    assert contents(cache) == before


def test_prune_touches_nothing_where_parts_are_missing_or_the_format_is_another(cache):
    store_rows(cache, [song_row("e")])
    (part, *_) = cache.names("samples")
    content = cache.read_bytes(part)
    cache.delete([part])
    with pytest.raises(InputError, match="missing"):
        prune_cache(cache.url)
    cache.write_bytes(part, content)
    rewrite_manifest(cache, format_version=1)
    with pytest.raises(InputError, match="version 1"):
        prune_cache(cache.url)
    assert len(cache.names(".incoming")) == 2


def test_prune_of_a_cache_without_songs(tmp_path):
    cache = write_rows(Store.at(tmp_path / "cache"), [], [reject("x")])
    before = contents(cache)
    store_rows(cache, [song_row("e")])
    assert len(prune_cache(cache.url).files) == 2
    assert contents(cache) == before


def test_prune_of_a_cache_in_object_storage(s3):
    cache = write_rows(Store.at(s3.fresh()), [song_row(key) for key in "abc"], [reject("x")])
    before = contents(cache)
    store_rows(cache, [song_row("e")])
    assert len(prune_cache(cache.url).files) == 2
    assert contents(cache) == before
