from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from acestep_ray.cache.index import CacheIndex, Keys
from acestep_ray.cache.parts import CacheDamagedError, store_rows
from acestep_ray.cache.reader import CacheReader
from acestep_ray.cache.schema import INDEX_SCHEMA, table_from_bytes, table_to_bytes
from acestep_ray.errors import InputError
from acestep_ray.storage import Store
from tests.cache.rows import SPEAKER_DIM, SSL_DIMS, TEXT_DIM, reject, song_row, write_rows

FRAMES = {"cc": 50, "a": 30, "bbb": 40, "dddd": 35}
INDEX_BYTES_A_SONG = 100


@pytest.fixture
def rows() -> dict[str, pa.Table]:
    return {
        key: song_row(key, frames=frames, speaker=key == "bbb", lyric_ids=[] if key == "a" else [8, 9])
        for key, frames in FRAMES.items()
    }


@pytest.fixture
def cache(rows, tmp_path, monkeypatch) -> Store:
    """A cache in parts of two songs."""
    monkeypatch.setattr("acestep_ray.cache.commit.PART_ROWS", 2)
    cache = Store.at(tmp_path / "cache")
    for keys in (("cc", "dddd"), ("bbb", "a")):
        store_rows(cache, [rows[key] for key in keys])
    return write_rows(cache, [])


def test_the_index_lists_songs_by_key_with_their_lengths(cache):
    index = CacheIndex.open(cache)
    assert (len(index), index.keys) == (4, ["a", "bbb", "cc", "dddd"])
    assert index.latent_frames.tolist() == [30, 40, 50, 35]
    assert index.latent_frames.dtype == np.int32
    assert (index.ssl_dims, index.ssl_frame_stride) == (SSL_DIMS, 1)
    assert (index.text_dim, index.speaker_dim) == (TEXT_DIM, SPEAKER_DIM)
    assert index.features == ("latents", "text", "ssl")


def test_the_index_says_where_each_song_lies(tmp_path):
    cache = Store.at(tmp_path / "cache")
    write_rows(cache, [song_row(key) for key in "cab"])
    index = CacheIndex.open(cache)
    assert (len(index.parts), index.part_numbers.tolist()) == (1, [0, 0, 0])
    ends = index.offsets + index.lengths
    assert [index.offsets[2], *ends[[2, 0]]] == [0, index.offsets[0], index.offsets[1]]
    size = cache.status(f"samples/{index.parts[0]}").size
    assert ends[1] < size


def test_an_index_opens_from_a_path_a_url_and_a_store(cache):
    for place in (cache, cache.url, cache.path, f"file://{cache.url}"):
        index = CacheIndex.open(place)
        assert (index.store, len(index)) == (cache, 4)


def test_the_position_of_a_song_follows_from_its_key(cache):
    index = CacheIndex.open(cache)
    assert [index.position(key) for key in index.keys] == [0, 1, 2, 3]
    for key in ("", "b", "zz"):
        with pytest.raises(KeyError, match=f"^{key!r}$"):
            index.position(key)


def test_keys_are_a_sequence_of_strings():
    listed = sorted(["a", "b", "Z", "ä", "é", "\n", "🎵", "\uffff", "a" * 300])
    keys = Keys(pa.array(listed).sort())
    assert list(keys) == listed
    assert keys == listed
    assert keys == Keys(pa.array(listed))
    assert keys != listed[1:]
    assert [keys[i] for i in (0, -1, np.int64(3))] == [listed[0], listed[-1], listed[3]]
    assert keys[1:4] == listed[1:4]
    assert [keys.index(key) for key in listed] == list(range(len(listed)))
    assert ("🎵" in keys, "🎶" in keys, 3 in keys) == (True, False, False)
    with pytest.raises(ValueError, match="'c'"):
        keys.index("c")
    with pytest.raises(ValueError, match="'a'"):
        keys.index("a", keys.index("a") + 1)
    with pytest.raises(IndexError):
        keys[len(keys)]


def test_a_large_index_takes_less_than_a_hundred_bytes_a_song(tmp_path):
    count, per_part = 100_000, 8
    keys = [np.random.default_rng(i).bytes(20).hex() for i in range(count)]
    sizes = np.random.default_rng(0).integers(7_000_000, 8_000_000, count)
    table = pa.table(
        {
            "key": keys,
            "latent_frames": pa.array(np.random.default_rng(1).integers(30, 2584, count), pa.int32()),
            "part": [f"part-{i // per_part:016x}.parquet" for i in range(count)],
            "offset": (sizes.reshape(-1, per_part).cumsum(1) - sizes.reshape(-1, per_part)).ravel(),
            "length": sizes,
        },
        schema=INDEX_SCHEMA,
    ).sort_by("key")
    content = table_to_bytes(table, "part")
    assert content.size < INDEX_BYTES_A_SONG * count
    read = table_from_bytes(content, INDEX_SCHEMA, "part")
    assert read.cast(INDEX_SCHEMA).equals(table)
    # Each part's name is there once, also where there are many.
    assert pc.count_distinct(read["part"].combine_chunks().indices).as_py() == count // per_part
    assert pa.types.is_dictionary(read["part"].type)


def test_the_index_fingerprint_changes_with_any_song_and_not_with_the_split_into_parts(rows, cache, tmp_path):
    others = {
        "whole": list(rows.values()),
        "fewer": list(rows.values())[1:],
        "changed": [*list(rows.values())[1:], song_row("cc", seed=1)],
    }
    caches = [cache, *(write_rows(Store.at(tmp_path / name), some) for name, some in others.items())]
    fingerprints = [CacheIndex.open(one).fingerprint for one in caches]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3


def test_every_song_reads_back_as_it_was_written_in_any_order(cache, rows):
    reader = CacheReader(cache)
    for i in (3, 0, 2, 1, 1, 3):
        read = reader.read(i)
        (row,) = rows[reader.index.keys[i]].to_pylist()
        assert read.key == row["key"] == reader.read_key(row["key"]).key
        assert read.prompts == [prompt["text"] for prompt in row["prompts"]]
        assert read.prompt_sources == [prompt["source"] for prompt in row["prompts"]]
        frames = reader.index.latent_frames[i]
        assert (read.latents.dtype, read.latents.shape) == (torch.float16, (8, 16, frames))
        assert read.latents.numpy().tobytes() == row["latents"]
        assert [text.numpy().tobytes() for text in read.text_embeddings] == row["text_embeddings"]
        assert {text.shape[1] for text in read.text_embeddings} == {TEXT_DIM}
        for entry in row["ssl"]:
            directions = read.ssl[entry["name"]]
            assert (directions.dtype, directions.shape) == (torch.int8, (7 * frames, entry["dim"]))
            assert directions.numpy().tobytes() == entry["directions"]
            assert read.ssl_frames[entry["name"]] == entry["frames"]


def test_a_song_is_one_request(cache, monkeypatch):
    reader = CacheReader(cache)
    requests = []
    read_range = Store.read_range

    def counted(store, name, start, length):
        requests.append((name, start, length))
        return read_range(store, name, start, length)

    for name in ("open", "read_bytes", "status", "names"):
        monkeypatch.delattr(Store, name)
    monkeypatch.setattr(Store, "read_range", counted)
    for i in (3, 0, 3):
        reader.read(i)
    index = reader.index
    assert requests == [
        (f"samples/{index.parts[index.part_numbers[i]]}", index.offsets[i], index.lengths[i])
        for i in (3, 0, 3)
    ]


def test_a_song_without_lyrics_has_one_token_to_mask_out(cache):
    reader = CacheReader(cache)
    without, with_lyrics = reader.read(0), reader.read(1)
    assert (without.lyric_ids.tolist(), without.has_lyrics) == ([0], False)
    assert (with_lyrics.lyric_ids.tolist(), with_lyrics.has_lyrics) == ([8, 9], True)
    assert with_lyrics.lyric_ids.dtype == torch.int64


def test_a_song_without_a_speaker_has_zeros(cache, rows):
    reader = CacheReader(cache)
    assert reader.read(0).speaker.tolist() == [0.0] * SPEAKER_DIM
    assert reader.read(1).speaker.numpy().tobytes() == rows["bbb"]["speaker"][0].as_py()


def test_tensors_outlive_the_reader_and_may_be_written_to(cache):
    song = CacheReader(cache).read(2)
    expected = song.latents.clone()
    del song.prompts
    copy = CacheReader(cache).read(2).latents
    song.latents += 1
    assert torch.equal(song.latents, expected + 1)
    assert torch.equal(copy, expected)


def test_threads_and_other_processes_read_the_same(cache):
    reader = CacheReader(cache)
    expected = [reader.read(i).latents for i in range(4)]
    unpickled = pickle.loads(pickle.dumps(reader))
    assert unpickled.index.keys == reader.index.keys
    order = np.random.default_rng(0).integers(0, 4, 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        for i, latents in zip(order, pool.map(lambda i: unpickled.read(i).latents, order), strict=True):
            assert torch.equal(latents, expected[i])


def test_a_cache_without_a_feature_group_that_is_needed_is_an_input_error(tmp_path):
    rows = [song_row("a", prompts=[], text_embeddings=None, text_dim=None, lyric_ids=[])]
    cache = write_rows(Store.at(tmp_path / "cache"), rows)
    manifest = json.loads(cache.read_bytes("manifest.json"))
    manifest["settings"]["features"] = ["latents"]
    cache.write_bytes("manifest.json", json.dumps(manifest).encode())
    with pytest.raises(InputError, match=r"holds no text(?s:.*)--features latents,text"):
        CacheReader(cache)
    with pytest.raises(InputError, match="no text and no ssl"):
        CacheReader(cache, needs=("text", "latents", "ssl"))
    song = pickle.loads(pickle.dumps(CacheReader(cache, needs=("latents",)))).read(0)
    assert song.latents.shape == (8, 16, 30)
    assert (song.prompts, song.text_embeddings) == ([], [])


def test_a_song_without_latents_has_none_of_them(tmp_path):
    row = song_row("a", latents=None, latent_frames=None, ssl=None)
    reader = CacheReader(write_rows(Store.at(tmp_path / "cache"), [row]), needs=("text",))
    song = reader.read(0)
    assert (song.latents.shape, song.latents.dtype, song.ssl) == ((8, 16, 0), torch.float16, {})
    assert reader.index.latent_frames.tolist() == [0]
    assert len(song.text_embeddings) == 3


def overwrite(cache: Store, name: str, content: bytes, start: int) -> None:
    whole = cache.read_bytes(name)
    cache.write_bytes(name, whole[:start] + content + whole[start + len(content) :])


def test_bytes_that_are_not_the_songs_are_an_error_that_names_the_part(cache):
    reader = CacheReader(cache)
    index = reader.index
    first, second = (f"samples/{index.parts[index.part_numbers[i]]}" for i in (0, 2))
    other = cache.read_range(first, int(index.offsets[0]), int(index.lengths[0]))
    overwrite(
        cache, first, bytes(100), int(index.offsets[1] + index.lengths[1]) - 100
    )  # the song's own footer
    with pytest.raises(
        CacheDamagedError, match=rf"'bbb' cannot be read from .*{first}.*\n.*cache verify {cache.url}"
    ):
        reader.read(1)
    assert reader.read(0).key == "a"  # its neighbour in the same part
    # The bytes of another song, where the index expects this one.
    overwrite(cache, second, other, int(index.offsets[2]))
    reader = CacheReader(replace(index, lengths=np.full(4, len(other))))
    with pytest.raises(CacheDamagedError, match=rf"'cc' cannot be read from .*{second} .found .'a'."):
        reader.read(2)
    cache.delete([first])
    with pytest.raises(CacheDamagedError, match="does not exist"):
        reader.read(0)


@pytest.mark.parametrize(
    "columns",
    [
        {"latents": b"123"},
        {"latents": bytes(8 * 16 * 2 * 29)},
        {"text_embeddings": [b"12", b"12"]},
        {"text_embeddings": [b"12345678901"]},
        {"ssl": [{"name": "mert", "frames": 1, "dim": 7, "directions": b"123456"}]},
    ],
)
def test_features_of_the_wrong_size_are_an_error_that_names_the_part(tmp_path, columns):
    reader = CacheReader(write_rows(Store.at(tmp_path / "cache"), [song_row("a", **columns)]))
    with pytest.raises(CacheDamagedError, match=r"'a' cannot be read from .*samples/part"):
        reader.read(0)


@pytest.mark.parametrize("speaker", [bytes(4 * SPEAKER_DIM - 4), bytes(4 * SPEAKER_DIM - 1)])
def test_a_speaker_embedding_of_another_width_is_an_error(tmp_path, speaker):
    row = song_row("a")
    row = row.set_column(row.column_names.index("speaker"), "speaker", pa.array([speaker], pa.binary()))
    reader = CacheReader(write_rows(Store.at(tmp_path / "cache"), [row]))
    with pytest.raises(CacheDamagedError, match="'a' cannot be read"):
        reader.read(0)


def test_a_directory_that_is_no_cache_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(InputError, match="not a feature cache"):
            CacheIndex.open(place)


def test_an_unfinished_cache_is_an_input_error(cache):
    cache.delete(["manifest.json"])
    with pytest.raises(InputError, match="not complete"):
        CacheIndex.open(cache)


@pytest.mark.parametrize("version", [1, 999])
def test_another_format_version_is_an_input_error(cache, version):
    manifest = json.loads(cache.read_bytes("manifest.json"))
    cache.write_bytes("manifest.json", json.dumps({**manifest, "format_version": version}).encode())
    with pytest.raises(InputError, match=f"version {version}"):
        CacheIndex.open(cache)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1}', b"\xff"])
def test_a_manifest_that_says_nothing_is_an_input_error(cache, content):
    cache.write_bytes("manifest.json", content)
    with pytest.raises(InputError, match="manifest cannot be read"):
        CacheIndex.open(cache)


def test_missing_parts_are_an_input_error(cache):
    parts = list(cache.names("samples"))
    cache.delete(parts[:1])
    with pytest.raises(InputError, match=f"1 of the cache's 2 parts are missing.*{parts[0]}"):
        CacheIndex.open(cache)
    cache.delete(parts)
    with pytest.raises(InputError, match="2 of the cache's 2 parts are missing"):
        CacheIndex.open(cache)


def test_missing_parts_in_object_storage_are_an_input_error(s3):
    cache = write_rows(Store.at(s3.fresh()), [song_row("a")])
    assert len(CacheIndex.open(cache)) == 1
    cache.delete(cache.names("samples"))
    with pytest.raises(InputError, match="1 of the cache's 1 parts are missing"):
        CacheIndex.open(cache)


@pytest.mark.parametrize("content", [None, b"", b"PAR1", "rejects"])
def test_a_missing_or_damaged_index_is_an_input_error(cache, content):
    (index,) = [name for name in cache.names() if name.startswith("index-")]
    cache.delete([index])
    if content == "rejects":
        content = cache.read_bytes(next(iter(cache.names("rejects"))))
    if content is not None:
        cache.write_bytes(index, content)
    with pytest.raises(InputError, match="index cannot be read"):
        CacheIndex.open(cache)


def test_a_cache_without_songs_is_an_input_error(tmp_path):
    cache = write_rows(Store.at(tmp_path / "cache"), [], [reject("x")])
    with pytest.raises(InputError, match="holds no songs"):
        CacheIndex.open(cache)
