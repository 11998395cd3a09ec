from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from acestep_ray.cache import parts as parts_module
from acestep_ray.cache import reader as reader_module
from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.reader import CacheReader
from acestep_ray.cache.schema import quantise_directions
from acestep_ray.errors import InputError
from tests.cache.conftest import SPEAKER_DIM, SSL_DIMS, TEXT_DIM, decoded, song

SECONDS = {"cc": 5.0, "a": 3.0, "bbb": 4.0, "dddd": 3.5}


@pytest.fixture
def sources():
    return {
        key: decoded(song(key, lyrics="" if key == "a" else "la la"), seconds, _speaker(key))
        for key, seconds in SECONDS.items()
    }


def _speaker(key: str) -> np.ndarray | None:
    return np.full(SPEAKER_DIM, 0.5, np.float32) if key == "bbb" else None


@pytest.fixture
def cache(sources, write_cache, monkeypatch):
    """A cache in parts of two songs."""
    monkeypatch.setattr(parts_module, "PART_ROWS", 2)
    return write_cache(list(sources.values()))


def test_the_index_lists_songs_by_key_with_their_lengths(cache):
    index = CacheIndex.open(cache)
    assert (len(index), index.keys) == (4, ["a", "bbb", "cc", "dddd"])
    assert index.latent_frames.tolist() == [30, 40, 50, 35]
    assert index.latent_frames.dtype == np.int32
    assert len(index.parts) == 2
    assert index.part_numbers.tolist() == [0, 0, 1, 1]
    assert index.row_groups.tolist() == [0, 1, 0, 1]
    assert (index.ssl_dims, index.ssl_frame_stride) == (SSL_DIMS, 1)
    assert (index.text_dim, index.speaker_dim) == (TEXT_DIM, SPEAKER_DIM)


def test_the_index_fingerprint_changes_with_any_song_and_not_with_the_split_into_parts(
    sources, cache, write_cache, monkeypatch
):
    monkeypatch.setattr(parts_module, "PART_ROWS", 3)
    whole, fewer = (
        write_cache(list(sources.values()), "whole"),
        write_cache(list(sources.values())[1:], "fewer"),
    )
    fingerprints = [CacheIndex.open(path).fingerprint for path in (cache, whole, fewer)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_every_song_reads_back_as_it_was_written_in_any_order(cache, sources, encoder):
    reader = CacheReader(cache)
    for i in (3, 0, 2, 1, 1, 3):
        read = reader.read(i)
        source = sources[reader.index.keys[i]]
        (row,) = encoder.encode_song(source).to_pylist()
        assert read.key == source.song.key
        assert read.prompts == [prompt["text"] for prompt in row["prompts"]]
        assert read.prompt_sources == [prompt["source"] for prompt in row["prompts"]]
        assert (read.latents.dtype, read.latents.shape) == (
            torch.float16,
            (8, 16, reader.index.latent_frames[i]),
        )
        assert read.latents.numpy().tobytes() == row["latents"]
        assert [text.numpy().tobytes() for text in read.text_embeddings] == row["text_embeddings"]
        assert {text.shape[1] for text in read.text_embeddings} == {TEXT_DIM}
        for name, stand_in in encoder.ssl_encoders.items():
            features = stand_in.encode(torch.from_numpy(source.wave)).numpy()
            np.testing.assert_array_equal(read.ssl[name].numpy(), quantise_directions(features))
            assert (read.ssl[name].dtype, read.ssl_frames[name]) == (torch.int8, len(features))


def test_a_song_without_lyrics_has_one_token_to_mask_out(cache, encoder):
    reader = CacheReader(cache)
    without, with_lyrics = reader.read(0), reader.read(1)
    assert (without.lyric_ids.tolist(), without.has_lyrics) == ([0], False)
    assert with_lyrics.lyric_ids.tolist() == encoder.lyric_tokenizer.encode("la la").ids
    assert (with_lyrics.lyric_ids.dtype, with_lyrics.has_lyrics) == (torch.int64, True)


def test_a_song_without_a_speaker_has_zeros(cache):
    reader = CacheReader(cache)
    assert reader.read(0).speaker.tolist() == [0.0] * SPEAKER_DIM
    assert reader.read(1).speaker.tolist() == [0.5] * SPEAKER_DIM


def test_tensors_outlive_the_reader_and_may_be_written_to(cache):
    song = CacheReader(cache).read(2)
    expected = song.latents.clone()
    del song.prompts
    copy = CacheReader(cache).read(2).latents
    song.latents += 1
    assert torch.equal(song.latents, expected + 1)
    assert torch.equal(copy, expected)


def test_threads_and_other_processes_read_the_same(cache, monkeypatch):
    monkeypatch.setattr(reader_module, "_OPEN_FILES", 1)
    reader = CacheReader(cache)
    expected = [reader.read(i).latents for i in range(4)]
    unpickled = pickle.loads(pickle.dumps(reader))
    order = np.random.default_rng(0).integers(0, 4, 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        for i, latents in zip(order, pool.map(lambda i: unpickled.read(i).latents, order), strict=True):
            assert torch.equal(latents, expected[i])


def test_samples_are_plain_parquet_with_one_uncompressed_row_group_a_song(cache):
    table = pq.read_table(cache / "samples")
    assert sorted(table["key"].to_pylist()) == sorted(SECONDS)
    for file in cache.glob("samples/*.parquet"):
        metadata = pq.ParquetFile(file).metadata
        assert metadata.num_row_groups == metadata.num_rows
        columns = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
        assert {column.compression for column in columns} == {"UNCOMPRESSED"}
        assert not any(column.has_dictionary_page for column in columns)


def test_a_directory_that_is_no_cache_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="not a feature cache"):
        CacheIndex.open(tmp_path)
    with pytest.raises(InputError, match="not a feature cache"):
        CacheIndex.open(tmp_path / "nowhere")


def test_an_unfinished_cache_is_an_input_error(cache):
    (cache / "manifest.json").unlink()
    with pytest.raises(InputError, match="not complete"):
        CacheIndex.open(cache)


def test_another_format_version_is_an_input_error(cache):
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, "format_version": 999}))
    with pytest.raises(InputError, match="version 999"):
        CacheIndex.open(cache)


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}'])
def test_a_manifest_that_says_nothing_is_an_input_error(cache, content):
    (cache / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="manifest cannot be read"):
        CacheIndex.open(cache)


def test_a_missing_part_or_index_is_an_input_error(cache):
    part = next(cache.glob("samples/*"))
    content = part.read_bytes()
    part.unlink()
    with pytest.raises(InputError, match=f"1 of the cache's 2 parts are missing.*{part.name}"):
        CacheIndex.open(cache)
    part.write_bytes(content)
    next(cache.glob("index-*")).unlink()
    with pytest.raises(InputError, match="index cannot be read"):
        CacheIndex.open(cache)


def test_a_cache_without_songs_is_an_input_error(write_cache):
    with pytest.raises(InputError, match="holds no songs"):
        CacheIndex.open(write_cache([]))
