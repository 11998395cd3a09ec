"""What a stranger's file names stays where the file is.

Names in rows of a dataset are in tests/data/test_file_names.py, in a table in tests/data/test_songs.py, of songs that
are generated in tests/generation/test_requests.py, of files that are downloaded in tests/fetch/test_job.py, of adapters
in tests/training/test_lora.py, and --exp_name in tests/training/test_job.py.
"""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from safetensors.torch import save_file
from torch import zeros

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.schema import MANIFEST
from acestep_ray.cache.stored import find_rejects, find_rows
from acestep_ray.data.file_names import file_at, locate_file
from acestep_ray.data.schema import open_dataset
from acestep_ray.errors import InputError
from acestep_ray.models.weights import weight_files
from acestep_ray.storage import Store
from tests.cache.rows import song_row, write_rows

LEAVING = ["../secret", "/etc/passwd", "a/../../secret", "sub/shard.safetensors", "..", "a\0b"]
HUB, WEB = "hf://datasets/stranger/songs", "https://stranger.example/songs"


@pytest.mark.parametrize("name", LEAVING)
def test_an_index_of_weights_names_files_of_its_folder_alone(tmp_path, name):
    (tmp_path / "model").mkdir()
    save_file({"a": zeros(1)}, tmp_path / "secret")
    index = tmp_path / "model/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match=r"outside its folder|missing weight files \.\."):
        weight_files(index.parent)


@pytest.mark.parametrize(
    "name", [*LEAVING, ".incoming/../../x-0.parquet", "index-0.parquet/../../y", 5, None]
)
@pytest.mark.parametrize("table", ["index", "ledger", "rejects"])
def test_a_caches_manifest_names_files_of_the_cache_alone(tmp_path, table, name, monkeypatch):
    cache = write_rows(Store.at(tmp_path / "cache"), [song_row("a")])
    manifest = json.loads(cache.read_bytes(MANIFEST))
    cache.write_bytes(MANIFEST, json.dumps({**manifest, table: name}).encode())
    with pytest.raises(InputError, match="names no files of a cache"):
        CacheIndex.open(cache)
    read = []
    monkeypatch.setattr(
        Store, "read_bytes", lambda self, name, real=Store.read_bytes: read.append(name) or real(self, name)
    )
    find_rows(cache)
    find_rejects(cache)
    assert name not in read


def test_a_datasets_state_names_files_of_the_dataset_alone(tmp_path):
    Dataset.from_list([{"keys": "a", "filename": "a.wav"}]).save_to_disk(tmp_path / "set")
    state = json.loads((tmp_path / "set/state.json").read_text())
    (file,) = state["_data_files"]
    (tmp_path / "set" / file["filename"]).rename(tmp_path / file["filename"])
    state["_data_files"] = [{"filename": f"../{file['filename']}"}]
    (tmp_path / "set/state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="outside the dataset"):
        open_dataset(tmp_path / "set")


@pytest.mark.parametrize("place", [HUB, WEB])
@pytest.mark.parametrize(
    "filename", ["/etc/passwd", "file:///etc/passwd", "s3://mine/song.wav", "memory://x/y"]
)
def test_songs_from_the_hub_and_the_web_name_no_files_of_this_machine_or_of_a_bucket(place, filename):
    root = Store(place)
    for locate in (lambda: locate_file(root, filename), lambda: file_at(filename, root)):
        with pytest.raises(InputError, match="name a file that is not there"):
            locate()


@pytest.mark.parametrize("place", [HUB, WEB])
def test_songs_from_the_hub_and_the_web_name_files_beside_them_and_elsewhere_there(place):
    root = Store(place)
    other = "https://stranger.example/other/a.wav"
    assert locate_file(root, "audio/a.wav").url == file_at("audio/a.wav", root).url == f"{place}/audio/a.wav"
    assert locate_file(root, other).url == file_at(other, root).url == other


@pytest.mark.parametrize("filename", ["C:\\Windows\\a.wav", "..\\..\\a.wav", "\\\\server\\share\\a.wav"])
def test_windows_paths_are_names_within_the_root(tmp_path, filename):
    root = Store.at(tmp_path)
    assert locate_file(root, filename).local_path == file_at(filename, root).local_path == tmp_path / filename


@pytest.mark.parametrize("protocol", ["zip", "tar", "reference", "dir", "github", "cached", "nosuch"])
def test_a_kind_of_storage_that_lies_in_another_is_refused_with_a_message(protocol):
    with pytest.raises(InputError, match=f"{protocol}://"):
        locate_file(Store("/music"), f"{protocol}://a/b.wav")
