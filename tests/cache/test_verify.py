from __future__ import annotations

import io
import re
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acestep_ray.cache import verify
from acestep_ray.cache.parts import CacheDamagedError, store_rows
from acestep_ray.cache.schema import (
    INDEX_SCHEMA,
    LEDGER_SCHEMA,
    REJECT_SCHEMA,
    SAMPLE_SCHEMA,
    table_from_bytes,
)
from acestep_ray.cache.stored import find_rows
from acestep_ray.cache.verify import row_problems, verify_cache
from acestep_ray.storage import Store
from acestep_ray.terminal import Progress
from tests.cache.changes import file_of, overwrite, place_of, rewrite_manifest, rewrite_table, with_values
from tests.cache.rows import SPEAKER_DIM, SSL_DIMS, TEXT_DIM, contents, finish, reject, song_row, write_rows

MANIFEST = {
    "settings": {"speaker_dim": SPEAKER_DIM, "ssl_frame_stride": 1},
    "text_dim": TEXT_DIM,
    "ssl": SSL_DIMS,
}


def problems(cache: Store) -> list[str]:
    """What `verify` finds, one line each."""
    with pytest.raises(CacheDamagedError) as caught:
        verify_cache(cache.url)
    first, *lines, last = str(caught.value).splitlines()
    assert first == f"{len(lines)} things are wrong in the feature cache {cache.url}"
    assert last.startswith("  → delete the parts that are named and run `acestep-ray precompute` again")
    return [line.removeprefix("  - ") for line in lines]


def test_a_whole_cache_passes_and_is_counted(cache):
    before = contents(cache)
    summary = verify_cache(cache.url)
    sizes = [status.size for status in cache.names("samples").values()]
    assert (summary.songs, summary.parts, summary.rejects, summary.num_bytes) == (4, 2, 2, sum(sizes))
    assert summary.leftovers == 0
    assert "4 in 2 parts" in summary.render()
    assert "leftovers" not in summary.render()
    assert contents(cache) == before


def test_a_cache_without_songs_passes(tmp_path):
    cache = write_rows(Store.at(tmp_path / "cache"), [], [reject("x")])
    assert verify_cache(cache.url).songs == 0


def test_leftovers_are_counted_and_are_no_fault(cache):
    store_rows(cache, [song_row("e")])
    summary = verify_cache(cache.url)
    assert summary.leftovers == 2
    assert f"2 files: `acestep-ray cache prune {cache.url}`" in summary.render()


def test_every_damaged_song_is_named_with_its_part(cache):
    part, offset, length = place_of(cache, "a")
    group = pq.read_metadata(pa.BufferReader(cache.read_range(part, offset, length))).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    latents = next(column for column in columns if column.path_in_schema == "latents")
    # A bit of the latents: only the checksum tells.
    overwrite(cache, part, offset + latents.data_page_offset + 1000, b"\xff\x7f\x12")
    other, offset, length = place_of(cache, "d")
    overwrite(cache, other, offset + length - 8, b"\xff\xff\xff\xff")
    found = problems(cache)
    assert len(found) == 2
    for name, key in ((part, "a"), (other, "d")):
        assert any(line.startswith(f"{name}: the song {key!r} cannot be read") for line in found)


def test_missing_short_and_foreign_parts_are_named(cache):
    parts = list(cache.names("samples"))
    content = cache.read_bytes(parts[0])
    cache.write_bytes(parts[0], content[:-1])
    cache.delete([parts[1]])
    assert sorted(problems(cache)) == sorted(
        [
            f"{parts[0]}: it has {len(content) - 1} bytes, it should have {len(content)}",
            f"{parts[1]}: it does not exist, and its 2 songs with it",
        ]
    )
    cache.write_bytes(parts[1], content)
    assert sum("cannot be read" in line for line in problems(cache)) == 2


def test_a_part_that_other_programs_cannot_read_is_named(cache):
    (part, *_) = cache.names("samples")
    size = cache.status(part).size
    overwrite(cache, part, size - 8, b"\xff\xff\xff\xff")
    assert problems(cache) == [f"{part}: other programs find other songs in it, or cannot read it"]


@pytest.mark.parametrize("prefix", ["ledger-", "rejects/part-"])
def test_a_damaged_table_is_named(cache, prefix):
    name = file_of(cache, prefix)
    cache.write_bytes(name, b"PAR1")
    assert any(line.startswith(f"{name}: cannot be read") for line in problems(cache))


@pytest.mark.parametrize("prefix", ["index-", "ledger-", "rejects/part-"])
def test_a_table_whose_content_has_changed_is_named(cache, prefix):
    schema = {"index-": INDEX_SCHEMA, "ledger-": LEDGER_SCHEMA, "rejects/part-": REJECT_SCHEMA}[prefix]
    name = file_of(cache, prefix)
    table = table_from_bytes(cache.read_bytes(name), schema).cast(schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)  # the same rows in other bytes
    cache.write_bytes(name, sink.getvalue())
    assert problems(cache) == [f"{name}: its content has changed"]


def test_counts_that_are_wrong_are_told(cache):
    rewrite_manifest(cache, counts={"inputs": 9, "samples": 5, "rejects": 3})
    assert problems(cache) == [
        "manifest.json: it counts 5 samples, there are 4",
        "manifest.json: it counts 3 rejects, there are 2",
        "manifest.json: its inputs are not its samples and rejects together",
    ]


def test_another_fingerprint_is_told(cache):
    rewrite_manifest(cache, fingerprint="0" * 64)
    assert problems(cache) == ["manifest.json: its fingerprint is not that of the songs"]


def test_a_key_in_both_samples_and_rejects_or_twice_is_told(cache):
    rewrite_table(
        cache, "rejects/part-", REJECT_SCHEMA, lambda rejects: with_values(rejects, "key", ["b", "b"])
    )
    assert problems(cache) == [
        f"{file_of(cache, 'rejects/')}: the key 'b' is there 2 times",
        "the song 'b' is both in the samples and in the rejects",
    ]


def test_an_index_out_of_order_is_told(cache):
    for prefix, schema in (("index-", INDEX_SCHEMA), ("ledger-", LEDGER_SCHEMA)):
        rewrite_table(cache, prefix, schema, lambda table: table.take(pa.array([0, 2, 1, 3])))
    found = problems(cache)
    assert f"{file_of(cache, 'index-')}: the key 'b' is there twice, or not in its place" in found


def test_a_ledger_that_is_not_the_index_is_told(cache):
    rewrite_table(cache, "ledger-", LEDGER_SCHEMA, lambda ledger: with_values(ledger, "length", [1, 2, 3, 4]))
    name = file_of(cache, "ledger-")
    expected = [f"{name}: the song {key!r} is not as {file_of(cache, 'index-')} says" for key in "abcd"]
    assert problems(cache) == expected
    rewrite_table(cache, "ledger-", LEDGER_SCHEMA, lambda ledger: ledger.slice(1))
    name = file_of(cache, "ledger-")
    assert problems(cache) == [f"{name}: its songs are not those of {file_of(cache, 'index-')}"]


def test_a_ledger_that_says_other_things_than_the_rows_is_told(cache):
    rewrite_table(
        cache,
        "ledger-",
        LEDGER_SCHEMA,
        lambda ledger: with_values(ledger, "audio_sha256", ["a" * 64] * 3 + ["c"]),
    )
    part, _, _ = place_of(cache, "d")
    (found,) = problems(cache)
    assert found == (
        f"{part}: the song 'd': its audio_sha256 is {'a' * 64!r}, the index or the ledger says 'c'"
    )


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({}, None),
        ({"speaker": True}, None),
        ({"lyric_ids": []}, None),
        ({"latents": bytes(10)}, "wrong sizes"),
        ({"latents": bytes(8 * 16 * 2 * 29)}, "29 latent frames, its row says 30"),
        ({"latents": None}, "0 latent frames, its row says 30"),
        ({"latents": np.full(8 * 16 * 30, np.inf, np.float16).tobytes()}, "its latents are not finite"),
        (
            {"text_embeddings": [np.full(6, np.nan, np.float16).tobytes()] * 3},
            "text embeddings are not finite",
        ),
        ({"text_embeddings": [bytes(12)]}, "1 embeddings of 3 prompts"),
        ({"prompts": [], "text_embeddings": []}, "0 embeddings of 0 prompts"),
        ({"text_dim": 3}, "another width than 6"),
        ({"ssl": None}, r"has the SSL features \[\], the cache \['m-hubert', 'mert'\]"),
        (
            {"ssl_dims": {"mert": 7, "m-hubert": 5}},
            r"m-hubert features have the shape \(210, 5\), not \(210, 4\)",
        ),
        ({"ssl_frame_stride": 2}, r"mert features have the shape \(105, 7\), not \(210, 7\)"),
    ],
)
def test_features_that_training_could_not_use_are_told(columns, problem):
    row = song_row("a", **columns)
    found = list(row_problems(row, {"key": "a", "latent_frames": 30}, MANIFEST))
    if problem is None:
        assert found == []
    else:
        assert any(re.search(problem, line) for line in found)


def test_a_row_of_other_columns_is_told():
    row = song_row("a").rename_columns([*SAMPLE_SCHEMA.names[:-1], "features"])
    assert list(row_problems(row, {}, MANIFEST)) == ["its columns are not those of this version"]


def test_groups_of_features_that_were_not_chosen_may_be_absent():
    row = song_row("a", latents=None, latent_frames=0, ssl=None)
    manifest = {**MANIFEST, "ssl": {}, "settings": {**MANIFEST["settings"], "features": ["text"]}}
    assert list(row_problems(row, {"latent_frames": 0}, manifest)) == []


def test_many_problems_are_counted_and_some_shown(cache, monkeypatch):
    monkeypatch.setattr(verify, "_SHOWN_PROBLEMS", 2)
    rewrite_table(cache, "ledger-", LEDGER_SCHEMA, lambda ledger: with_values(ledger, "length", [1, 2, 3, 4]))
    with pytest.raises(CacheDamagedError, match=r"^4 things(?s:.*)the song 'b'[^\n]*\n  … and 2 more\n"):
        verify_cache(cache.url)


def test_progress_is_told_now_and_then(cache, monkeypatch):
    stream = io.StringIO()
    verify_cache(cache.url, stream)
    assert stream.getvalue() == ""
    monkeypatch.setattr(verify, "Progress", partial(Progress, seconds_between_lines=0))
    verify_cache(cache.url, stream)
    assert [line.split(" · ")[0] for line in stream.getvalue().splitlines()] == [
        f"reading: {n}/4 songs" for n in (1, 2, 3, 4)
    ]


def test_deleting_the_named_part_and_finishing_again_mends_the_cache(cache):
    part, offset, length = place_of(cache, "a")
    overwrite(cache, part, offset + length - 8, b"\xff\xff\xff\xff")
    assert problems(cache)
    cache.delete([part])
    assert find_rows(cache)["key"].to_pylist() == ["c", "d"]
    store_rows(cache, [song_row("a", speaker=True), song_row("b")])
    finish(cache, [reject("x"), reject("y", "silent")])
    assert verify_cache(cache.url).songs == 4


def test_a_cache_in_object_storage_is_verified(s3):
    cache = write_rows(Store.at(s3.fresh()), [song_row(key) for key in "abc"], [reject("x")])
    store_rows(cache, [song_row("e")])
    summary = verify_cache(cache.url)
    assert (summary.songs, summary.leftovers) == (3, 2)
    (part,) = cache.names("samples")
    overwrite(cache, part, 500, bytes(20))
    assert problems(cache)[0].startswith(f"{part}: the song 'a' cannot be read")
