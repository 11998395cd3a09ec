"""A Git LFS pointer or a web page in place of a file is named, with its own remedy, wherever the file is read."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pytest

from acestep_ray.cache.index import CacheIndex, read_index_table, read_manifest
from acestep_ray.data.lyrics.tokenizer import LyricTokenizer
from acestep_ray.data.speaker import SpeakerEmbeddingError, load_speaker_embedding
from acestep_ray.errors import InputError
from acestep_ray.foreign_files import seems_to_be
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.storage import Store
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
from acestep_ray.training.lora_config import read_lora_config
from tests.cache.rows import song_row, write_rows

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 6612345\n"
PAGE = b"<!DOCTYPE html>\n<html><title>Sign in</title></html>"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (POINTER, "a Git LFS pointer to a file of 6,612,345 bytes"),
        (b"\xef\xbb\xbf" + PAGE, "a web page"),
        (b"\n<html>", "a web page"),
        (b'{"error":"Repository not found"}', "a server's error message"),
        (b"\x1f\x8b\x08\x00", "a gzip archive"),
        (b"", "an empty file"),
        (b"\0" * 4096, "nothing but zeros"),
    ],
)
def test_what_a_file_is_instead_is_named(tmp_path, content, what):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert seems_to_be(path).what.startswith(what)


def test_files_of_the_kinds_that_are_read_are_no_impostors(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(4))
    (tmp_path / "b.json").write_text('{"error": 1}')
    (tmp_path / "c.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    with pa.OSFile(str(tmp_path / "d.arrow"), "wb") as sink, pa.ipc.new_stream(sink, pa.schema([])):
        pass
    assert [seems_to_be(path) for path in sorted(tmp_path.iterdir())] == [None] * 4


@pytest.fixture(scope="module")
def checkpoint_path(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny").path


@pytest.mark.parametrize(
    "name",
    [
        "ace_step_transformer/diffusion_pytorch_model.safetensors",
        "music_vocoder/config.json",
        "umt5-base/tokenizer.json",
        "umt5-base/model.safetensors",
    ],
)
@pytest.mark.parametrize(
    ("content", "what", "fix"),
    [(POINTER, "Git LFS pointer", "git lfs pull"), (PAGE, "web page", "/resolve/")],
)
def test_a_part_of_the_checkpoint_directory_that_was_not_downloaded_is_told(
    checkpoint_path, tmp_path, name, content, what, fix
):
    directory = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_path, directory)
    (directory / name).write_bytes(content)
    with pytest.raises(InputError) as told:
        CheckpointDir.open(directory)
    assert f"{name}: " in str(told.value)
    assert what in str(told.value)
    assert fix in str(told.value)


def test_a_lyric_vocabulary_that_is_a_pointer_is_told(tmp_path):
    path = tmp_path / "vocab.json"
    path.write_bytes(POINTER)
    with pytest.raises(InputError, match=r"it is a Git LFS pointer(.|\n)*git lfs pull"):
        LyricTokenizer.from_file(path)


def test_a_lora_configuration_that_is_a_pointer_is_told(tmp_path):
    path = tmp_path / "lora.json"
    path.write_bytes(POINTER)
    with pytest.raises(InputError, match="it is a Git LFS pointer"):
        read_lora_config(path)


def test_a_speaker_embedding_that_is_a_pointer_is_told(tmp_path):
    path = tmp_path / "voice.pt"
    path.write_bytes(POINTER)
    with pytest.raises(SpeakerEmbeddingError, match="Git LFS pointer"):
        load_speaker_embedding(path, 512)


def test_a_dataset_whose_tables_are_pointers_is_told(tmp_path):
    import datasets

    from acestep_ray.data.schema import open_dataset

    rows = {"keys": ["a"], "filename": ["a.wav"], "tags": [["pop"]], "norm_lyrics": ["la"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "ds")
    (table,) = (tmp_path / "ds").glob("*.arrow")
    table.write_bytes(POINTER)
    with pytest.raises(InputError, match=rf"{table.name} is a Git LFS pointer(.|\n)*git lfs pull"):
        open_dataset(tmp_path / "ds")


def test_tables_of_a_cache_that_are_pointers_are_told(tmp_path):
    (tmp_path / "manifest.json").write_bytes(POINTER)
    with pytest.raises(InputError, match=r"manifest cannot be read .it is a Git LFS pointer"):
        read_manifest(Store.at(tmp_path))
    (tmp_path / "index.parquet").write_bytes(POINTER)
    with pytest.raises(InputError, match=r"index cannot be read .it is a Git LFS pointer(.|\n)*git lfs pull"):
        read_index_table(Store.at(tmp_path), {"index": "index.parquet"})


def test_parts_of_a_cache_that_are_pointers_are_told_before_training(tmp_path):
    cache = write_rows(Store.at(tmp_path / "cache"), [song_row("a")])
    assert len(CacheIndex.open(cache)) == 1
    (part,) = cache.names("samples")
    (cache.path / part).write_bytes(POINTER)
    with pytest.raises(InputError, match="a part of the cache is a Git LFS pointer"):
        CacheIndex.open(cache)
