"""A small file that asks for a lot of memory is refused with a message.

Audio whose header promises more than there is, is in tests/data/test_audio_fuzz.py.
"""

from __future__ import annotations

import json
import struct
import zipfile

import numpy as np
import pytest
import torch
import yaml

from acestep_ray import cli
from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.schema import INDEX_SCHEMA, MANIFEST, table_from_bytes, table_to_bytes
from acestep_ray.data.schema import open_dataset
from acestep_ray.data.speaker import SpeakerEmbeddingError, load_speaker_embedding
from acestep_ray.errors import InputError
from acestep_ray.export.card import read_run as read_run_for_its_card
from acestep_ray.export.reading import open_lora
from acestep_ray.models.weights import check_weight_file, read_json
from acestep_ray.plain_yaml import load_yaml
from acestep_ray.reporting.run import read_run
from acestep_ray.storage import Store
from acestep_ray.training.experiment import IDENTITY_FILE, check_unchanged
from acestep_ray.training.lora_config import read_lora_config
from tests.cache.rows import song_row, write_rows

DEEP = "[" * 100_000
LEVELS = 30


def bomb(form: str) -> str:
    """YAML of a few hundred bytes that stands for 2^30 values."""
    levels = (f"a{level}: &a{level} " + form.format(f"*a{level - 1}") for level in range(1, LEVELS))
    return "\n".join(["a0: &a0 {x: 1}", *levels])


@pytest.mark.parametrize("form", ["[{0}, {0}]", "{{<<: [{0}, {0}]}}"])
def test_yaml_with_aliases_is_not_read(form):
    with pytest.raises(yaml.YAMLError, match=r"an alias .* is not read(?s:.*)line 2"):
        load_yaml(bomb(form))


def test_yaml_that_is_nested_too_deep_is_not_read():
    with pytest.raises(yaml.YAMLError, match="nested too deep"):
        load_yaml(DEEP)


def test_plain_yaml_reads_as_ever():
    settings = {"a": [1, 2.5, None, "x: y"], "b": {"c": True}, "e": 1e-4}
    assert load_yaml(yaml.safe_dump(settings)) == settings
    with pytest.raises(yaml.YAMLError):
        load_yaml("!!python/object/apply:os.getcwd []")


def test_a_settings_file_with_aliases_is_a_mistake_with_its_name(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(bomb("[{0}, {0}]"))
    with pytest.raises(InputError, match=rf"an alias .*--config {path}"):
        cli.check_settings_files(["--config", str(path)])


def test_json_that_is_nested_too_deep_is_a_mistake_in_every_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a":' + DEEP)
    for read in (read_json, read_lora_config):
        with pytest.raises(InputError, match=r"recursion|nested too deep"):
            read(path)
    cache = write_rows(Store.at(tmp_path / "cache"), [song_row("a")])
    cache.write_bytes(MANIFEST, path.read_bytes())
    with pytest.raises(InputError, match="manifest cannot be read"):
        CacheIndex.open(cache)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/state.json").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="damaged"):
        open_dataset(tmp_path / "set")
    run = Store.at(tmp_path / "run")
    run.write_bytes(IDENTITY_FILE, path.read_bytes())
    with pytest.raises(InputError, match=r"does not read.*nested too deep"):
        check_unchanged(run, {"--shift": 3.0}, allow_changes=False)
    with pytest.raises(InputError, match="nested too deep"):
        read_run_for_its_card(tmp_path / "run", 1)
    assert any("nested too deep" in told for told in read_run(tmp_path / "run").missing)


def test_a_configuration_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(1 << 34)  # takes no room on disk
    with pytest.raises(InputError, match="too large"):
        read_json(path)


@pytest.mark.parametrize("length", [2**27, 2**40, 2**63])
def test_a_safetensors_file_whose_header_claims_to_be_huge_is_refused(tmp_path, length):
    path = tmp_path / "lora.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", length) + b'{"a": ')
        file.truncate(2**28)
    with pytest.raises(InputError, match="cannot read these weights"):
        check_weight_file(path)
    with pytest.raises(InputError, match="cut short or damaged"):
        open_lora(path)


@pytest.mark.parametrize("shape", [[2**40], [2**62, 2], [-5]])
def test_a_tensor_whose_shape_claims_to_be_huge_is_refused(tmp_path, shape):
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(InputError, match="cannot read these weights"):
        check_weight_file(path)


def test_a_speaker_embedding_that_unpacks_to_more_is_not_unpacked(tmp_path, monkeypatch):
    small = tmp_path / "small.pt"
    torch.save(torch.zeros(6), small)
    path = tmp_path / "voice.pt"
    with zipfile.ZipFile(small) as before, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            after.writestr(name, before.read(name))
        after.writestr("small/data/1", bytes(65 << 20))
    assert path.stat().st_size < 1 << 20
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(SpeakerEmbeddingError, match="bytes, unpacked"):
        load_speaker_embedding(path, 6)


def test_an_array_whose_header_claims_to_be_huge_is_refused(tmp_path):
    path = tmp_path / "voice.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_2_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (2**50,)}
        )
        file.write(bytes(24))
    with pytest.raises(SpeakerEmbeddingError, match="cannot be read"):
        load_speaker_embedding(path, 6)


@pytest.mark.parametrize(("column", "value"), [("offset", -1), ("length", 2**50), ("length", 0)])
def test_an_index_that_asks_for_impossible_bytes_is_refused(tmp_path, column, value):
    cache = write_rows(Store.at(tmp_path / "cache"), [song_row("a")])
    name = json.loads(cache.read_bytes(MANIFEST))["index"]
    rows = table_from_bytes(cache.read_bytes(name), INDEX_SCHEMA, "part").to_pylist()
    table = type(table_from_bytes(cache.read_bytes(name), INDEX_SCHEMA)).from_pylist(
        [{**row, column: value} for row in rows], schema=INDEX_SCHEMA
    )
    cache.write_bytes(name, table_to_bytes(table, "part"))
    with pytest.raises(InputError, match="names places that no file has"):
        CacheIndex.open(cache)
